"""The dense causal compressed branch on FA4, with folded queries.

Queries that see the same compressed blocks are folded into heads. The complete-block rule is then
the plain causal mask, and FA4 skips tiles in forward and backward. Row ``r`` of a sequence holds
the ``d`` queries that see the blocks ``0 .. r``.

In a batch, all sequences have their rows at the same positions, so folding is a view. The ``d``
queries of a row are FA4's heads, and query heads are its batch. Each query head has its own copy of
the compressed keys and values; if these are long, the heads of a group share theirs, in one call
per KV head. The last queries, which see all blocks, are a separate call, and so are the first ones
if they begin within a row. Packed queries are gathered
(:class:`nsa.fused.row_layouts.FoldedQueries`), because their sequences start anywhere. In tile mode
their outputs and gradients stay folded.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.config import NSAConfig
from nsa.fused import fa4
from nsa.fused.attention.fa4_calls import by_entry, new_lse
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.plan import Plan
from nsa.fused.streams import SideStream
from nsa.precision import accumulation_dtype

ALL = slice(None)
"""All heads."""

SHARED_KEY_BYTES = 16 << 20
"""Bytes of keys and values of all query heads above which the heads of a group share in forward.

FA4 works on as many heads at a time as it expects L2 to hold, and L2 holds one copy better than one
per head. At 256K tokens and 32 heads the branch takes 15.1 ms instead of 15.7, at 1M 217 instead of
221. A forward of the third quarter of 256K tokens takes 9.0 ms instead of 9.7, of 128K tokens 12.5
instead of 13.1. For shorter sequences one call was faster.
"""


MANY_KEYS = 1024
"""Compressed keys from which the few queries beside the full rows run on a second stream.

At 64K tokens of 64 heads they take some 0.03 ms, on 8 of 132 processors, and the host 0.02 ms more
for the stream.
"""


def folded_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention of ``q (B, T, H, D)`` over visible ``k_cmp`` and ``v_cmp (B, M, H_kv, D)``.

    Returns:
        ``out`` like ``q``, 0 for queries that see no block; unless ``plan.in_order`` it is
        ``(1, rows, H_kv * d * G, D)`` as in ``FoldedQueries.placement``. And the log-sum-exp, of
        a batch ``(H, B * T)``, undefined for queries that see no block; else that of folded rows,
        ``(rows, H_kv * d * G)``.
    """
    if plan.packed:
        return _packed_forward(q, k_cmp, v_cmp, plan)
    scale, rows = plan.config.softmax_scale(q.shape[-1]), _Rows.of(q, plan)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[:, : rows.lead].zero_()
    (batch, _, num_heads), num_kv_heads = q.shape[:3], k_cmp.shape[2]
    lse = new_lse(q)
    lse_rows = by_entry(lse, batch)
    parts = list(rows.parts())
    many_keys = rows.blocks >= MANY_KEYS and rows.full > 0 and len(parts) > 0
    beside = SideStream(q, always=many_keys)
    if rows.full:
        group = num_heads // num_kv_heads
        key_bytes = num_heads * rows.keys * (k_cmp.shape[-1] + v_cmp.shape[-1]) * k_cmp.itemsize
        # With one KV head a shared copy takes as many calls.
        shared = group > 1 and (num_kv_heads == 1 or key_bytes > SHARED_KEY_BYTES)
        step = 1 if shared else num_kv_heads
        for entry, first in itertools.product(range(batch), range(0, num_kv_heads, step)):
            heads = slice(first * group, (first + step) * group)
            kv_heads = slice(first, first + step)
            fa4.dense_forward(
                rows.view(q, entry, heads),
                rows.per_head(k_cmp, entry, group, kv_heads, shared),
                rows.per_head(v_cmp, entry, group, kv_heads, shared),
                scale=scale,
                causal=True,
                window_size=(None, None),
                out=rows.view(out, entry, heads),
                lse=rows.lse(lse_rows, entry, heads),
            )
    with beside:
        for part in parts:
            fa4.dense_forward(
                q[:, part.queries],
                k_cmp[:, : part.keys],
                v_cmp[:, : part.keys],
                scale=scale,
                causal=False,
                window_size=(None, None),
                out=out[:, part.queries],
                lse=lse_rows[..., part.queries],
            )
    return out, lse


