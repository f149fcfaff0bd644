"""The differentiable reference in PyTorch: every input form, any float dtype, CPU and CUDA."""

from nsa.reference.pipeline import (
    compress_blocks,
    forward,
    forward_cached,
    make_key_sums,
    select_blocks,
)
from nsa.reference.selected_branch import selected_attention, selected_from_pages
