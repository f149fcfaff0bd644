"""The window branch (paper section 3.3): queries attend the nearest keys.

Shapes as in :mod:`nsa.fused.attention`.
"""

from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import fa4
from nsa.fused.attention.fa4_calls import (
    add_dense_backward,
    by_entry,
    dense_backward,
    dense_forward,
    new_lse,
)
from nsa.fused.fa4_call import sums_bytes
from nsa.fused.kernel_inputs import Pair, RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes


def window_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention over the last ``window_size`` keys, the query's own included."""
    bounds = dict(cu_seqlens_q=plan.cu_seqlens, cu_seqlens_k=plan.cu_seqlens_k)
    return dense_forward(q, k, v, plan, **_window_call(plan), **bounds)


def closing_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    others: Pair,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    out: Tensor | None,
    plan: Plan,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`window_attention` of a batch, and the gated sum of all branches, in one.

    Args:
        q, k, v, plan: of :func:`window_attention`.
        others: outputs of the compressed and of the selected branch.
        gates, gate_proj_weight, out: of :func:`nsa.fused.gating.combine_branches`.
        keep: whether the output of the window is wanted too.

    Returns:
        The sum, the output of the window or None, and its log-sum-exp.
    """
    weight = None if gates is not None else gate_proj_weight
    lse, scale = new_lse(q), plan.config.softmax_scale(q.shape[-1])
    call = dict(scale=scale, keep=keep, out=out, lse=by_entry(lse, len(q)), **_window_call(plan))
    total, o_win, _ = fa4.closing_forward(q, k, v, others, gates, weight, **call)
    return total, o_win, lse


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    plan: Plan,
    deterministic: bool = False,
    query_sums: Tensor | None = None,
    near_block: int | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of ``q``, and of the last tokens of ``k`` and ``v``: those that a query sees.

    With ``query_sums`` that of ``q`` is added to these, and is None. With ``near_block``
    ``statistics`` are by kind of key, see :func:`nsa.fused.fa4.dense_backward`.
    """
    passed = _unseen_keys(q.shape[1], k.shape[1], plan.config, plan.packed)
    if passed:
        k, v = k[:, passed:], v[:, passed:]
    call = _window_call(plan) | dict(deterministic=deterministic, near_block=near_block)
    if query_sums is not None:
        return None, *add_dense_backward(dout, q, k, v, statistics, query_sums, plan, **call)
    call |= dict(cu_seqlens_q=plan.cu_seqlens, cu_seqlens_k=plan.cu_seqlens_k)
    return dense_backward(dout, q, k, v, statistics, plan, **call)


def _window_call(plan: Plan) -> dict:
    reach = _reach(plan.config)
    return dict(
        causal=plan.config.causal,
        window_size=(reach, None if plan.config.causal else reach),
    )


def _reach(config: NSAConfig) -> int:
    """Keys of the window before the query's own."""
    # The kernels add positions to this int32, so it must leave room for them.
    return min(config.window_size - 1, 1 << 30)


def _unseen_keys(queries: int, keys: int, config: NSAConfig, packed: bool) -> int:
    """Keys before the first window of a batch's sequences.

    In backward FA4 has work and memory for each key. The lengths of packed sequences are not read.
    Blocks begin with the keys that are left.
    """
    unseen = 0 if packed else max(0, keys - queries - _reach(config))
    return unseen - unseen % config.select_block_size


def window_backward_bytes(sizes: Sizes) -> int:
    """Bytes that the backward allocates: gradients, and FA4's sums, which may be the former."""
    passed = _unseen_keys(sizes.length, sizes.keys, sizes.config, sizes.packed)
    seen = 2 * sizes.key_bytes(sizes.batch * (sizes.keys - passed))
    query = 0 if sizes.sums_queries else sizes.query
    return query + seen + window_sums_bytes(sizes)


def window_sums_bytes(sizes: Sizes) -> int:
    """Bytes of FA4's sums."""
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    passed = _unseen_keys(sizes.length, sizes.keys, sizes.config, sizes.packed)
    keys = sizes.keys - passed
    sums = sums_bytes(heads, kv_heads, sizes.head_dim, sizes.length, keys, sizes.sequences)
    return sizes.batch * sums
