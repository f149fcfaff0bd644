"""The differentiable reference in PyTorch: every input form, any float dtype, CPU and CUDA."""

from nsa.reference.pipeline import forward, select_blocks
from nsa.reference.selected_branch import selected_attention

__all__ = ["forward", "select_blocks", "selected_attention"]
