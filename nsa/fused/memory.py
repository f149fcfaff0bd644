"""The workspace of a call: its memory beside arguments, output and their gradients.

A function beside each stage says what the stage allocates. This file adds them up in the order of
:mod:`nsa.fused.pipeline`. It leaves out tensors that do not grow with the heads.
"""

from nsa.fused.attention.compressed import compressed_backward_bytes, compressed_forward_bytes
from nsa.fused.attention.selected import selected_backward_bytes, selected_forward_bytes
from nsa.fused.attention.window import window_backward_bytes
from nsa.fused.block_lists import list_bytes
from nsa.fused.compression import compress_bytes
from nsa.fused.gating import gate_gradient_bytes, output_gradient_bytes
from nsa.fused.selection import select_bytes
from nsa.fused.sizes import Sizes


def workspace_bytes(sizes: Sizes, kv_heads: int, *, save: bool, recompute: bool) -> int:
    """Workspace of a forward, and with ``save`` a backward, that runs ``kv_heads`` at a time."""
    chunk = sizes.of_heads(kv_heads)
    if not save:
        return chunk.branch_outputs + forward_bytes(chunk)
    backward = chunk.branch_outputs + max(forward_bytes(chunk), backward_bytes(chunk))
    if recompute:
        return sizes.indices + backward
    # The outputs of the chunk are among the saved ones, so they count once.
    return sizes.indices + sizes.branch_outputs - chunk.branch_outputs + backward


def forward_bytes(sizes: Sizes) -> int:
    """Peak of a forward, without the outputs of the branches."""
    held = compress_bytes(sizes) + sizes.query_copy + sizes.indices + list_bytes(sizes)
    stages = (select_bytes, compressed_forward_bytes, selected_forward_bytes)
    return held + max(stage(sizes) for stage in stages)


def backward_bytes(sizes: Sizes) -> int:
    """Peak of a backward, without the outputs of the branches.

    While a branch runs, memory holds the output gradients, if written, of the branches still to
    come, the branch's own gradients, and those of the branches before it.
    """
    douts, grads = output_gradient_bytes(sizes), sizes.query + 2 * sizes.key
    window = sum(douts) + window_backward_bytes(sizes)
    selected = sum(douts[:2]) + grads + selected_backward_bytes(sizes)
    compressed = douts[0] + 2 * grads + compress_bytes(sizes) + compressed_backward_bytes(sizes)
    return gate_gradient_bytes(sizes) + max(window, selected, compressed)
