"""What tests share: problems, emulated kernels, how results are held against each other."""
