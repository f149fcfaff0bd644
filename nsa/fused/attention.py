"""The three attention branches (paper section 3.3), forward and backward, on FA4.

Shapes: ``q`` and ``out (B, T, H, D)``, ``k`` and ``v (B, T, H_kv, D)``, ``k_cmp`` and ``v_cmp
(B, M, H_kv, D)``. The log-sum-exp that a forward returns is in the layout of its kernel and meant
for its backward alone. So are, of packed input in tile mode, the outputs and gradients of queries
of the compressed and selected branch; :func:`query_placements` says where in them a token is.
"""

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.fused import fa4, kernel_calls
from nsa.fused.block_lists import (
    compressed_lists,
    goes_by_query,
    selected_lists,
    transpose_lists,
)
from nsa.fused.compressed_forms import CompressedForm
from nsa.fused.folded_attention import (
    folded_attention,
    folded_attention_backward,
    lse_in_order,
)
from nsa.fused.kernel_inputs import BlockLists
from nsa.fused.placement import IN_ORDER, Placements
from nsa.fused.plan import Plan
from nsa.precision import accumulation_dtype


def query_placements(q: Tensor, num_kv_heads: int, plan: Plan) -> Placements:
    """Where ``q (B, T, H, D)`` lies in outputs and gradients of the compressed and selected branch.

    A batch is in token order, and so is everything in token mode. Packed tiles are as the kernels
    have them: the selected, and the sparse compressed, in aligned rows, and the dense causal
    compressed folded.
    """
    if plan.in_order:
        return IN_ORDER
    num_heads, form = q.shape[2], plan.compressed_form
    selected = plan.tokens.placement(num_heads)
    if form is CompressedForm.LISTED:
        return selected, selected
    if form is CompressedForm.FOLDED_ROWS:
        return plan.folded.placement(num_heads, num_kv_heads), selected
    return None, selected


