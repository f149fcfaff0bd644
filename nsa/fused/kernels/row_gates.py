"""The gated sum of the branches (paper Eq. 5) of rows in a wgmma accumulator.

The last kernel of token mode's forward has the selected branch's output in registers. It adds the
others there, which saves writing the output, where no backward needs it, and reading it and q. The
forms of the gates are those of :mod:`nsa.fused.kernels.gated_sum`.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from nsa.fused.hardware import LOG2_E, QUAD
from nsa.fused.kernels.forward_tiles import GROUP_COLUMNS, row_words
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    VECTOR,
    copy_vector,
    dot,
    fake_flat,
    load_shared,
    load_vector,
    store_vector,
)

# Elements by which rows of the weights are apart, modulo 64: two then use all banks.
_PAD = 32


@mlir_namedtuple
class SumTensors(NamedTuple):
    """The other branches, the gates or the weight, and the sum, with its elements a token."""

    o_cmp: cute.Tensor
    o_win: cute.Tensor
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    out: cute.Tensor
    out_stride: Int64


def fake_sum_tensors(dtype: type[cutlass.Numeric], form: str) -> SumTensors:
    """Stand-ins, to compile with."""
    gates = fake_flat(dtype) if form == "gates" else None
    weight = fake_flat(dtype) if form == "weight" else None
    branches = (fake_flat(dtype), fake_flat(dtype))
    return SumTensors(*branches, gates, weight, fake_flat(dtype), Int64(1))


class RowGates:
    """Gates of one of the forms for the query heads of a KV head, of ``head_dim`` channels."""

    def __init__(self, form: str, head_dim: int, group: int):
        self.form = form
        self.head_dim = head_dim
        self.group = group
        self.pitch = 3 * head_dim + (-3 * head_dim + _PAD) % 64

    @property
    def shared_elements(self) -> int:
        """Elements of shared memory: the weights of the heads."""
        return self.group * self.pitch if self.form == "weight" else 0

    @cute.jit
    def load_weight(
        self,
        mWeight: cute.Tensor,
        sWeight: cute.Tensor,
        kv_head: Int32,
        thread: Int32,
        threads: cutlass.Constexpr[int],
    ):
        """Start to copy the weights to ``sWeight (group, pitch)``; part of a cp.async group."""
        vectors = const_expr(3 * self.head_dim // VECTOR)
        for i in cutlass.range(thread, self.group * vectors, threads, unroll=1):
            start = Int64(kv_head) * (self.group * 3 * self.head_dim) + i * VECTOR
            target = sWeight[i // vectors, None].iterator + cute.assume(
                i % vectors * VECTOR, divby=VECTOR
            )
            layout = cute.make_layout(((VECTOR, 1),))
            copy_vector(mWeight, start, cute.make_tensor(target, layout), Boolean(True))

    @cute.jit
    def load(
        self,
        tensors: SumTensors,
        sQ: cute.Tensor,
        sWeight: cute.Tensor | None,
        row: Int32,
        head: Int32,
        token_head: Int64,
        lane: Int32,
    ) -> tuple[Float32, Float32, Float32]:
        """The gates of a row, in each thread of its quad.

        Args:
            sQ: queries, ``(rows, head_dim)``.
            row: the row there.
            head: its head among those of the KV head.
            token_head: its row of the gates, ``(T, H)``.
            lane: which thread of the quad this is.
        """
        if const_expr(self.form == "mean"):
            return (Float32(1.0 / 3.0),) * 3
        if const_expr(self.form == "gates"):
            return tuple(tensors.gates[token_head * 3 + i].to(Float32) for i in range(3))
        logits = [Float32(0.0) for _ in range(3)]
        sRow = sWeight[head, None]
        for group in cutlass.range_constexpr(self.head_dim // GROUP_COLUMNS):
            sPart = cute.local_tile(sQ, (1, VECTOR), (row, group * QUAD + lane))
            q = load_shared(cute.group_modes(sPart, 0, 2))
            for i in cutlass.range_constexpr(3):
                column = i * self.head_dim + group * GROUP_COLUMNS + lane * VECTOR
                start = sRow.iterator + cute.assume(column, divby=VECTOR)
                weight = load_shared(cute.make_tensor(start, cute.make_layout((VECTOR, 1))))
                logits[i] = logits[i] + dot(q, weight)
        logits = [cute.arch.warp_reduction_sum(x, threads_in_group=QUAD) for x in logits]
        # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
        return tuple(
            cute.arch.rcp_approx(1.0 + cute.math.exp2(x * -LOG2_E, fastmath=True)) for x in logits
        )

    @cute.jit
    def load_branches(
        self, tensors: SumTensors, offset: Int64, groups: cutlass.Constexpr[int]
    ) -> list:
        """This thread's vectors of a row of the other branches, which begins at ``offset``."""
        return [
            tuple(load_vector(x, offset + group * GROUP_COLUMNS) for x in tensors[:2])
            for group in range(groups)
        ]

    @cute.jit
    def store(
        self,
        sums: cute.Tensor,
        r: cutlass.Constexpr[int],
        gates: tuple[Float32, Float32, Float32],
        branches: list,
        mOut: cute.Tensor,
        offset: Int64,
    ):
        """Store the gated sum of row ``r`` of the two that a thread has in an accumulator."""
        for group in cutlass.range_constexpr(len(branches)):
            o_cmp, o_win = branches[group]
            o_slc = cute.make_rmem_tensor(VECTOR, Float32)
            for j, word in enumerate(row_words(r, group)):
                for e in cutlass.range_constexpr(2):
                    o_slc[2 * j + e] = sums[2 * word + e]
            out = o_cmp.load().to(Float32) * gates[0] + o_slc.load() * gates[1]
            out = out + o_win.load().to(Float32) * gates[2]
            store_vector(out, mOut, offset + group * GROUP_COLUMNS)
