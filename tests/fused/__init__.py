"""The fused backend: on emulated kernels on a CPU, and whole on a GPU."""
