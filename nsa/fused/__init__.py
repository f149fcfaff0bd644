"""FlashAttention-4's kernels and kernels of our own, behind the interface of the reference."""
