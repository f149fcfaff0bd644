"""Calls of FlashAttention-4 for the tensors of a plan, and the bytes that they allocate."""

import torch
from torch import Tensor

from nsa.blocks import num_query_tiles
from nsa.fused import fa4, kernel_calls
from nsa.fused.block_lists import (
    BOUNDED_BYTES,
    goes_by_query,
    split_key_blocks,
    transpose_lists,
)
from nsa.fused.fa4_call import sums_bytes
from nsa.fused.fa4_variants import choose_key_block
from nsa.fused.fixed_order import has_own_sums
from nsa.fused.kernel_inputs import BlockLists, Pair, RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.precision import accumulation_dtype


def dense_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, **call) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp ``(H, B * T)``."""
    scale, lse = plan.config.softmax_scale(q.shape[-1]), new_lse(q)
    if not plan.packed:
        out, _ = fa4.dense_forward(q, k, v, scale=scale, lse=by_entry(lse, len(q)), **call)
        return out, lse
    out, _ = fa4.dense_forward(q[0], k[0], v[0], scale=scale, lse=lse, **call)
    return out[None], lse


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, statistics: RowStatistics, plan: Plan, **call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; statistics are ``(H, B * T)`` or by kind of key."""
    scale = plan.config.softmax_scale(q.shape[-1])
    if not plan.packed:
        statistics = _statistics_by_entry(statistics, len(q))
        return fa4.dense_backward(dout, q, k, v, statistics, scale=scale, **call)
    dq, dk, dv = fa4.dense_backward(dout[0], q[0], k[0], v[0], statistics, scale=scale, **call)
    return dq[None], dk[None], dv[None]


def add_dense_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    query_sums: Tensor,
    plan: Plan,
    **call,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``k`` and ``v`` of a batch; that of ``q`` is added to ``query_sums``."""
    statistics = _statistics_by_entry(statistics, len(q))
    call["scale"] = plan.config.softmax_scale(q.shape[-1])
    return fa4.add_dense_backward(dout, q, k, v, statistics, query_sums, **call)


def new_lse(q: Tensor) -> Tensor:
    """A log-sum-exp for ``q (B, T, H, D)``, to be written: ``(H, B * T)``."""
    batch, length, heads, _ = q.shape
    return q.new_empty(heads, batch * length, dtype=accumulation_dtype(q.dtype))


def by_entry(x: Tensor, batch: int) -> Tensor:
    """``(H, B * T)`` as ``(B, H, T)``."""
    return x[None] if batch == 1 else x.unflatten(1, (batch, -1)).transpose(0, 1)


def _statistics_by_entry(statistics: RowStatistics, batch: int) -> RowStatistics:
    if statistics.delta.ndim == 4:
        return statistics  # by kind of key
    return RowStatistics(*(by_entry(x, batch) for x in statistics))


def sparse_forward(
    q_rows: Tensor, k_rows: Tensor, v_rows: Tensor, lists: BlockLists, mask: dict, plan: Plan
) -> tuple[Tensor, Tensor]:
    scale = plan.config.softmax_scale(q_rows.shape[-1])
    out, lse = fa4.sparse_forward(q_rows, k_rows, v_rows, lists, scale=scale, **mask)
    return plan.query_rows(out), lse


def sparse_backward(
    dout: Tensor,
    q_rows: Tensor,
    k_rows: Tensor,
    v_rows: Tensor,
    statistics: RowStatistics,
    lists: BlockLists,
    mask: dict,
    plan: Plan,
    *,
    deterministic: bool,
    sums: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, and of ``k`` and ``v`` in aligned rows, unless added to ``sums``."""
    scale = plan.config.softmax_scale(q_rows.shape[-1])
    if plan.in_order:
        dout = plan.queries.pack(dout)
    if deterministic:
        # FA4's backward has no fixed order for lists.
        lists = split_key_blocks(lists)
    if goes_by_query(lists.key_block, q_rows.shape[-1]):
        dq, dk, dv = kernel_calls.listed_backward(
            dout, q_rows, k_rows, v_rows, statistics, lists, scale, mask.get("key_limit"),
            deterministic=deterministic, sums=sums,
        )  # fmt: skip
    else:
        transposed = transpose_lists(lists, k_rows.shape[1])
        dq, dk, dv = fa4.sparse_backward(
            dout, q_rows, k_rows, v_rows, statistics, transposed, scale=scale, **mask
        )
    return plan.query_rows(dq), dk, dv


def row_limit(end: Tensor, q_rows: Tensor, keys_per_entry: int) -> Tensor:
    """Limits of keys in all entries, int32 ``(B * rows,)``, from ``end (rows,)`` in one entry."""
    batch = q_rows.shape[1] // len(end)
    if batch == 1:
        return end
    offset = torch.arange(batch, device=end.device)[:, None] * keys_per_entry
    return (end + offset).flatten().int()


def sparse_backward_bytes(sizes: Sizes, block_size: int, num_keys: int, *, copies: bool) -> int:
    """Bytes that :func:`sparse_backward` and its caller allocate: copies, gradients, sums, lists.

    There are ``num_keys`` rows of keys. ``copies`` says whether they are copied.
    """
    keys = sizes.key_bytes(num_keys)
    # Copies of q, keys and values; of dout too, unless it is in rows already.
    total = (2 if sizes.in_order else 1) * sizes.query_copy + (2 * keys if copies else 0)
    total += sizes.query_rows + 2 * keys + sizes.indices
    # The sums are freed before gradients leave their rows.
    unpacked = (sizes.query_copy if sizes.in_order else 0) + (2 * keys if copies else 0)
    return total + max(sparse_sums_bytes(sizes, block_size, num_keys), unpacked)


def sparse_sums_bytes(sizes: Sizes, block_size: int, num_keys: int) -> int:
    """Bytes of sums in float32, and of the lists by key block that FA4 needs."""
    heads, kv_heads, head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
    sums = 2 * num_keys * kv_heads * head_dim * 4
    if sizes.deterministic:
        # Sums of query heads too, then all in the order of the keys; and the order of entries.
        own_sums = has_own_sums(num_keys // 64, heads, head_dim)
        return (sums * (1 + sizes.group) if own_sums else sums * 9 // 4) + 32 * sizes.indices
    if goes_by_query(choose_key_block(block_size, sizes.config, head_dim), head_dim):
        return sums
    sums = sums_bytes(heads, kv_heads, head_dim, sizes.rows, num_keys)
    return sums + _transposed_bytes(sizes, num_keys)


def _transposed_bytes(sizes: Sizes, num_keys: int) -> int:
    """Bytes of lists by key block, each as wide as the longest: at most all tiles of a sequence."""
    rows, tiles = sizes.num_heads * -(-num_keys // 64), sizes.batch * sizes.tiles
    if rows * tiles * 4 > BOUNDED_BYTES:
        tiles = num_query_tiles(min(sizes.longest, sizes.length), sizes.config)
    return rows * tiles * 4
