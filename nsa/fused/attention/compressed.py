"""The compressed branch (paper section 3.3): queries attend the means of blocks of keys.

Shapes as in :mod:`nsa.fused.attention`; ``k_cmp`` and ``v_cmp`` are ``(B, M, H_kv, D)``.
"""

from typing import Any

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.fused import fa4, kernel_calls
from nsa.fused.attention.fa4_calls import (
    add_dense_backward,
    by_entry,
    dense_backward,
    dense_forward,
    new_lse,
    row_limit,
    sparse_backward,
    sparse_backward_bytes,
    sparse_forward,
)
from nsa.fused.attention.folded import folded_attention, folded_attention_backward
from nsa.fused.block_lists import compressed_lists
from nsa.fused.compressed_forms import CompressedForm, num_folded_rows
from nsa.fused.fa4_call import more_segments_bytes, query_sums_bytes, sums_bytes
from nsa.fused.fa4_variants import choose_key_block
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.precision import accumulation_dtype


def compressed_attention(
    q: Tensor,
    q_rows: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    groups: Tensor | None,
    plan: Plan,
) -> tuple[Tensor, Tensor]:
    """Attention over all visible compressed tokens, or those in ``groups (B, tiles, H, m)``.

    ``q_rows`` is ``plan.align_queries(q)``.
    """
    form = plan.compressed_form
    if form is CompressedForm.NONE:
        return torch.zeros_like(q), q.new_zeros(0, dtype=accumulation_dtype(q.dtype))
    if form is CompressedForm.LISTED:
        assert groups is not None
        lists = compressed_lists(groups, plan)
        k_rows, v_rows = plan.compressed.pack(k_cmp), plan.compressed.pack(v_cmp)
        return sparse_forward(q_rows, k_rows, v_rows, lists, _compressed_mask(q_rows, plan), plan)
    if plan.skips_key_tiles:
        attend = folded_attention if plan.packed else _forward_of_blocks
        return attend(q, k_cmp, v_cmp, plan)
    return dense_forward(q, k_cmp, v_cmp, plan, **_compressed_call(plan))


