"""The differentiable reference in PyTorch: every input form, any float dtype, CPU and CUDA."""

from nsa.reference.pipeline import forward, select_blocks

__all__ = ["forward", "select_blocks"]
