"""The fused backend: FlashAttention-4's kernels and our own, in the CuTe DSL, for a GPU."""

from nsa.fused.cached import forward_cached
from nsa.fused.compressed_blocks import compress_blocks
from nsa.fused.entry import forward, select_blocks
from nsa.fused.key_sums import make_key_sums
from nsa.fused.paged_selection import selected_from_pages
from nsa.fused.selected_branch import selected_attention