def _forward_of_blocks(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """The compressed branch of a batch with many compressed tokens."""
    lse, scale = new_lse(q), plan.config.softmax_scale(q.shape[-1])
    own, ends = by_entry(lse, len(q)), _block_ends(q, plan)
    out, _ = fa4.forward_of_blocks(q, k_cmp, v_cmp, scale=scale, block_ends=ends, lse=own)
    return out, lse


def _block_ends(q: Tensor, plan: Plan) -> tuple[int, int]:
    """(stride, first): query ``i`` of a batch sees the compressed blocks ``j`` with
    ``j * stride + first <= i``."""
    config = plan.config
    passed = plan.geometry.keys.total - q.shape[1]
    first = covered_tokens(config, config.compressed_visibility) - 1 - passed
    return config.compress_stride, first


def compressed_lse(lse: Tensor, q: Tensor, plan: Plan) -> Tensor:
    """Token mode's log-sum-exp of :func:`compressed_attention`, as ``(B, H, T)``.

    It is undefined for queries that see no compressed token.
    """
    if plan.compressed_form is CompressedForm.NONE:
        return lse.new_zeros(q.shape[0], q.shape[2], q.shape[1])
    return by_entry(lse, len(q))


def compressed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    statistics: RowStatistics | None,
    groups: Tensor | None,
    plan: Plan,
    deterministic: bool = False,
    query_sums: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of ``q``, ``k_cmp`` and ``v_cmp``. The last two may be in float32.

    With ``query_sums`` that of ``q`` is added to these, and is None.
    ``statistics`` are None if there is no compressed token; a few are overwritten.
    Rows of no block are not written, see :func:`nsa.fused.compression.clear_unused`.
    """
    form = plan.compressed_form
    if statistics is None:
        return torch.zeros_like(q), torch.zeros_like(k_cmp), torch.zeros_like(v_cmp)
    _correct_few_keys(dout, q, k_cmp, v_cmp, statistics, plan)
    if query_sums is not None:
        dk, dv = _unfolded_backward(
            dout, q, k_cmp, v_cmp, statistics, query_sums, plan, deterministic
        )
        return None, dk, dv
    if form is CompressedForm.LISTED:
        assert groups is not None
        lists = compressed_lists(groups, plan)
        k_rows, v_rows = plan.compressed.pack(k_cmp), plan.compressed.pack(v_cmp)
        q_rows = plan.align_queries(q)
        mask = _compressed_mask(q_rows, plan)
        dq, dk, dv = sparse_backward(
            dout, q_rows, k_rows, v_rows, statistics, lists, mask, plan,
            deterministic=deterministic,
        )  # fmt: skip
        dk, dv = (plan.compressed.unpack(x)[:, : k_cmp.shape[1]] for x in (dk, dv))
        return dq, dk, dv
    if plan.skips_key_tiles:
        return folded_attention_backward(dout, q, k_cmp, v_cmp, statistics, plan, deterministic)
    call = _compressed_call(plan) | dict(deterministic=deterministic)
    return dense_backward(dout, q, k_cmp, v_cmp, statistics, plan, **call)


def _unfolded_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    statistics: RowStatistics,
    query_sums: Tensor,
    plan: Plan,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``k_cmp`` and ``v_cmp`` of a batch; that of ``q`` is added to the sums."""
    call: dict = dict(block_ends=_block_ends(q, plan), deterministic=deterministic)
    if len(q) == 1:
        return add_dense_backward(dout, q, k_cmp, v_cmp, statistics, query_sums, plan, **call)
    found = []
    for entry in range(len(q)):
        one = slice(entry, entry + 1)
        own = RowStatistics(*(by_entry(x, len(q))[entry] for x in statistics))
        found.append(
            add_dense_backward(
                dout[one], q[one], k_cmp[one], v_cmp[one], own, query_sums[one], plan, **call
            )
        )
    dk, dv = (torch.cat(x) for x in zip(*found, strict=True))
    return dk, dv


def _correct_few_keys(
    dout: Tensor, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, statistics: RowStatistics, plan: Plan
):
    """Make ``delta`` exact, in place, for queries that see a few compressed tokens."""
    if plan.few_keys is None:
        return
    statistics_placement, *_ = plan.statistics_placements(q.shape[2], k_cmp.shape[2])
    placement, _ = plan.query_placements(q.shape[2], k_cmp.shape[2])
    assert statistics_placement is not None  # as of all statistics
    kernel_calls.few_key_deltas(
        dout, q, k_cmp, v_cmp, statistics, plan.few_keys,
        scale=plan.config.softmax_scale(q.shape[-1]),
        statistics_placement=statistics_placement, placement=placement,
    )  # fmt: skip


def _compressed_call(plan: Plan) -> dict:
    """Mask and lengths of the dense compressed branch of few compressed tokens, or of all."""
    config = plan.config
    call: dict[str, Any] = dict(causal=False, window_size=(None, None))
    if plan.compressed_form is not CompressedForm.ALL:
        first = covered_tokens(config, config.compressed_visibility) - 1
        call["block_ends"] = (config.compress_stride, first)
    if plan.packed:
        call |= dict(cu_seqlens_q=plan.cu_seqlens, cu_seqlens_k=plan.compressed_bounds)
    return call


def _compressed_mask(q_rows: Tensor, plan: Plan) -> dict:
    """For each row of queries, the row of the first compressed token that it does not see."""
    limit = row_limit(plan.cmp_key_limit, q_rows, plan.compressed.rows)
    return dict(causal=False, key_limit=limit)


def compressed_forward_bytes(sizes: Sizes) -> int:
    """Bytes that the forward allocates in addition to its results: copies."""
    if sizes.form is CompressedForm.BATCH:
        return 0
    return _copies(sizes, queries=2 if sizes.in_order else 1)


def compressed_backward_bytes(sizes: Sizes) -> int:
    """Bytes that the backward allocates: copies, FA4's sums, gradients of queries and keys."""
    if sizes.form is CompressedForm.LISTED:
        return sparse_backward_bytes(
            sizes, sizes.config.cmp_group_size, _key_rows(sizes), copies=True
        )
    if sizes.sums_queries:
        heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        length, keys = sizes.length, sizes.compressed // sizes.batch
        sums = sizes.batch * sums_bytes(heads, kv_heads, dim, length, keys)
        if sizes.deterministic:
            sums += more_segments_bytes(kv_heads, dim, length, keys)
        # Those of queries are there already.
        return 2 * sizes.key_cmp + sums - query_sums_bytes(sizes.batch, heads, dim, length)
    copies = _copies(sizes, queries=3 if sizes.token_mode else 1)
    # Each query head may have its own keys. This adds their gradients, and the sum in float32.
    folded = sizes.form is CompressedForm.PACKED and not sizes.in_order
    query = sizes.query_folded if folded else sizes.query
    gradients = query + 4 * sizes.key_cmp + (0 if sizes.packed else copies)
    return copies + gradients + compressed_sums_bytes(sizes)


def compressed_sums_bytes(sizes: Sizes) -> int:
    """Bytes of FA4's sums where groups are not listed."""
    heads, kv_heads, dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    keys, stride = sizes.compressed // sizes.batch, sizes.config.compress_stride
    if sizes.form is CompressedForm.PACKED and sizes.skips_key_tiles:
        assert sizes.sequences is not None
        rows = num_folded_rows(sizes.length, sizes.sequences, sizes.config, whole=sizes.whole)
        return sums_bytes(heads * stride, kv_heads, dim, rows, keys, sizes.sequences)
    if sizes.skips_key_tiles:
        # One entry after another. Each query head has the keys to itself.
        return heads * sums_bytes(stride, 1, dim, -(-sizes.length // stride), keys)
    return sizes.batch * sums_bytes(heads, kv_heads, dim, sizes.length, keys, sizes.sequences)


def _copies(sizes: Sizes, queries: int) -> int:
    """Bytes of ``queries`` folded or unfolded tensors of queries, and of copies of keys."""
    if sizes.form is CompressedForm.LISTED:
        return (queries - 1) * sizes.query_copy + 2 * sizes.key_bytes(_key_rows(sizes))
    if sizes.form is CompressedForm.PACKED:
        return queries * sizes.query_folded if sizes.skips_key_tiles else 0
    if sizes.form is CompressedForm.BATCH:
        # A folded batch copies the keys for each query head. Otherwise keys are few.
        return 2 * sizes.group * sizes.key_cmp
    return 0


def _key_rows(sizes: Sizes) -> int:
    """Rows of the compressed tokens of all entries, aligned to key blocks."""
    block = choose_key_block(sizes.config.cmp_group_size, sizes.config, sizes.head_dim)
    blocks = -(-sizes.compressed // block)
    return (blocks + (sizes.sequences or 0)) * block
