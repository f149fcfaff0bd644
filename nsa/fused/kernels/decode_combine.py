"""The end of a decoding step: parts of all branches summed, gated and added.

A CTA has one token and query head. Half of its warps have the parts of the compressed branch, the
others those of the other branches; a lane has some columns. The first CTA also stores the new
lengths: no kernel of the step reads them after the append.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.decode_inputs import NO_REFERENCE, DecodeShape, Parts, Schedule, TileLists
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_tiles import (
    PDL,
    power_of_two,
    unit_parts,
    wait_for_previous,
)
from nsa.fused.kernels.gates import FORMS
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat, flat_rows

# Parts that a warp loads together.
_LOADS = 4
# Rows that few warps each are enough for.
_MANY_ROWS = 512


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
    floors: cute.Tensor | None


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
    tile_size: Int32
    tile_slots: Int32
    q_stride: Int64


class DecodeCombine:
    """``form`` of the gates is one of ``FORMS``."""

    def __init__(self, head_dim: int, head_dim_v: int, form: str, warps: int, tile_mode: bool):
        self.tile_mode = tile_mode
        self.warps = warps
        self.threads = WARP * warps
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.form = form

    @cute.jit
    def __call__(self, tensors: _Tensors, sizes: _Sizes, stream):
        self.kernel(tensors, sizes).launch(
            grid=[sizes.batch * sizes.tokens * sizes.kv_heads * sizes.group, 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        heads = sizes.kv_heads * sizes.group
        head, token = bidx % heads, bidx // heads
        kv_head, in_group = head // sizes.group, head % sizes.group
        sequence, token = token // sizes.tokens, token % sizes.tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout((self.warps, self.head_dim_v), stride=(self.head_dim_v, 1))
        sOut = smem.allocate_tensor(Float32, layout, 16)
        if token < new:
            row = Int64(row0 + token)
            acc = cute.make_rmem_tensor(self.head_dim_v // WARP, Float32)
            acc.fill(0.0)
            gates = self._gates(tensors, sizes, row, head, lane)
            half = const_expr(self.warps // 2)
            if warp < half:
                unit = kv_head * sizes.token_blocks + token // sizes.unit_tokens
                sequence_units = sizes.kv_heads * sizes.token_blocks
                slot, count = unit_parts(tensors.tiles, sequence, unit, sequence_units)
                rows = sizes.unit_tokens * sizes.group
                first = Int64(slot) * rows + token % sizes.unit_tokens * sizes.group + in_group
                parts = tensors.cmp_out, tensors.cmp_reference, tensors.cmp_total
                shares = self._shares(parts, first, Int64(rows), count, gates[0], lane)
                self._add_parts(acc, parts, first, Int64(rows), count, shares, shares, warp, lane)
            wait_for_previous()
            if warp >= half:
                # In tile mode each query head has parts of its own.
                index, stride, in_list = Int64(kv_head), Int64(sizes.group), in_group
                index += row * sizes.kv_heads
                if const_expr(self.tile_mode):
                    index, stride, in_list = row * heads + head, Int64(1), Int32(0)
                first = index * sizes.splits * 2 * stride + in_list
                parts = tensors.out, tensors.reference, tensors.total
                selected, window = [
                    self._shares(
                        parts, first + branch * stride, 2 * stride, sizes.splits,
                        gates[branch + 1], lane,
                    )
                    for branch in range(2)
                ]  # fmt: skip
                self._add_parts(
                    acc, parts, first, stride, 2 * sizes.splits, selected, window,
                    warp - half, lane,
                )  # fmt: skip
            for j in cutlass.range_constexpr(self.head_dim_v // WARP):
                sOut[warp, j * WARP + lane] = acc[j]
            cute.arch.barrier()
            for column in cutlass.range(tidx, self.head_dim_v, self.threads, unroll=1):
                value = sOut[0, column]
                for w in cutlass.range_constexpr(1, self.warps):
                    value += sOut[w, column]
                place = (row * heads + head) * self.head_dim_v + column
                tensors.result[place] = value.to(tensors.result.element_type)
        if bidx == 0:
            wait_for_previous()
            for b in cutlass.range(tidx, sizes.batch, self.threads, unroll=1):
                end = tensors.ends[b]
                tensors.lengths[b] = end
                if const_expr(self.tile_mode):
                    # The lists of older tiles are gone.
                    tile = (end - 1) // sizes.tile_size - (sizes.tile_slots - 1)
                    floor = tensors.floors[b]
                    tensors.floors[b] = cutlass.max(floor, tile * sizes.tile_size)

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
    def _shares(
        self, parts, first: Int64, stride: Int64, count: Int32, gate: Float32, lane: Int32
    ) -> tuple[Int32, Float32]:
        """The largest reference of a branch, and what a part with it is multiplied with.

        Rows of parts are ``stride`` apart from ``first``.
        """
        _, mReference, mTotal = parts
        largest, total = Int32(NO_REFERENCE), Float32(0.0)
        for i in cutlass.range(lane, count, WARP, unroll=1):
            reference, part = mReference[first + i * stride], mTotal[first + i * stride]
            higher = cutlass.max(largest, reference)
            total = total * power_of_two(largest - higher)
            total += part * power_of_two(reference - higher)
            largest = higher
        highest = cute.arch.warp_redux_sync(largest, "max")
        total = cute.arch.warp_reduction_sum(total * power_of_two(largest - highest))
        # A branch in which the token sees no key has no part with a reference, and adds nothing.
        return highest, gate / total if highest != NO_REFERENCE else Float32(0.0)

    @cute.jit
    def _add_parts(
        self, acc: cute.Tensor, parts, first: Int64, stride: Int64, count: Int32, even, odd,
        warp: Int32, lane: Int32,
    ):  # fmt: skip
        """Add this warp's parts; ``even`` and ``odd`` are the shares of parts in turn."""
        mO, mReference, _ = parts
        columns = const_expr(self.head_dim_v // WARP)
        step = const_expr(self.warps // 2)
        for begin in cutlass.range(warp, count, step * _LOADS, unroll=1):
            # All loads before the first use, so that they are under way together.
            loaded = []
            for u in cutlass.range_constexpr(_LOADS):
                i = cutlass.min(begin + u * step, count - 1)
                place = first + i * stride
                values = [mO[place * self.head_dim_v + j * WARP + lane] for j in range(columns)]
                loaded.append((i, mReference[place], values))
            for u in cutlass.range_constexpr(_LOADS):
                i, reference, values = loaded[u]
                largest = even[0] if i % 2 == 0 else odd[0]
                share = even[1] if i % 2 == 0 else odd[1]
                factor = share * power_of_two(reference - largest)
                # Past the end the last part again. A part without keys has no output.
                real = begin + u * step < count and reference != NO_REFERENCE
                for j in cutlass.range_constexpr(columns):
                    acc[j] = acc[j] + (values[j] * factor if real else Float32(0.0))


@kept
def compile_decode_combine(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    form: str,
    packed: bool,
    warps: int,
    tile_mode: bool,
) -> Callable:
    """The compiled kernel of these forms."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def parts():
        return fake_flat(Float32, alignment=4), integers(), fake_flat(Float32, alignment=4)

    vector = CUTE_DTYPES[dtype]
    return compile_kernel(
        DecodeCombine(head_dim, head_dim_v, form, warps, tile_mode),
        _Tensors(
            *(integers(packed), integers(), integers()),
            *(*parts(), *parts()),
            fake_flat(vector if form == "weight" else None),
            fake_flat(vector if form == "gates" else None),
            fake_flat(vector if form == "weight" else None),
            *(fake_flat(vector), integers(), integers(tile_mode)),
        ),
        _Sizes(*(Int32(1) for _ in range(9)), Int64(1)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [(torch.bfloat16, 128, 128, form, False, 2, False) for form in FORMS]
    forms += [(torch.float16, dim, dim, "weight", True, 8, dim == 64) for dim in (64, 96, 256)]
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
    floors: Tensor | None,
    lists: TileLists | None,
) -> Tensor:
    """See :func:`nsa.fused.decode_calls.decode_combine`."""
    head_dim, head_dim_v = q.shape[-1], compressed.out.shape[-1]
    form = "gates" if gates is not None else "weight" if weight is not None else "mean"
    out = q.new_empty((*q.shape[:2], head_dim_v))
    flat_q, q_stride = flat_rows(q) if form == "weight" else (None, 0)
    warps = 2 if q.shape[0] * q.shape[1] > _MANY_ROWS else 8
    tile_size, tile_slots = (lists.tile_size, lists.blocks.shape[1]) if lists else (1, 1)
    compile_decode_combine(
        q.dtype, head_dim, head_dim_v, form, cu_seqlens is not None, warps, lists is not None
    )(
        _Tensors(
            *(cu_seqlens, schedule.ends, schedule.tiles),
            *(x.view(-1) for x in (*compressed, *others)),
            *(flat_q, flat(gates), flat(weight), out.view(-1), lengths),
            floors if lists else None,
        ),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.group),
            *(shape.unit_tokens, shape.token_blocks, splits, tile_size, tile_slots, q_stride),
        ),
    )
    return out
