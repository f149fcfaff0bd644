"""The selected branch (paper section 3.3): queries attend the tokens of the selected blocks.

Tile mode runs on FlashAttention-4 and a kernel of our own, token mode on kernels of our own.
"""

from typing import Any

from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.fused import kernel_calls
from nsa.fused.attention.fa4_calls import (
    row_limit,
    sparse_backward,
    sparse_backward_bytes,
    sparse_forward,
)
from nsa.fused.block_lists import selected_lists
from nsa.fused.kernel_inputs import OtherGradients, Pair, RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.fused.waves import (
    WORKSPACE_BYTES,
    choose_chunk_tokens,
    gradient_wave_bytes,
    key_tiles,
    partial_gradient_bytes,
)


def selected_attention(
    q_rows: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected blocks.

    Args:
        q_rows: ``plan.align_queries(q)``.
        k, v: ``(B, Tk, H_kv, D)``.
        block_indices: ``(B, tiles, H, n)`` in tile mode, ``(B, T, H_kv, n)`` in token mode.
        plan: the sequences.

    Returns:
        The output, and the log-sum-exp, which is ``(B * T, H)`` in token mode.
    """
    if plan.config.selection == "token":
        arguments = _token_arguments(q_rows, k, v, block_indices, plan)
        out, lse = kernel_calls.selected_forward(**arguments, band=plan.has_band)
        return out.view(*q_rows.shape[:2], *out.shape[1:]), lse
    lists = selected_lists(block_indices, plan)
    k_rows, v_rows = plan.keys.pack(k), plan.keys.pack(v)
    return sparse_forward(q_rows, k_rows, v_rows, lists, _mask(q_rows, plan), plan)


def selected_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    block_indices: Tensor,
    plan: Plan,
    deterministic: bool = False,
    sums: Pair | None = None,
    others: OtherGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``.

    With ``sums``, as :class:`nsa.fused.key_sums.CallSums` has them, these instead of the last two.
    With ``others``, in token mode, that of ``q`` is the whole gradient.
    """
    if plan.config.selection == "token":
        dq, dk, dv = kernel_calls.selected_backward(
            **_token_arguments(q, k, v, block_indices, plan), dout=_of_batch(dout),
            statistics=statistics, deterministic=deterministic, sums=sums, others=others,
        )  # fmt: skip
        return dq.unflatten(0, q.shape[:2]), dk.view(k.shape), dv.view(v.shape)
    lists = selected_lists(block_indices, plan)
    k_rows, v_rows = plan.keys.pack(k), plan.keys.pack(v)
    q_rows = plan.align_queries(q)
    mask = _mask(q_rows, plan)
    dq, dk, dv = sparse_backward(
        dout, q_rows, k_rows, v_rows, statistics, lists, mask, plan,
        deterministic=deterministic, sums=sums,
    )  # fmt: skip
    return dq, plan.keys.unpack(dk), plan.keys.unpack(dv)


def _mask(q_rows: Tensor, plan: Plan) -> dict:
    """Which keys of a listed block a query sees, in tile mode."""
    if plan.config.causal and plan.ends_align:
        return dict(causal=True)
    # Without the causal flag, which also hides the padding, each sequence's end limits the keys.
    return dict(causal=False, key_limit=row_limit(plan.key_limit, q_rows, plan.keys.rows))


def closing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    others: tuple[Tensor, Tensor],
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    out: Tensor | None,
    plan: Plan,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The selected branch of token mode, and the gated sum of all branches, in one.

    Args:
        q, k, v, block_indices, plan: of :func:`selected_attention`.
        others: outputs of the compressed and of the window branch.
        gates, gate_proj_weight, out: of :func:`nsa.fused.gating.combine_branches`.
        keep: whether the output of the selected branch is wanted too.

    Returns:
        The sum, the output of the selected branch or None, and its log-sum-exp.
    """
    total, o_slc, lse = kernel_calls.closing_forward(
        **_token_arguments(q, k, v, block_indices, plan),
        o_cmp=_of_batch(others[0]),
        o_win=_of_batch(others[1]),
        gates=None if gates is None else _of_batch(gates),
        weight=None if gates is not None else gate_proj_weight,
        out=None if out is None else _of_batch(out),
        keep=keep,
    )
    shape = (*q.shape[:2], *total.shape[1:])
    total = total.view(shape) if out is None else out
    return total, None if o_slc is None else o_slc.view(shape), lse


def _token_arguments(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, plan: Plan
) -> dict[str, Any]:
    """The arguments that all kernels of token mode's selected branch share, by name."""
    config = plan.config
    return dict(
        q=_of_batch(q),
        k=_of_batch(k),
        v=_of_batch(v),
        block_indices=_of_batch(block_indices),
        blocks=plan.token_blocks,
        block_size=config.select_block_size,
        scale=config.softmax_scale(q.shape[-1]),
        causal=config.causal,
    )


def _of_batch(x: Tensor) -> Tensor:
    """``(B, T, ...)`` as ``(B * T, ...)``."""
    # x[0] is the cheaper view for one entry.
    return x[0] if x.shape[0] == 1 else x.flatten(0, 1)


def selected_forward_bytes(sizes: Sizes) -> int:
    """Bytes that the forward allocates in addition to its results and, in tile mode, the lists.

    Token mode allocates the inverted index and the partial results of a wave; tile mode copies.
    """
    if not sizes.token_mode:
        # Outputs that are not in order stay in rows. The caller counts its copy of the queries.
        return (sizes.query_copy if sizes.in_order else 0) + 2 * sizes.key_copy
    slots = sizes.config.num_selected_blocks
    blocks = num_selection_blocks(sizes.batch * sizes.keys, sizes.config)
    chunk = choose_chunk_tokens(sizes.tokens, sizes.group, blocks, slots, 2 * sizes.head_dim)
    of_token = slots * sizes.group * (sizes.head_dim * sizes.itemsize + 4)
    return 3 * sizes.indices + _wave_bytes(sizes, chunk, of_token, WORKSPACE_BYTES)


def selected_backward_bytes(sizes: Sizes) -> int:
    """Bytes that the backward allocates: gradients, copies, and sums in float32.

    Token mode also allocates the inverted index and the partial gradients of a wave.
    """
    if not sizes.token_mode:
        block_size = sizes.config.select_block_size
        return sparse_backward_bytes(sizes, block_size, sizes.key_rows, copies=sizes.key_copy > 0)
    dim, slots = sizes.head_dim, sizes.config.num_selected_blocks
    blocks = num_selection_blocks(sizes.batch * sizes.keys, sizes.config)
    chunk = choose_chunk_tokens(sizes.tokens, sizes.group, blocks, slots, 2 * dim)
    tiles = key_tiles(dim, dim, sizes.config.select_block_size)
    of_token = partial_gradient_bytes(slots, sizes.group, dim, tiles)
    results = _wave_bytes(sizes, chunk, of_token, gradient_wave_bytes(sizes.query))
    if sizes.deterministic:
        # Pairs are sorted first.
        results = max(results, 14 * sizes.indices)
    sums = sizes.batch * sizes.keys * 2 * sizes.num_kv_heads * dim * 4
    return sizes.query + 2 * sizes.key + 3 * sizes.indices + sums + results


def _wave_bytes(sizes: Sizes, chunk: int, of_token: int, workspace: int) -> int:
    """Bytes of partial results in a wave, of so many of a token and KV head."""
    # A wave has at least one unit. The last chunk is as long as the others.
    wave = max(workspace, chunk * of_token)
    return min(wave, sizes.num_kv_heads * (sizes.tokens + chunk) * of_token)
