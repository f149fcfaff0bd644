"""How much memory a call needs beside arguments, output and their gradients: its workspace.

Each stage says what it allocates, in a function beside it. Here these are added up in the order of
:mod:`nsa.fused.pipeline`. What does not grow with the heads is left out.
"""

from nsa.fused.attention.compressed import compressed_backward_bytes, compressed_forward_bytes
from nsa.fused.attention.selected import selected_backward_bytes, selected_forward_bytes
from nsa.fused.attention.window import window_backward_bytes
from nsa.fused.block_lists import list_bytes
from nsa.fused.compression import compress_bytes
from nsa.fused.gating import gate_gradient_bytes
from nsa.fused.selection import select_bytes
from nsa.fused.sizes import Sizes


def workspace_bytes(sizes: Sizes, kv_heads: int, *, save: bool, recompute: bool) -> int:
    """Workspace with ``kv_heads`` KV heads at a time, of forward and, where ``save``, backward."""
    chunk = sizes.of_heads(kv_heads)
    if not save:
        return chunk.branch_outputs + forward_bytes(chunk)
    backward = chunk.branch_outputs + max(forward_bytes(chunk), backward_bytes(chunk))
    if recompute:
        return sizes.indices + backward
    # Those of the chunk are among those that are saved.
    return sizes.indices + sizes.branch_outputs - chunk.branch_outputs + backward


def forward_bytes(sizes: Sizes) -> int:
    """Peak of a forward beside the outputs of the branches."""
    held = compress_bytes(sizes) + sizes.query_copy + sizes.indices + list_bytes(sizes)
    stages = (select_bytes, compressed_forward_bytes, selected_forward_bytes)
    return held + max(stage(sizes) for stage in stages)


def backward_bytes(sizes: Sizes) -> int:
    """Peak of a backward beside the outputs of the branches.

    Each branch holds the gradients of the outputs of those that are left, its own gradients, and
    those of the branches before it.
    """
    dout, grads = sizes.query, sizes.query + 2 * sizes.key
    window = 3 * dout + window_backward_bytes(sizes)
    selected = 2 * dout + grads + selected_backward_bytes(sizes)
    compressed = dout + 2 * grads + compress_bytes(sizes) + compressed_backward_bytes(sizes)
    return gate_gradient_bytes(sizes) + max(window, selected, compressed)
