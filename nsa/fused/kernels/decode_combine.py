"""The end of a decoding step: parts of all branches summed, gated and added.

A CTA has one token and query head. Its warps share the parts among them, each lane some columns.
The first CTA also stores the new lengths: no kernel of the step reads them after the append.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.decode_inputs import NO_REFERENCE, DecodeShape, Parts, Schedule
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_tiles import power_of_two, unit_parts
from nsa.fused.kernels.gates import FORMS
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat, flat_rows

_WARPS = 4
_THREADS = _WARPS * WARP
# Parts that a warp loads together.
_LOADS = 4


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Parts of the compressed branch and of the others, gates, and results."""

    cu_seqlens: cute.Tensor | None
    ends: cute.Tensor
    tiles: cute.Tensor
    cmp_out: cute.Tensor
    cmp_reference: cute.Tensor
    cmp_total: cute.Tensor
    out: cute.Tensor
    reference: cute.Tensor
    total: cute.Tensor
    q: cute.Tensor | None
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    result: cute.Tensor
    lengths: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    group: Int32
    unit_tokens: Int32
    token_blocks: Int32
    splits: Int32
    q_stride: Int64


class DecodeCombine:
    """``form`` of the gates is one of ``FORMS``."""

    def __init__(self, head_dim: int, head_dim_v: int, form: str):
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.form = form

    @cute.jit
    def __call__(self, tensors: _Tensors, sizes: _Sizes, stream):
        self.kernel(tensors, sizes).launch(
            grid=[sizes.batch * sizes.tokens * sizes.kv_heads * sizes.group, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        if bidx == 0:
            for b in cutlass.range(tidx, sizes.batch, _THREADS, unroll=1):
                tensors.lengths[b] = tensors.ends[b]
        heads = sizes.kv_heads * sizes.group
        head, token = bidx % heads, bidx // heads
        kv_head, in_group = head // sizes.group, head % sizes.group
        sequence, token = token // sizes.tokens, token % sizes.tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout((_WARPS, self.head_dim_v), stride=(self.head_dim_v, 1))
        sOut = smem.allocate_tensor(Float32, layout, 16)
        if token < new:
            row = Int64(row0 + token)
            gates = self._gates(tensors, sizes, row, head, lane)
            acc = cute.make_rmem_tensor(self.head_dim_v // WARP, Float32)
            acc.fill(0.0)

            unit = kv_head * sizes.token_blocks + token // sizes.unit_tokens
            sequence_units = sizes.kv_heads * sizes.token_blocks
            slot, count = unit_parts(tensors.tiles, sequence, unit, sequence_units)
            rows = sizes.unit_tokens * sizes.group
            first = Int64(slot) * rows + token % sizes.unit_tokens * sizes.group + in_group
            parts = tensors.cmp_out, tensors.cmp_reference, tensors.cmp_total
            self._add_branch(acc, parts, first, Int64(rows), count, gates[0], warp, lane)
            parts = tensors.out, tensors.reference, tensors.total
            for branch in cutlass.range_constexpr(2):
                part = (row * sizes.kv_heads + kv_head) * sizes.splits * 2 + branch
                first = part * sizes.group + in_group
                stride = Int64(2 * sizes.group)
                self._add_branch(
                    acc, parts, first, stride, sizes.splits, gates[branch + 1], warp, lane
                )

            for j in cutlass.range_constexpr(self.head_dim_v // WARP):
                sOut[warp, j * WARP + lane] = acc[j]
            cute.arch.barrier()
            for column in cutlass.range(tidx, self.head_dim_v, _THREADS, unroll=1):
                value = sOut[0, column]
                for w in cutlass.range_constexpr(1, _WARPS):
                    value += sOut[w, column]
                place = (row * heads + head) * self.head_dim_v + column
                tensors.result[place] = value.to(tensors.result.element_type)

    @cute.jit
    def _gates(
        self, tensors: _Tensors, sizes: _Sizes, row: Int64, head: Int32, lane: Int32
    ) -> tuple[Float32, Float32, Float32]:
        gates = [Float32(1.0 / 3.0)] * 3
        if const_expr(self.form == "gates"):
            place = (row * (sizes.kv_heads * sizes.group) + head) * 3
            gates = [tensors.gates[place + i].to(Float32) for i in range(3)]
        if const_expr(self.form == "weight"):
            logits = [Float32(0.0)] * 3
            for j in cutlass.range_constexpr(self.head_dim // WARP):
                column = j * WARP + lane
                place = row * sizes.q_stride + head * self.head_dim + column
                q = tensors.q[place].to(Float32)
                for i in cutlass.range_constexpr(3):
                    weight = tensors.weight[(head * 3 + i) * self.head_dim + column]
                    logits[i] = logits[i] + q * weight.to(Float32)
            for i in cutlass.range_constexpr(3):
                # exp2 overflows to infinity where the gate is 0.
                logit = cute.arch.warp_reduction_sum(logits[i])
                power = cute.math.exp2(logit * -LOG2_E, fastmath=True)
                gates[i] = cute.arch.rcp_approx(1.0 + power)
        return gates[0], gates[1], gates[2]

    @cute.jit
    def _add_branch(
        self, acc: cute.Tensor, parts, first: Int64, stride: Int64, count: Int32, gate: Float32,
        warp: Int32, lane: Int32,
    ):  # fmt: skip
        """Add this warp's parts of a branch; rows of parts are ``stride`` apart from ``first``."""
        mO, mReference, mTotal = parts
        largest = Int32(NO_REFERENCE)
        for i in cutlass.range(lane, count, WARP, unroll=1):
            largest = cutlass.max(largest, mReference[first + i * stride])
        largest = cute.arch.warp_redux_sync(largest, "max")
        total = Float32(0.0)
        for i in cutlass.range(lane, count, WARP, unroll=1):
            place = first + i * stride
            total += mTotal[place] * power_of_two(mReference[place] - largest)
        total = cute.arch.warp_reduction_sum(total)
        # A branch in which the token sees no key has no part with a reference.
        if largest != NO_REFERENCE:
            share = gate / total
            for i in cutlass.range(warp, count, _WARPS, unroll=_LOADS):
                place = first + i * stride
                reference = mReference[place]
                factor = share * power_of_two(reference - largest)
                for j in cutlass.range_constexpr(self.head_dim_v // WARP):
                    value = mO[place * self.head_dim_v + j * WARP + lane]
                    # The output of a part without keys was not written.
                    value = value * factor if reference != NO_REFERENCE else Float32(0.0)
                    acc[j] = acc[j] + value


@kept
def compile_decode_combine(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, form: str, packed: bool
) -> Callable:
    """The compiled kernel of these forms."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def parts():
        return fake_flat(Float32, alignment=4), integers(), fake_flat(Float32, alignment=4)

    vector = CUTE_DTYPES[dtype]
    return compile_kernel(
        DecodeCombine(head_dim, head_dim_v, form),
        _Tensors(
            *(integers(packed), integers(), integers()),
            *(*parts(), *parts()),
            fake_flat(vector if form == "weight" else None),
            fake_flat(vector if form == "gates" else None),
            fake_flat(vector if form == "weight" else None),
            *(fake_flat(vector), integers()),
        ),
        _Sizes(*(Int32(1) for _ in range(7)), Int64(1)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [(dtype, 128, 128, form, False) for dtype in (torch.bfloat16,) for form in FORMS]
    forms += [(torch.float16, dim, dim, "weight", True) for dim in (64, 96, 256)]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-combine-{name}", functools.partial(compile_decode_combine, *form)


def decode_combine(
    compressed: Parts,
    others: Parts,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    shape: DecodeShape,
    splits: int,
    lengths: Tensor,
) -> Tensor:
    """See :func:`nsa.fused.decode_calls.decode_combine`."""
    head_dim, head_dim_v = q.shape[-1], compressed.out.shape[-1]
    form = "gates" if gates is not None else "weight" if weight is not None else "mean"
    out = q.new_empty((*q.shape[:2], head_dim_v))
    flat_q, q_stride = flat_rows(q) if form == "weight" else (None, 0)
    compile_decode_combine(q.dtype, head_dim, head_dim_v, form, cu_seqlens is not None)(
        _Tensors(
            *(cu_seqlens, schedule.ends, schedule.tiles),
            *(x.view(-1) for x in (*compressed, *others)),
            *(flat_q, flat(gates), flat(weight), out.view(-1), lengths),
        ),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.group),
            *(shape.unit_tokens, shape.token_blocks, splits, q_stride),
        ),
    )
    return out
