"""Gated sum of the three branches (paper Eq. 5): one pass over memory forward, one backward.

``out = g0 * o_cmp + g1 * o_slc + g2 * o_win`` per row and head, in float32, with the gates in one
of three forms: given; ``g_i = sigmoid(<q, weight[i]>)`` of the head; or 1/3 each. Tiled as
:mod:`nsa.fused.kernels.head_rows` says.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import IN_ORDER, Placements
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.head_rows import (
    PLACED,
    THREADS,
    HeadRows,
    HeadSizes,
    Places,
    are_placed,
    check_branch,
    check_head_rows,
    fake_places,
    fake_sizes,
    place_arguments,
)
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    FLOAT_DTYPES,
    VECTOR,
    check_output,
    check_tensor,
    dot,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

FORMS = ("weight", "gates", "mean")

# 8 or 10 accesses of 16 bytes that a thread issues together, before it uses the first.
_ROWS_IN_FLIGHT = 2


class _Gating(HeadRows):
    """The gates, common to both directions. ``strides`` are the elements from row to row.

    That of a branch with a placement is not looked at.
    """

    def __init__(self, head_dim: int, form: str):
        super().__init__(head_dim, _ROWS_IN_FLIGHT)
        self.form = form

    @cute.jit
    def _row_sum(self, value: Float32, active: Boolean) -> Float32:
        """Sum over the threads of a row, in each of them."""
        if const_expr(not self.is_even):
            value = value if active else Float32(0.0)
        return cute.arch.warp_reduction(value, operator.add, threads_in_group=self.threads_per_row)

    def _load_row(self, sources, offsets, mGates, row_head: Int64):
        """The three gates of one row where they are given, and its vectors of ``sources``."""
        given = None
        if self.form == "gates":
            given = tuple(mGates[row_head * 3 + i] for i in range(3))
        return given, tuple(map(load_vector, sources, offsets))

    def _gates(self, given, q, rW: cute.Tensor, active: Boolean) -> list[Float32]:
        """The gates of a row, from what the form needs: gates, or float32 ``q`` and the weight."""
        if self.form == "mean":
            return [Float32(1.0 / 3.0)] * 3
        if self.form == "gates":
            return [gate.to(Float32) for gate in given]
        logits = [self._row_sum(dot(q, rW[None, i].load()), active) for i in range(3)]
        # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
        exps = [cute.math.exp2(x * -LOG2_E, fastmath=True) for x in logits]
        return [cute.arch.rcp_approx(1.0 + exp) for exp in exps]


@mlir_namedtuple
class _ForwardTensors(NamedTuple):
    """What :func:`gating_forward` takes and returns."""

    o_cmp: cute.Tensor
    o_slc: cute.Tensor
    o_win: cute.Tensor
    q: cute.Tensor | None
    out: cute.Tensor
    gates: cute.Tensor | None
    weight: cute.Tensor | None


class GatingForward(_Gating):
    """``strides`` are of the branches, ``q`` and ``out``."""

    @cute.kernel
    def kernel(
        self, tensors: _ForwardTensors, places: Places, strides: cute.Stride, sizes: HeadSizes
    ):
        rows, heads, chunks = sizes
        head, chunk, first, column, active = self.place(heads)
        in_row = head * self.head_dim + column
        rW = self.load_weight(tensors.weight, head, column)
        sources = (tensors.o_cmp, tensors.o_slc, tensors.o_win)
        if const_expr(self.form == "weight"):
            sources = (tensors.o_cmp, tensors.o_slc, tensors.o_win, tensors.q)
        layouts = (places.cmp_layout, places.slc_layout, None, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(4))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((places.cmp, places.slc), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                # Past the end, the last row is read again: a load under a condition would wait.
                source = Int64(cutlass.min(row, rows - 1))
                row_places = (*placed[u], None, None)
                offsets = [
                    self.offset(row_places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(len(sources))
                ]
                row_head = source * heads + head
                given, fragments = self._load_row(sources, offsets, tensors.gates, row_head)
                loaded.append((row, source, row_places, given, fragments))
            # All gates before the first store, so that their sums over threads overlap.
            gates = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                _, _, _, given, fragments = loaded[u]
                q = fragments[3].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, source, row_places, _, fragments = loaded[u]
                if row < rows and active:
                    for i in cutlass.range_constexpr(2):
                        self.clear_unplaced(fragments[i], row_places[i])
                    out = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        out = out + fragments[i].load().to(Float32) * gates[u][i]
                    store_vector(out, tensors.out, source * strides[4] + in_row)


@mlir_namedtuple
class _BackwardTensors(NamedTuple):
    """What :func:`gating_backward` takes and returns; see :class:`GatingBackward`."""

    dout: cute.Tensor
    o_cmp: cute.Tensor
    o_slc: cute.Tensor
    o_win: cute.Tensor
    q: cute.Tensor | None
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    do_cmp: cute.Tensor
    do_slc: cute.Tensor
    do_win: cute.Tensor
    dgates: cute.Tensor | None
    partial: cute.Tensor | None


class GatingBackward(_Gating):
    """All gradients in one pass; ``partial (chunks, H, 3, D)`` sums the weight's over a chunk.

    ``dgates (R, H, 3)`` is the gradient of the gates, with a weight that of the logits under them.
    ``strides`` are of ``dout``, the branches and ``q``.
    """

    @cute.kernel
    def kernel(
        self, tensors: _BackwardTensors, places: Places, strides: cute.Stride, sizes: HeadSizes
    ):
        rows, heads, chunks = sizes
        head, chunk, first, column, active = self.place(heads)
        lane = cute.arch.thread_idx()[0] % self.threads_per_row
        rW = self.load_weight(tensors.weight, head, column)
        rdW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rdW.fill(0.0)
        dbranches, mdGates = (tensors.do_cmp, tensors.do_slc, tensors.do_win), tensors.dgates
        # Constant gates have no gradient, so nothing but dout is read.
        sources = (tensors.dout,)
        if const_expr(self.form == "gates"):
            sources = (tensors.dout, tensors.o_cmp, tensors.o_slc, tensors.o_win)
        if const_expr(self.form == "weight"):
            sources = (tensors.dout, tensors.o_cmp, tensors.o_slc, tensors.o_win, tensors.q)
        layouts = (None, places.cmp_layout, places.slc_layout, None, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(5))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((places.cmp, places.slc), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                source = Int64(cutlass.min(row, rows - 1))
                row_places = (None, *placed[u], None, None)
                offsets = [
                    self.offset(row_places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(len(sources))
                ]
                row_head = source * heads + head
                given, fragments = self._load_row(sources, offsets, tensors.gates, row_head)
                loaded.append((row, row_head, row_places, given, fragments))
            # As in forward: all sums over threads before the first store.
            gates, dgates = [], []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                _, _, row_places, given, fragments = loaded[u]
                for i in cutlass.range_constexpr(1, min(3, len(sources))):
                    self.clear_unplaced(fragments[i], row_places[i])
                q = fragments[4].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
                dgates.append(self._dgates(fragments, gates[u], active))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, row_head, row_places, _, fragments = loaded[u]
                if const_expr(self.form == "weight"):
                    q = fragments[4].load().to(Float32)
                    for i in cutlass.range_constexpr(3):
                        # A row past the end repeats the last one, which counts once.
                        counted = dgates[u][i] if row < rows else Float32(0.0)
                        rdW[None, i].store(rdW[None, i].load() + q * counted)
                if const_expr(self.form != "mean"):
                    stores = row < rows and lane == 0
                    if stores:
                        for i in cutlass.range_constexpr(3):
                            mdGates[row_head * 3 + i] = dgates[u][i].to(mdGates.element_type)
                if row < rows and active:
                    dout = fragments[0].load().to(Float32)
                    for i in cutlass.range_constexpr(3):
                        # New gradients are contiguous, whatever their branches are.
                        offset = row_head * self.head_dim + column
                        if const_expr(row_places[i + 1] is None):
                            store_vector(dout * gates[u][i], dbranches[i], offset)
                        else:
                            place, layout = row_places[i + 1], layouts[i + 1]
                            if place >= 0:
                                offset = self.offset(place, layout, None, None, columns[i + 1])
                                store_vector(dout * gates[u][i], dbranches[i], offset)
        if const_expr(self.form == "weight"):
            self._store_partial(rdW, tensors.partial, chunk * heads + head, first, column, active)

    def _dgates(self, fragments, gates: list[Float32], active: Boolean) -> list[Float32] | None:
        """``<dout, o_i>``, with a weight times the sigmoid's derivative ``g_i * (1 - g_i)``."""
        if self.form == "mean":
            return None
        dout, *branches = (fragment.load().to(Float32) for fragment in fragments[:4])
        dgates = [self._row_sum(dot(dout, branch), active) for branch in branches]
        if self.form == "gates":
            return dgates
        return [dgates[i] * gates[i] * (1.0 - gates[i]) for i in range(3)]

    @cute.jit
    def _store_partial(
        self,
        rdW: cute.Tensor,
        mPartial: cute.Tensor,
        chunk_head: Int32,
        first: Int32,
        column: Int32,
        active: Boolean,
    ):
        """Sum ``rdW`` over the rows that the CTA handles in parallel, in a fixed order."""
        tidx, _, _ = cute.arch.thread_idx()
        size = 3 * self.head_dim
        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout((self.rows_in_parallel, size), stride=(size, 1))
        sdW = smem.allocate_tensor(Float32, layout, byte_alignment=16)
        if active:
            for i in cutlass.range_constexpr(3):
                for j in cutlass.range_constexpr(VECTOR):
                    sdW[first, i * self.head_dim + column + j] = rdW[j, i]
        cute.arch.barrier()
        for index in cutlass.range(tidx, size, THREADS):
            total = Float32(0.0)
            for row in cutlass.range_constexpr(self.rows_in_parallel):
                total = total + sdW[row, index]
            mPartial[Int64(chunk_head) * size + index] = total


