"""The dense causal compressed branch on FA4, with folded queries.

Queries that see the same compressed blocks are folded into heads. The complete-block rule is then
the plain causal mask, and FA4 skips tiles in forward and backward. Row ``r`` of a sequence holds
the ``d`` queries that see the blocks ``0 .. r``.

Packed queries are gathered (:class:`nsa.fused.row_layouts.FoldedQueries`), because their sequences
start anywhere. In tile mode their results and gradients stay folded. In the backward of a batch,
all sequences have their rows at the same positions, so folding is a view. The ``d`` queries of a
row are FA4's heads, and query heads are its batch. Each query head has its own copy of the
compressed keys and values. The last queries, which see all blocks, are a separate call, and so are
the first ones if they begin within a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.config import NSAConfig
from nsa.fused import fa4
from nsa.fused.attention.fa4_calls import by_entry
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.plan import Plan
from nsa.precision import accumulation_dtype


def folded_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Attention of packed ``q (1, T, H, D)`` over visible ``k_cmp`` and ``v_cmp (1, M, H_kv, D)``.

    Returns:
        ``out`` like ``q``, 0 for queries that see no block; unless ``plan.in_order`` it is
        ``(1, rows, H_kv * d * G, D)`` as in ``FoldedQueries.placement``. And the log-sum-exp,
        ``(H, T)`` or folded ``(rows, H_kv * d * G)``; undefined for queries that see no block.
    """
    scale, num_kv_heads = plan.config.softmax_scale(q.shape[-1]), k_cmp.shape[2]
    folded = plan.folded.fold(q, num_kv_heads)
    lse = q.new_empty(folded.shape[1:3], dtype=accumulation_dtype(q.dtype))
    out, _ = fa4.dense_forward(
        folded[0], k_cmp[0], v_cmp[0], scale=scale, lse=lse.mT, **_packed_call(plan)
    )
    out = plan.folded_queries(out[None], num_kv_heads)
    return out, plan.folded.unfold_lse(lse, num_kv_heads) if plan.in_order else lse


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

    def view(self, x: Tensor, entry: int) -> Tensor:
        """One entry of ``(B, T, H, D)`` as FA4 takes it: ``(H, rows, d, D)``."""
        batch, token, head, channel = x.stride()
        return x.as_strided(
            (x.shape[2], self.full, self.size, x.shape[3]),
            (head, self.size * token, token, channel),
            x.storage_offset() + entry * batch + self.start * token,
        )

    def per_head(self, x: Tensor, entry: int, group: int) -> Tensor:
        """One entry of ``x (B, M, H_kv, D)`` as FA4 takes it, ``(H_kv * group, keys, 1, D)``: a
        copy for each head of a group."""
        batch, token, head, channel = x.stride()
        num_kv_heads, head_dim = x.shape[2:]
        shape = (num_kv_heads, group, self.keys, head_dim)
        offset = x.storage_offset() + entry * batch
        repeated = x.as_strided(shape, (head, 0, token, channel), offset)
        # A copy even for a group of one, because FA4 compiles other kernels for stride 0.
        repeated = repeated.clone(memory_format=torch.contiguous_format)
        return repeated.view(num_kv_heads * group, self.keys, 1, head_dim)

    def lse(self, x: Tensor, entry: int) -> Tensor:
        """The full rows in an entry of ``(B, H, T)`` as FA4 takes them: ``(H, d, rows)``."""
        batch, head, token = x.stride()
        return x.as_strided(
            (x.shape[1], self.size, self.full),
            (head, token, self.size * token),
            x.storage_offset() + entry * batch + self.start * token,
        )


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
        by_head = plan.folded.fold_statistics(statistics, num_kv_heads)
    else:
        by_head = RowStatistics(*(x.mT for x in statistics))
    folded = plan.folded.fold(q, num_kv_heads)
    call = _packed_call(plan) | dict(deterministic=deterministic)
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
