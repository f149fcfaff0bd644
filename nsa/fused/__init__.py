"""The fused backend: FlashAttention-4's kernels and our own, in the CuTe DSL, for a GPU."""

from nsa.fused.entry import forward, select_blocks

__all__ = ["forward", "select_blocks"]
