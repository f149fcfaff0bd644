"""Our kernels, each by itself."""