@kept
def compile_forward(
    dtype: torch.dtype, head_dim: int, form: str, placed: tuple[bool, bool]
) -> Callable:
    """The compiled forward kernel of a dtype, head dimension and form (one of FORMS).

    ``placed`` says which of the compressed and selected branch have a placement.
    """
    vectors = (fake_flat(CUTE_DTYPES[dtype]) for _ in range(3))
    q, gates, weight = _fake_inputs(dtype, form)
    return compile_kernel(
        GatingForward(head_dim, form),
        _ForwardTensors(*vectors, q, fake_flat(CUTE_DTYPES[dtype]), gates, weight),
        fake_places(placed),
        (Int64(1),) * 5,
        fake_sizes(),
    )


@kept
def compile_backward(
    dtype: torch.dtype, head_dim: int, form: str, placed: tuple[bool, bool]
) -> Callable:
    """The compiled backward kernel; arguments as in :func:`compile_forward`."""
    inputs = (fake_flat(CUTE_DTYPES[dtype]) for _ in range(4))
    outputs = (fake_flat(CUTE_DTYPES[dtype]) for _ in range(3))
    gate_dtype = {"weight": Float32, "gates": CUTE_DTYPES[dtype], "mean": None}[form]
    return compile_kernel(
        GatingBackward(head_dim, form),
        _BackwardTensors(
            *(*inputs, *_fake_inputs(dtype, form)),
            *(*outputs, fake_flat(gate_dtype), fake_flat(Float32 if form == "weight" else None)),
        ),
        fake_places(placed),
        (Int64(1),) * 5,
        fake_sizes(),
    )