def folded_attention_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    statistics: RowStatistics,
    plan: Plan,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k_cmp``, ``v_cmp``. ``dout`` and ``dq`` have the layout of ``out``, and
    statistics that of the log-sum-exp."""
    if plan.packed:
        return _packed_backward(dout, q, k_cmp, v_cmp, statistics, plan, deterministic)
    scale, rows = plan.config.softmax_scale(q.shape[-1]), _Rows.of(q, plan)
    num_heads, num_kv_heads = q.shape[2], k_cmp.shape[2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dq[:, : rows.lead].zero_()
    by_rows = [by_entry(x, len(q)) for x in statistics]
    # The calls below add to these.
    dtype = accumulation_dtype(q.dtype)
    dk_cmp, dv_cmp = k_cmp.new_zeros(2, *k_cmp.shape, dtype=dtype)
    if rows.full:
        group = num_heads // num_kv_heads
        for entry in range(len(q)):
            _, *grads = fa4.dense_backward(
                rows.view(dout, entry),
                rows.view(q, entry),
                rows.per_head(k_cmp, entry, group),
                rows.per_head(v_cmp, entry, group),
                RowStatistics(*(rows.lse(x, entry) for x in by_rows)),
                scale=scale,
                causal=True,
                window_size=(None, None),
                dq=rows.view(dq, entry),
                deterministic=deterministic,
            )
            for total, grad in zip((dk_cmp, dv_cmp), grads, strict=True):
                grouped = grad.view(num_kv_heads, -1, *grad.shape[1:])  # (H_kv, G, rows, 1, D)
                target = total[entry, : rows.keys].transpose(0, 1)
                torch.sum(grouped, (1, 3), dtype=dtype, out=target)
    for part in rows.parts():
        _, dk, dv = fa4.dense_backward(
            dout[:, part.queries],
            q[:, part.queries],
            k_cmp[:, : part.keys],
            v_cmp[:, : part.keys],
            RowStatistics(*(x[..., part.queries] for x in by_rows)),
            scale=scale,
            causal=False,
            window_size=(None, None),
            dq=dq[:, part.queries],
            deterministic=deterministic,
        )
        # Not +=, which would also copy the slice to itself.
        dk_cmp[:, : part.keys].add_(dk)
        dv_cmp[:, : part.keys].add_(dv)
    return dq, dk_cmp, dv_cmp


class _Part(NamedTuple):
    """Queries that see the same ``keys`` first blocks."""

    queries: slice
    keys: int


class _Rows:
    """The rows of one sequence as views: first ``lead`` queries that see no block, then ``head``
    queries that end a row, ``full`` rows of ``d`` queries, and ``tail`` queries that see all.

    Args:
        length: number of queries.
        first: position of the first query.
        blocks: compressed blocks of the sequence.
        config: block sizes and rules.
    """

    def __init__(self, length: int, first: int, blocks: int, config: NSAConfig):
        self.size, self.blocks = config.compress_stride, blocks
        # Position of the first query of row 0, counted from the first query.
        start = covered_tokens(config, config.compressed_visibility) - 1 - first
        self.lead = min(max(start, 0), length)
        passed = max(-start, 0)
        self.head = min(-passed % self.size, length - self.lead)
        # Number of the first full row.
        self.row = -(-passed // self.size)
        queries = length - self.lead - self.head
        # Complete blocks: only the tail sees the last block, if there is a tail. Started blocks:
        # all rows after the last block see the same.
        self.full = min(queries // self.size, max(0, blocks - self.row))
        self.tail = queries - self.full * self.size

    @classmethod
    def of(cls, q: Tensor, plan: Plan) -> "_Rows":
        """Those of each entry of ``q (B, T, H, D)``."""
        length, geometry = q.shape[1], plan.geometry
        first = geometry.keys.total - length
        return cls(length, first, geometry.compressed.total, plan.config)

    @property
    def start(self) -> int:
        """The first query of the full rows."""
        return self.lead + self.head

    @property
    def keys(self) -> int:
        """Blocks that some query of the full rows sees."""
        return self.row + self.full

    def parts(self) -> Iterator[_Part]:
        """The head and the tail, without those that have no queries."""
        full = self.full * self.size
        if self.head:
            keys = min(self.row, self.blocks)
            yield _Part(slice(self.lead, self.start), keys)
        if self.tail:
            end = self.start + full
            yield _Part(slice(end, end + self.tail), self.blocks)

    # Each method is one operation, to save host time.

    def view(self, x: Tensor, entry: int, heads: slice = ALL) -> Tensor:
        """One entry of ``(B, T, H, D)``, or some heads, in FA4's form ``(H, rows, d, D)``."""
        batch, token, head, channel = x.stride()
        start, stop, _ = heads.indices(x.shape[2])
        return x.as_strided(
            (stop - start, self.full, self.size, x.shape[3]),
            (head, self.size * token, token, channel),
            x.storage_offset() + entry * batch + self.start * token + start * head,
        )

    def per_head(
        self, x: Tensor, entry: int, group: int, kv_heads: slice = ALL, shared: bool = False
    ) -> Tensor:
        """One entry of ``x (B, M, H_kv, D)`` in FA4's form ``(H_kv * group, keys, 1, D)``.

        A copy for each head of a group; with ``shared``, a view of the only KV head.
        """
        batch, token, head, channel = x.stride()
        start, stop, _ = kv_heads.indices(x.shape[2])
        num_kv_heads, head_dim = stop - start, x.shape[3]
        offset = x.storage_offset() + entry * batch + start * head
        if shared:
            shape, strides = (group, self.keys, 1, head_dim), (0, token, 0, channel)
            return x.as_strided(shape, strides, offset)
        shape = (num_kv_heads, group, self.keys, head_dim)
        repeated = x.as_strided(shape, (head, 0, token, channel), offset)
        # A copy even for a group of one, because FA4 compiles other kernels for stride 0.
        repeated = repeated.clone(memory_format=torch.contiguous_format)
        return repeated.view(num_kv_heads * group, self.keys, 1, head_dim)

    def lse(self, x: Tensor, entry: int, heads: slice = ALL) -> Tensor:
        """The full rows in an entry of ``(B, H, T)``, in FA4's form ``(H, d, rows)``."""
        batch, head, token = x.stride()
        start, stop, _ = heads.indices(x.shape[1])
        return x.as_strided(
            (stop - start, self.size, self.full),
            (head, token, self.size * token),
            x.storage_offset() + entry * batch + start * head + self.start * token,
        )