def compressed_attention(
    q: Tensor,
    q_rows: Tensor | None,
    k_cmp: Tensor,
    v_cmp: Tensor,
    groups: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Attention over the visible compressed tokens, or those of ``groups (B, tiles, H, m)``.

    ``q_rows``, needed with ``groups``, are the queries in aligned rows, ``(1, B * rows, H, D)``.
    """
    form = plan.compressed_form
    if form is CompressedForm.NONE:
        return torch.zeros_like(q), q.new_zeros(0, dtype=accumulation_dtype(q.dtype))
    if form is CompressedForm.LISTED:
        lists = compressed_lists(groups, plan)
        k_rows, v_rows = plan.compressed.pack(k_cmp), plan.compressed.pack(v_cmp)
        return _sparse_forward(q_rows, k_rows, v_rows, lists, _compressed_mask(q_rows, plan), plan)
    if plan.folds:
        return folded_attention(q, k_cmp, v_cmp, plan)
    return _dense_forward(q, k_cmp, v_cmp, plan, **_compressed_call(plan))


def compressed_lse(lse: Tensor, q: Tensor, k_cmp: Tensor, plan: Plan) -> Tensor:
    """The log-sum-exp of :func:`compressed_attention` without groups, as ``(B, H, T)``.

    Of queries that see no compressed token it is undefined.
    """
    form = plan.compressed_form
    if form is CompressedForm.NONE:
        return lse.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    if plan.folds:
        return lse_in_order(lse, q, k_cmp.shape[2], plan)
    return lse[None] if plan.packed else lse


def compressed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    out: Tensor,
    lse: Tensor,
    groups: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k_cmp`` and ``v_cmp``, the last two perhaps in float32."""
    form = plan.compressed_form
    if form is CompressedForm.NONE:
        return torch.zeros_like(q), torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
    if form is CompressedForm.LISTED:
        lists = compressed_lists(groups, plan)
        k_rows, v_rows = plan.compressed.pack(k_cmp), plan.compressed.pack(v_cmp)
        q_rows = plan.tokens.pack(q)
        mask = _compressed_mask(q_rows, plan)
        dq, dk, dv = _sparse_backward(dout, q_rows, k_rows, v_rows, out, lse, lists, mask, plan)
        return dq, plan.compressed.unpack(dk), plan.compressed.unpack(dv)
    if plan.folds:
        return folded_attention_backward(dout, q, k_cmp, v_cmp, out, lse, plan)
    call = _compressed_call(plan)
    dq, dk, dv = _dense_backward(dout, q, k_cmp, v_cmp, out, lse, plan, **call)
    if plan.packed:
        # The kernels write nothing past the last sequence's blocks.
        none = ~plan.geometry.compressed.real
        dk, dv = (x.masked_fill_(none[:, None, None], 0) for x in (dk, dv))
    return dq, dk, dv


def selected_attention(
    q_rows: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the blocks ``(B, tiles, H, n)``.

    ``q_rows`` are the queries in aligned rows, ``(1, B * rows, H, D)``.
    """
    lists = selected_lists(block_indices, plan)
    k_rows, v_rows = plan.tokens.pack(k), plan.tokens.pack(v)
    return _sparse_forward(q_rows, k_rows, v_rows, lists, _selected_mask(q_rows, plan), plan)


def selected_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    lists = selected_lists(block_indices, plan)
    k_rows, v_rows = plan.tokens.pack(k), plan.tokens.pack(v)
    q_rows = plan.tokens.pack(q)
    mask = _selected_mask(q_rows, plan)
    dq, dk, dv = _sparse_backward(dout, q_rows, k_rows, v_rows, out, lse, lists, mask, plan)
    return dq, plan.tokens.unpack(dk), plan.tokens.unpack(dv)


def window_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention over the ``window_size`` last keys, the query's own included."""
    return _dense_forward(q, k, v, plan, **_window_call(plan))


def window_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``."""
    return _dense_backward(dout, q, k, v, out, lse, plan, **_window_call(plan))


def _window_call(plan: Plan) -> dict:
    # An int32 of the kernels, to which they add positions.
    reach = min(plan.config.window_size - 1, 1 << 30)
    return dict(
        causal=plan.config.causal,
        window_size=(reach, None if plan.config.causal else reach),
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.cu_seqlens,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_k=plan.max_seqlen,
    )


def _compressed_call(plan: Plan) -> dict:
    """Mask and lengths of the dense compressed branch where it is not folded."""
    config, call = plan.config, dict(causal=False, window_size=(None, None))
    if plan.compressed_form is CompressedForm.BATCH:
        first = covered_tokens(config, config.compressed_visibility) - 1
        return call | dict(key_times=(config.compress_stride, first))
    if not plan.packed:
        return call
    return call | dict(
        cu_seqlens_q=plan.cu_seqlens,
        cu_seqlens_k=plan.compressed_bounds,
        max_seqlen_q=plan.max_seqlen,
        max_seqlen_k=plan.max_compressed,
    )


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, **call) -> tuple[Tensor, Tensor]:
    scale = plan.config.softmax_scale(q.shape[-1])
    if not plan.packed:
        return fa4.dense_forward(q, k, v, scale=scale, **call)
    out, lse = fa4.dense_forward(q[0], k[0], v[0], scale=scale, **call)
    return out[None], lse


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, **call
) -> tuple[Tensor, Tensor, Tensor]:
    scale = plan.config.softmax_scale(q.shape[-1])
    tensors = (dout, q, k, v, out)
    if not plan.packed:
        return fa4.dense_backward(*tensors, lse, scale=scale, **call)
    grads = fa4.dense_backward(*(x[0] for x in tensors), lse, scale=scale, **call)
    return tuple(grad[None] for grad in grads)


def _sparse_forward(
    q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, lists: BlockLists, mask: dict, plan: Plan
) -> tuple[Tensor, Tensor]:
    scale = plan.config.softmax_scale(q_rows.shape[-1])
    out, lse = fa4.sparse_forward(q_rows, k_rows, v_rows, lists, scale=scale, **mask)
    return plan.query_rows(out), lse


def _sparse_backward(
    dout: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: BlockLists,
    mask: dict,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, and of ``k`` and ``v`` in rows."""
    scale = plan.config.softmax_scale(q_rows.shape[-1])
    if plan.in_order:
        dout, out = plan.tokens.pack(dout), plan.tokens.pack(out)
    tensors = (dout, q_rows, k_rows, v_rows, out)
    if goes_by_query(lists.key_block, q_rows.shape[-1]):
        limit = mask.get("key_limit")
        dq, dk, dv = kernel_calls.listed_backward(*tensors, lse, lists, scale, limit)
    else:
        transposed = transpose_lists(lists, k_rows.shape[1])
        dq, dk, dv = fa4.sparse_backward(*tensors, lse, transposed, scale=scale, **mask)
    return plan.query_rows(dq), dk, dv


def _selected_mask(q_rows: Tensor, plan: Plan) -> dict:
    if plan.config.causal:
        return dict(causal=True)
    # The end of each sequence in the row; the causal flag would also hide the padding.
    rows, owner = plan.tokens, plan.tokens.segments.owner
    end = rows.segments.offset[owner] + rows.items.count[owner]
    return dict(causal=False, key_limit=_row_limit(end, q_rows, rows.rows))


def _compressed_mask(q_rows: Tensor, plan: Plan) -> dict:
    """For each row of queries the row of the first compressed token that it does not see."""
    geometry, rows = plan.geometry, plan.tokens
    owner = rows.segments.owner
    seen = geometry.num_visible(rows.segments.local, owner, plan.config.compressed_visibility)
    end = plan.compressed.segments.offset[owner] + seen
    return dict(causal=False, key_limit=_row_limit(end, q_rows, plan.compressed.rows))


def _row_limit(end: Tensor, q_rows: Tensor, keys_per_entry: int) -> Tensor:
    """int32 ``(B * rows,)`` from ``end (rows,)`` in one entry of the batch."""
    batch = q_rows.shape[1] // len(end)
    offset = torch.arange(batch, device=end.device)[:, None] * keys_per_entry
    return (end + offset).flatten().int()