_geometry = functools.cache(_Gating)


def _fake_inputs(dtype: torch.dtype, form: str):
    """Stand-ins for ``q``, the gates and the weight, where the form has them."""
    used = (form == "weight", form == "gates", form == "weight")
    return tuple(fake_flat(CUTE_DTYPES[dtype] if is_used else None) for is_used in used)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for head_dim in (64, 96, 128, 192, 256):
            for form in FORMS:
                for placed in PLACED:
                    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{form}-{sum(placed)}"
                    arguments = (dtype, head_dim, form, placed)
                    yield f"gating-forward-{name}", functools.partial(compile_forward, *arguments)
                    yield f"gating-backward-{name}", functools.partial(compile_backward, *arguments)


def gating_forward(
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.gating_forward`."""
    form = _check((o_cmp, o_slc, o_win), q, gates, weight, placements)
    if out is None:
        out = torch.empty_like(o_win, memory_format=torch.contiguous_format)
    else:
        check_tensor("out", out, o_win.shape, o_win.dtype, o_win.device)
        check_output("out", out)
    if out.numel() == 0:
        return out
    *leading, heads, head_dim = o_win.shape
    q = q if form == "weight" else None
    tensors, strides = zip(*map(flat_rows, (o_cmp, o_slc, o_win, q, out)), strict=True)
    kernel = compile_forward(o_win.dtype, head_dim, form, are_placed(placements))
    chunks = _geometry(head_dim, form).num_chunks(o_win)
    tensors = _ForwardTensors(*tensors, flat(gates), flat(weight))
    sizes = HeadSizes(math.prod(leading), heads, chunks)
    kernel(tensors, place_arguments(placements), strides, sizes)
    return out


def gating_backward(
    dout: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    placements: Placements = IN_ORDER,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """See :func:`nsa.fused.kernel_calls.gating_backward`."""
    form = _check((o_cmp, o_slc, o_win), q, gates, weight, placements)
    check_tensor("dout", dout, o_win.shape, o_win.dtype, o_win.device)
    *leading, heads, head_dim = o_win.shape
    new = functools.partial(torch.empty, dtype=o_win.dtype, device=o_win.device)
    dbranches = [
        new(x.shape) if placement is None else new(x.shape).zero_()
        for x, placement in zip((o_cmp, o_slc, o_win), (*placements, None), strict=True)
    ]
    dlogits = new((*leading, heads, 3), dtype=torch.float32) if form == "weight" else None
    dgates = new(gates.shape) if form == "gates" else None
    if o_win.numel() == 0:
        dweight = torch.zeros_like(weight) if form == "weight" else None
        return (*dbranches, dlogits, dgates, dweight)
    chunks = _geometry(head_dim, form).num_chunks(o_win)
    partial = None
    if form == "weight":
        partial = new((chunks, heads, 3, head_dim), dtype=torch.float32)
    q = q if form == "weight" else None
    tensors, strides = zip(*map(flat_rows, (dout, o_cmp, o_slc, o_win, q)), strict=True)
    outputs = (*dbranches, dlogits if form == "weight" else dgates, partial)
    kernel = compile_backward(o_win.dtype, head_dim, form, are_placed(placements))
    tensors = _BackwardTensors(*tensors, *map(flat, (gates, weight, *outputs)))
    sizes = HeadSizes(math.prod(leading), heads, chunks)
    kernel(tensors, place_arguments(placements), strides, sizes)
    dweight = None if partial is None else partial.sum(0).to(weight.dtype)
    return (*dbranches, dlogits, dgates, dweight)


def _check(
    branches, q: Tensor, gates: Tensor | None, weight: Tensor | None, placements: Placements
) -> str:
    """Raise on what the kernels cannot take, and return the form of the gates."""
    o_cmp, o_slc, o_win = branches
    check_head_rows("o_win", o_win)
    *leading, heads, head_dim = o_win.shape
    like = (o_win.dtype, o_win.device)
    for name, x, placement in zip(("o_cmp", "o_slc"), (o_cmp, o_slc), placements, strict=True):
        check_branch(name, x, placement, o_win)
    if gates is not None and weight is not None:
        raise ValueError("gates and weight are both given; at most one of them may be")
    if gates is not None:
        check_tensor("gates", gates, (*leading, heads, 3), *like)
        return "gates"
    if weight is not None:
        check_tensor("q", q, o_win.shape, *like)
        check_tensor("weight", weight, (heads, 3, head_dim), *like)
        return "weight"
    return "mean"
