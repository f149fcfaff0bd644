"""Code that tests share: problems, emulated kernels, comparisons of results."""
