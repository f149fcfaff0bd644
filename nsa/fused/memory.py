"""The workspace of a call: its memory beside arguments, output and their gradients.

A function beside each stage says what the stage allocates. This file adds them up in the order of
:mod:`nsa.fused.pipeline`. It leaves out tensors that do not grow with the heads.
"""

from nsa.fused.attention.compressed import compressed_backward_bytes, compressed_forward_bytes
from nsa.fused.attention.selected import selected_backward_bytes, selected_forward_bytes
from nsa.fused.attention.window import window_backward_bytes
from nsa.fused.block_lists import list_bytes
from nsa.fused.compression import compress_bytes
from nsa.fused.fa4_call import query_sums_bytes
from nsa.fused.gating import gate_gradient_bytes, output_gradient_bytes
from nsa.fused.near_blocks import near_block_bytes
from nsa.fused.selection import select_bytes
from nsa.fused.sizes import Sizes


def workspace_bytes(sizes: Sizes, kv_heads: int, *, save: bool, recompute: bool) -> int:
    """Workspace of a forward, and with ``save`` a backward, that runs ``kv_heads`` at a time."""
    chunk = sizes.of_heads(kv_heads)
    if not save:
        return branch_bytes(chunk) + forward_bytes(chunk)
    backward = branch_bytes(chunk) + max(forward_bytes(chunk), backward_bytes(chunk))
    if recompute:
        return sizes.indices + backward
    # The results of the chunk are among the saved ones, so they count once.
    return sizes.indices + branch_bytes(sizes) - branch_bytes(chunk) + backward


def branch_bytes(sizes: Sizes) -> int:
    """Bytes of :class:`nsa.fused.call_tensors.BranchResults`."""
    return sizes.branch_outputs + compress_bytes(sizes)


def forward_bytes(sizes: Sizes) -> int:
    """Peak of a forward, without the results of the branches."""
    held = sizes.query_copy + sizes.indices + list_bytes(sizes)
    stages = (select_bytes, compressed_forward_bytes, selected_forward_bytes)
    return held + max(stage(sizes) for stage in stages)


def backward_bytes(sizes: Sizes) -> int:
    """Peak of a backward, without the results of the branches.

    While a branch runs, memory holds the output gradients, if written, of the branches still to
    come, the branch's own gradients, and those of the branches before it. The last pass needs less
    than the last branch where that leaves sums of keys: these, and fewer gradients of queries.
    """
    douts, query, keys = output_gradient_bytes(sizes), sizes.query, 2 * sizes.key
    dout_cmp, dout_slc, _ = douts
    of_window = query + keys
    if sizes.sums_queries:
        of_window = keys + query_sums_bytes(
            sizes.batch, sizes.num_heads, sizes.head_dim, sizes.length
        )
        query = 0  # of the compressed branch, which adds to the same
    window = sum(douts) + window_backward_bytes(sizes)
    selected = dout_slc + of_window + selected_backward_bytes(sizes)
    compressed = dout_cmp + of_window + compressed_backward_bytes(sizes)
    if sizes.token_mode and not sizes.sums_queries:
        # Gradients of keys may be sums in float32.
        sums = 8 * sizes.key // sizes.itemsize
        selected, compressed = selected + dout_cmp, compressed + query + sums
    else:
        # Gradients of compressed keys and values may be in float32.
        of_compressed = query + 8 * sizes.key_cmp // sizes.itemsize
        selected, compressed = selected + of_compressed, compressed + dout_slc
    held = gate_gradient_bytes(sizes) + near_block_bytes(sizes)
    return held + max(window, selected, compressed)
