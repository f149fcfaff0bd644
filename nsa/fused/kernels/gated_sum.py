"""Gated sum of the three branches (paper Eq. 5): one pass over memory forward, one backward.

``out = g0 * o_cmp + g1 * o_slc + g2 * o_win`` per row and head, in float32, with the gates in one
of three forms: given; ``g_i = sigmoid(<q, weight[i]>)`` of the head; or 1/3 each. Tiled as
:mod:`nsa.fused.kernels.head_rows` says.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import (
    IN_ORDER,
    Placements,
    RowStatistics,
    StatisticsPlacements,
    multiplies_gates,
    new_statistics,
)
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
    check_placement,
    fake_places,
    fake_sizes,
    place_arguments,
    vector_of,
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

    def _load_row(self, sources, offsets, mGates, row_head: Int64):
        """The three gates of one row where they are given, and its vectors of ``sources``."""
        given = None
        if self.form == "gates":
            given = tuple(mGates[row_head * 3 + i] for i in range(3))
        return given, tuple(map(load_vector, sources, offsets))

    def _gates(self, given, q, rW: cute.Tensor, active: Boolean):
        """The gates of a row, from what the form needs: gates, or float32 ``q`` and the weight.

        And their logarithms to base 2; 0 for gates that are given, which are multiplied.
        """
        if self.form == "mean":
            return [Float32(1.0 / 3.0)] * 3, [Float32(-math.log2(3.0))] * 3
        if self.form == "gates":
            return [gate.to(Float32) for gate in given], [Float32(0.0)] * 3
        logits = [self.row_sum(dot(q, rW[None, i].load()), active) for i in range(3)]
        # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
        inverses = [1.0 + cute.math.exp2(x * -LOG2_E, fastmath=True) for x in logits]
        logarithms = [-cute.math.log2(x, fastmath=True) for x in inverses]
        return [cute.arch.rcp_approx(x) for x in inverses], logarithms


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
                gates.append(self._gates(given, q, rW, active)[0])
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
class _StatisticsPlaces(NamedTuple):
    """Where the log-sum-exp and the statistics of each branch lie, as :class:`Places` has it.

    A branch without statistics has no layout.
    """

    cmp: cute.Tensor | None
    slc: cute.Tensor | None
    cmp_layout: tuple[Int32, Int32, Int32, Int32] | None
    slc_layout: tuple[Int32, Int32, Int32, Int32]
    win_layout: tuple[Int32, Int32, Int32, Int32]


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
    lse_cmp: cute.Tensor | None
    lse_slc: cute.Tensor
    lse_win: cute.Tensor
    statistics_places: _StatisticsPlaces
    do_cmp: cute.Tensor | None
    do_slc: cute.Tensor | None
    do_win: cute.Tensor | None
    lse_log2_cmp: cute.Tensor | None
    lse_log2_slc: cute.Tensor
    lse_log2_win: cute.Tensor
    delta_cmp: cute.Tensor | None
    delta_slc: cute.Tensor
    delta_win: cute.Tensor
    dgates: cute.Tensor | None
    partial: cute.Tensor | None


class GatingBackward(_Gating):
    """Statistics and gradients in one pass; ``partial (chunks, H, 3, D)`` sums the weight's over a
    chunk.

    ``dgates (R, H, 3)`` is the gradient of the gates, with a weight that of the logits under them.
    ``strides`` are of ``dout``, the branches and ``q``. With ``multiplies``, the gates are in the
    branches' gradients, else in the statistics.
    """

    def __init__(self, head_dim: int, form: str, multiplies: bool):
        super().__init__(head_dim, form)
        self.multiplies = multiplies

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
        sources = (tensors.dout, tensors.o_cmp, tensors.o_slc, tensors.o_win)
        if const_expr(self.form == "weight"):
            sources = (tensors.dout, tensors.o_cmp, tensors.o_slc, tensors.o_win, tensors.q)
        layouts = (None, places.cmp_layout, places.slc_layout, None, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(5))
        mLse = (tensors.lse_cmp, tensors.lse_slc, tensors.lse_win)
        mLseLog2 = (tensors.lse_log2_cmp, tensors.lse_log2_slc, tensors.lse_log2_win)
        mDelta = (tensors.delta_cmp, tensors.delta_slc, tensors.delta_win)
        where = tensors.statistics_places
        numbers = (where.cmp_layout, where.slc_layout, where.win_layout)
        mPlaces = (places.cmp, places.slc, where.cmp, where.slc)
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places(mPlaces, step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                source = Int64(cutlass.min(row, rows - 1))
                row_places = (None, *placed[u][:2], None, None)
                offsets = [
                    self.offset(row_places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(len(sources))
                ]
                row_head = source * heads + head
                given, fragments = self._load_row(sources, offsets, tensors.gates, row_head)
                statistics = self._statistics(mLse, numbers, (*placed[u][2:], None), source, head)
                loaded.append((row, row_head, row_places, given, fragments, statistics))
            # As in forward: all sums over threads before the first store.
            gates, logarithms, dgates, deltas = [], [], [], []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                _, _, row_places, given, fragments, _ = loaded[u]
                for i in cutlass.range_constexpr(1, 3):
                    self.clear_unplaced(fragments[i], row_places[i])
                q = fragments[4].load().to(Float32) if const_expr(self.form == "weight") else None
                row_gates, row_logarithms = self._gates(given, q, rW, active)
                row_dgates, row_deltas = self._products(fragments, row_gates, active)
                gates.append(row_gates)
                logarithms.append(row_logarithms)
                dgates.append(row_dgates)
                deltas.append(row_deltas)
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, row_head, row_places, _, fragments, statistics = loaded[u]
                if const_expr(self.form == "weight"):
                    q = fragments[4].load().to(Float32)
                    for i in cutlass.range_constexpr(3):
                        # A row past the end repeats the last one, which counts once.
                        counted = dgates[u][i] if row < rows else Float32(0.0)
                        rdW[None, i].store(rdW[None, i].load() + q * counted)
                if row < rows and lane == 0:
                    if const_expr(self.form != "mean"):
                        for i in cutlass.range_constexpr(3):
                            mdGates[row_head * 3 + i] = dgates[u][i].to(mdGates.element_type)
                    for i in cutlass.range_constexpr(3):
                        if const_expr(numbers[i] is not None):
                            lse, offset = statistics[i]
                            if offset >= 0:
                                lse_log2 = lse * LOG2_E
                                if const_expr(not self.multiplies):
                                    lse_log2 = lse_log2 - logarithms[u][i]
                                lse_log2 = Float32.inf if lse == -Float32.inf else lse_log2
                                mLseLog2[i][offset] = lse_log2
                                mDelta[i][offset] = deltas[u][i]
                if row < rows and active:
                    dout = fragments[0].load().to(Float32)
                    for i in cutlass.range_constexpr(3):
                        if const_expr(dbranches[i] is not None):
                            value = dout
                            if const_expr(self.multiplies):
                                value = dout * gates[u][i]
                            # New gradients are contiguous, whatever their branches are.
                            offset = row_head * self.head_dim + column
                            if const_expr(row_places[i + 1] is None):
                                store_vector(value, dbranches[i], offset)
                            else:
                                place, layout = row_places[i + 1], layouts[i + 1]
                                if place >= 0:
                                    offset = self.offset(place, layout, None, None, columns[i + 1])
                                    store_vector(value, dbranches[i], offset)
        if const_expr(self.form == "weight"):
            self._store_partial(rdW, tensors.partial, chunk * heads + head, first, column, active)

    def _statistics(self, mLse, layouts, row_places, row: Int64, head: Int32) -> list:
        """The log-sum-exp of a row in each branch, and where it lies; -1 where the row has none."""
        found = []
        for mX, layout, place in zip(mLse, layouts, row_places, strict=True):
            if layout is None:
                found.append(None)
                continue
            source = row if place is None else Int64(cutlass.max(place, 0))
            offset = source * layout[0] + vector_of(layout, head)
            found.append((mX[offset], self._unless_unplaced(offset, place)))
        return found

    @cute.jit
    def _unless_unplaced(self, offset: Int64, place: Int32 | None) -> Int64:
        if const_expr(place is None):
            return offset
        return offset if place >= 0 else Int64(-1)

    def _products(self, fragments, gates: list[Float32], active: Boolean):
        """``<dout, o_i>``, of gates that are given or else of their logits, and ``delta_i``."""
        dout, *branches = (fragment.load().to(Float32) for fragment in fragments[:4])
        products = [self.row_sum(dot(dout, branch), active) for branch in branches]
        if self.form == "mean":
            return None, products
        dgates = products
        if self.form == "weight":
            # The sigmoid's derivative is g_i * (1 - g_i).
            dgates = [products[i] * gates[i] * (1.0 - gates[i]) for i in range(3)]
        if not self.multiplies:
            return dgates, products
        dtype = fragments[0].element_type
        # Of what the branch's backward gets, so that the terms of its dS cancel as they should.
        rounded = [(dout * gate).to(dtype).to(Float32) for gate in gates]
        pairs = zip(rounded, branches, strict=True)
        return dgates, [self.row_sum(dot(x, branch), active) for x, branch in pairs]

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
        smem = cutlass.memory.SmemAllocator()
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
    dtype: torch.dtype,
    head_dim: int,
    form: str,
    placed: tuple[bool, bool],
    statistics: tuple[bool | None, bool],
    multiplies: bool,
) -> Callable:
    """The compiled backward kernel; arguments as in :func:`compile_forward`.

    ``statistics`` says the same of the statistics; None if the compressed branch has none.
    ``multiplies`` is what :func:`nsa.fused.kernel_inputs.multiplies_gates` says.
    """
    element = CUTE_DTYPES[dtype]
    inputs = (fake_flat(element) for _ in range(4))
    gate_dtype = {"weight": Float32, "gates": element, "mean": None}[form]
    written = (multiplies or is_placed for is_placed in (*placed, False))
    compressed = None if statistics[0] is None else Float32
    numbers = (compressed, Float32, Float32)
    where = fake_places((bool(statistics[0]), statistics[1]))
    layout = (Int32(1),) * 4
    where = _StatisticsPlaces(
        *(where.cmp, where.slc, None if compressed is None else layout, layout, layout)
    )
    return compile_kernel(
        GatingBackward(head_dim, form, multiplies),
        _BackwardTensors(
            *(*inputs, *_fake_inputs(dtype, form)),
            *(*(fake_flat(x, alignment=4) for x in numbers), where),
            *(fake_flat(element if is_written else None) for is_written in written),
            *(fake_flat(x, alignment=4) for x in (*numbers, *numbers)),
            *(fake_flat(gate_dtype), fake_flat(Float32 if form == "weight" else None)),
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


PLACED_STATISTICS = tuple(
    (placed, statistics)
    for placed in PLACED
    for statistics in itertools.product((None, False, True), (False, True))
    # A branch with a placement has statistics with one.
    if all(not x or y for x, y in zip(placed, statistics, strict=True))
)
"""Which of the compressed and selected branch have a placement, and of which the statistics have an
index of their rows; None for a compressed branch without statistics."""

_IN_ORDER = (((False, False), (False, False)),)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for head_dim in (64, 96, 128, 192, 256):
            for form in FORMS:
                for placed in PLACED:
                    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{form}-{sum(placed)}"
                    arguments = (dtype, head_dim, form, placed)
                    yield f"gating-forward-{name}", functools.partial(compile_forward, *arguments)
            # What depends on placements depends on no size.
            for placed, statistics in PLACED_STATISTICS if head_dim == 128 else _IN_ORDER:
                yield from _backward_cases(dtype, head_dim, placed, statistics)


def _backward_cases(dtype, head_dim, placed, statistics):
    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{sum(placed)}-{statistics}"
    for form in FORMS:
        multiplies = form == "gates" or (form == "weight" and dtype == torch.float16)
        arguments = (dtype, head_dim, form, placed, statistics, multiplies)
        yield f"gating-backward-{name}-{form}", functools.partial(compile_backward, *arguments)


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
    form = gating_form((o_cmp, o_slc, o_win), q, gates, weight, placements)
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
    lse_cmp: Tensor | None,
    lse_slc: Tensor,
    lse_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    statistics_placements: StatisticsPlacements,
    placements: Placements = IN_ORDER,
) -> tuple[
    tuple[Tensor, Tensor, Tensor],
    tuple[RowStatistics | None, RowStatistics, RowStatistics],
    Tensor | None,
    Tensor | None,
    Tensor | None,
]:
    """See :func:`nsa.fused.kernel_calls.gating_backward`."""
    branches, lses = (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win)
    form = gating_form(branches, q, gates, weight, placements)
    check_tensor("dout", dout, o_win.shape, o_win.dtype, o_win.device)
    *leading, heads, head_dim = o_win.shape
    new = functools.partial(torch.empty, dtype=o_win.dtype, device=o_win.device)
    statistics = _new_statistics(lses, statistics_placements, o_win)
    multiplies = multiplies_gates(o_win.dtype, gates, weight)
    written = [
        None if not multiplies and placement is None else new(x.shape)
        for x, placement in zip(branches, (*placements, None), strict=True)
    ]
    for x, placement in zip(written, placements, strict=False):
        if placement is not None:
            x.zero_()
    douts = tuple(dout if x is None else x for x in written)
    dlogits = new((*leading, heads, 3), dtype=torch.float32) if form == "weight" else None
    dgates = new(gates.shape) if form == "gates" else None
    if o_win.numel() == 0:
        dweight = torch.zeros_like(weight) if form == "weight" else None
        return douts, statistics, dlogits, dgates, dweight
    chunks = _geometry(head_dim, form).num_chunks(o_win)
    partial = None
    if form == "weight":
        partial = new((chunks, heads, 3, head_dim), dtype=torch.float32)
    q = q if form == "weight" else None
    tensors, strides = zip(*map(flat_rows, (dout, *branches, q)), strict=True)
    numbers = [None if x is None else x.view(-1) for x in lses]
    lse_log2, delta = ([None if x is None else x[i].view(-1) for x in statistics] for i in range(2))
    gradients = (dlogits if form == "weight" else dgates, partial)
    tensors = _BackwardTensors(
        *(*tensors, flat(gates), flat(weight), *numbers, _places(statistics_placements)),
        *(*map(flat, written), *lse_log2, *delta, *map(flat, gradients)),
    )
    kernel = compile_backward(
        *(o_win.dtype, head_dim, form, are_placed(placements)),
        *(_have_places(statistics_placements), multiplies),
    )
    sizes = HeadSizes(math.prod(leading), heads, chunks)
    kernel(tensors, place_arguments(placements), strides, sizes)
    dweight = None if partial is None else partial.sum(0).to(weight.dtype)
    return douts, statistics, dlogits, dgates, dweight


def _new_statistics(
    lses: tuple[Tensor | None, ...], placements: StatisticsPlacements, like: Tensor
) -> tuple[RowStatistics | None, RowStatistics, RowStatistics]:
    """Statistics like ``lses``, of which P is 0 where no row of ``like`` may lie."""
    statistics, names = [], ("lse_cmp", "lse_slc", "lse_win")
    for name, lse, placement in zip(names, lses, placements, strict=True):
        if (lse is None) != (placement is None):
            raise ValueError(f"{name} and its placement must be given together")
        if lse is None:
            statistics.append(None)
            continue
        if like.numel():
            check_placement(name, lse, placement, like)
        check_tensor(name, lse, lse.shape, torch.float32, like.device)
        statistics.append(new_statistics(lse, placement, math.prod(like.shape[:-1])))
    return tuple(statistics)


def _places(placements: StatisticsPlacements) -> _StatisticsPlaces:
    """What the kernel gets of the placements of statistics."""
    places = (None if x is None else x.place for x in placements[:2])
    return _StatisticsPlaces(*places, *(None if x is None else tuple(x[1:]) for x in placements))


def _have_places(placements: StatisticsPlacements) -> tuple[bool | None, bool]:
    compressed, selected, _ = placements
    has_place = None if compressed is None else compressed.place is not None
    return has_place, selected.place is not None


def gating_form(
    branches: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    placements: Placements = IN_ORDER,
) -> str:
    """Raise on what the kernels cannot take, and return the form of the gates."""
    o_cmp, o_slc, o_win = branches
    check_head_rows("o_win", o_win)
    *leading, heads, head_dim = o_win.shape
    like = (o_win.dtype, o_win.device)
    check_branch("o_cmp", o_cmp, placements[0], o_win)
    check_branch("o_slc", o_slc, placements[1], o_win)
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