def _packed_forward(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    scale, num_kv_heads = plan.config.softmax_scale(q.shape[-1]), k_cmp.shape[2]
    folded = plan.folded.fold(q, num_kv_heads)
    lse = q.new_empty(folded.shape[1:3], dtype=accumulation_dtype(q.dtype))
    out, _ = fa4.dense_forward(
        folded[0], k_cmp[0], v_cmp[0], scale=scale, lse=lse.mT, **_packed_call(plan)
    )
    return plan.folded_queries(out[None], num_kv_heads), lse


def _packed_backward(
    dout: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    statistics: RowStatistics,
    plan: Plan,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, num_kv_heads = plan.config.softmax_scale(q.shape[-1]), k_cmp.shape[2]
    if plan.in_order:
        dout = plan.folded.fold(dout, num_kv_heads)
    folded = plan.folded.fold(q, num_kv_heads)
    call = _packed_call(plan) | dict(deterministic=deterministic)
    by_head = RowStatistics(*(x.mT for x in statistics))
    dq, dk, dv = fa4.dense_backward(
        dout[0], folded[0], k_cmp[0], v_cmp[0], by_head, scale=scale, **call
    )
    return plan.folded_queries(dq[None], num_kv_heads), dk[None], dv[None]


def _packed_call(plan: Plan) -> dict:
    started, extra = plan.folded.started, plan.folded.extra
    return dict(
        causal=not started,
        # There are N_cmp + extra rows and N_cmp keys, aligned at the end. Row r sees keys up to r.
        window_size=(None, extra) if started else (None, None),
        cu_seqlens_q=plan.folded.bounds,
        cu_seqlens_k=plan.compressed_bounds,
    )
