"""Gated sum of the three branches (paper Eq. 5): one pass over memory forward, one backward.

``out = g0 * o_cmp + g1 * o_slc + g2 * o_win`` per row and head, in float32, with the gates in one
of three forms: given; ``g_i = sigmoid(<q, weight[i]>)`` of the head; or 1/3 each. Tiled as
:mod:`nsa.fused.kernels.head_rows` says.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.head_rows import (
    PLACED,
    THREADS,
    HeadRows,
    are_placed,
    check_branch,
    check_head_rows,
    fake_places,
    place_arguments,
)
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
from nsa.fused.placement import IN_ORDER, Placements

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


class GatingForward(_Gating):
    """``strides`` are of ``mCmp``, ``mSlc``, ``mWin``, ``mQ`` and ``mOut``."""

    @cute.jit
    def __call__(
        self,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mOut: cute.Tensor,
        mGates: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mCmpPlace: cute.Tensor | None,
        mSlcPlace: cute.Tensor | None,
        cmp_layout: cute.Stride | None,
        slc_layout: cute.Stride | None,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
        stream,
    ):
        tensors = (mCmp, mSlc, mWin, mQ, mOut, mGates, mWeight)
        places = (mCmpPlace, mSlcPlace, cmp_layout, slc_layout)
        self.kernel(*tensors, *places, strides, rows, heads, chunks).launch(
            grid=[chunks * heads, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mOut: cute.Tensor,
        mGates: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mCmpPlace: cute.Tensor | None,
        mSlcPlace: cute.Tensor | None,
        cmp_layout: cute.Stride | None,
        slc_layout: cute.Stride | None,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
    ):
        head, chunk, first, column, active = self.place(heads)
        in_row = head * self.head_dim + column
        rW = self.load_weight(mWeight, head, column)
        sources = (mCmp, mSlc, mWin)
        if const_expr(self.form == "weight"):
            sources = (mCmp, mSlc, mWin, mQ)
        layouts = (cmp_layout, slc_layout, None, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(4))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((mCmpPlace, mSlcPlace), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                # Past the end, the last row is read again: a load under a condition would wait.
                source = Int64(cutlass.min(row, rows - 1))
                places = (*placed[u], None, None)
                offsets = [
                    self.offset(places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(len(sources))
                ]
                row_head = source * heads + head
                given, fragments = self._load_row(sources, offsets, mGates, row_head)
                loaded.append((row, source, places, given, fragments))
            # All gates before the first store, so that their sums over threads overlap.
            gates = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                _, _, _, given, fragments = loaded[u]
                q = fragments[3].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, source, places, _, fragments = loaded[u]
                if row < rows and active:
                    for i in cutlass.range_constexpr(2):
                        self.clear_unplaced(fragments[i], places[i])
                    out = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        out = out + fragments[i].load().to(Float32) * gates[u][i]
                    store_vector(out, mOut, source * strides[4] + in_row)


class GatingBackward(_Gating):
    """All gradients in one pass; ``mPartial (chunks, H, 3, D)`` sums the weight's over a chunk.

    ``mdGates (R, H, 3)`` is the gradient of the gates, with a weight that of the logits under them.
    ``strides`` are of ``mdOut``, ``mCmp``, ``mSlc``, ``mWin`` and ``mQ``.
    """

    @cute.jit
    def __call__(
        self,
        mdOut: cute.Tensor,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mGates: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mdCmp: cute.Tensor,
        mdSlc: cute.Tensor,
        mdWin: cute.Tensor,
        mdGates: cute.Tensor | None,
        mPartial: cute.Tensor | None,
        mCmpPlace: cute.Tensor | None,
        mSlcPlace: cute.Tensor | None,
        cmp_layout: cute.Stride | None,
        slc_layout: cute.Stride | None,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
        stream,
    ):
        inputs = (mdOut, mCmp, mSlc, mWin, mQ, mGates, mWeight)
        outputs = (mdCmp, mdSlc, mdWin, mdGates, mPartial)
        places = (mCmpPlace, mSlcPlace, cmp_layout, slc_layout)
        self.kernel(*inputs, *outputs, *places, strides, rows, heads, chunks).launch(
            grid=[chunks * heads, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mdOut: cute.Tensor,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mGates: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mdCmp: cute.Tensor,
        mdSlc: cute.Tensor,
        mdWin: cute.Tensor,
        mdGates: cute.Tensor | None,
        mPartial: cute.Tensor | None,
        mCmpPlace: cute.Tensor | None,
        mSlcPlace: cute.Tensor | None,
        cmp_layout: cute.Stride | None,
        slc_layout: cute.Stride | None,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
    ):
        head, chunk, first, column, active = self.place(heads)
        lane = cute.arch.thread_idx()[0] % self.threads_per_row
        rW = self.load_weight(mWeight, head, column)
        rdW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rdW.fill(0.0)
        dbranches = (mdCmp, mdSlc, mdWin)
        # Constant gates have no gradient, so nothing but dout is read.
        sources = (mdOut,)
        if const_expr(self.form == "gates"):
            sources = (mdOut, mCmp, mSlc, mWin)
        if const_expr(self.form == "weight"):
            sources = (mdOut, mCmp, mSlc, mWin, mQ)
        layouts = (None, cmp_layout, slc_layout, None, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(5))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((mCmpPlace, mSlcPlace), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                source = Int64(cutlass.min(row, rows - 1))
                places = (None, *placed[u], None, None)
                offsets = [
                    self.offset(places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(len(sources))
                ]
                row_head = source * heads + head
                given, fragments = self._load_row(sources, offsets, mGates, row_head)
                loaded.append((row, row_head, places, given, fragments))
            # As in forward: all sums over threads before the first store.
            gates, dgates = [], []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                _, _, places, given, fragments = loaded[u]
                for i in cutlass.range_constexpr(1, min(3, len(sources))):
                    self.clear_unplaced(fragments[i], places[i])
                q = fragments[4].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
                dgates.append(self._dgates(fragments, gates[u], active))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, row_head, places, _, fragments = loaded[u]
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
                        if const_expr(places[i + 1] is None):
                            store_vector(dout * gates[u][i], dbranches[i], offset)
                        else:
                            place, layout = places[i + 1], layouts[i + 1]
                            if place >= 0:
                                offset = self.offset(place, layout, None, None, columns[i + 1])
                                store_vector(dout * gates[u][i], dbranches[i], offset)
        if const_expr(self.form == "weight"):
            self._store_partial(rdW, mPartial, chunk * heads + head, first, column, active)

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
        *(*vectors, q, fake_flat(CUTE_DTYPES[dtype]), gates, weight),
        *fake_places(placed),
        (Int64(1),) * 5,
        *(Int32(1), Int32(1), Int32(1)),
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
        *(*inputs, *_fake_inputs(dtype, form)),
        *(*outputs, fake_flat(gate_dtype), fake_flat(Float32 if form == "weight" else None)),
        *fake_places(placed),
        (Int64(1),) * 5,
        *(Int32(1), Int32(1), Int32(1)),
    )


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
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``, computed in float32.

    Args:
        o_cmp, o_slc, o_win: ``(..., H, D)``, bfloat16, float16 or float32; D a multiple of 8 up to
            256. Slices of heads are read where they are; other strides are copied. With a
            placement any ``(..., D)``, contiguous and not empty.
        q: ``(..., H, D)``; with ``weight`` only, else not looked at.
        gates: ``(..., H, 3)`` or None; used as they are.
        weight: ``(H, 3, D)`` or None: ``g_i = sigmoid(<q, weight[h, i]>)``. With neither gates nor
            weight each gate is 1/3; both is an error.
        out: where to write the result: like ``o_win``, a slice of heads at most. By default new.
        placements: where the rows of ``o_cmp`` and ``o_slc`` lie.

    Returns:
        ``(..., H, D)`` in the dtype of ``o_win``: ``out`` where it is given.
    """
    form = _check((o_cmp, o_slc, o_win), q, gates, weight, placements)
    if out is None:
        out = torch.empty(o_win.shape, dtype=o_win.dtype, device=o_win.device)
    else:
        check_tensor("out", out, o_win.shape, o_win.dtype, o_win.device)
        check_output("out", out)
    if out.numel() == 0:
        return out
    *leading, heads, head_dim = o_win.shape
    q = q if form == "weight" else None
    tensors, strides = zip(*map(flat_rows, (o_cmp, o_slc, o_win, q, out)), strict=True)
    kernel = compile_forward(o_win.dtype, head_dim, form, are_placed(placements))
    chunks = _Gating(head_dim, form).num_chunks(o_win)
    places = place_arguments(placements)
    rows = math.prod(leading)
    kernel(*tensors, flat(gates), flat(weight), *places, strides, rows, heads, chunks)
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
    """Gradients of :func:`gating_forward`, in one pass; the same bits each time on a device.

    With ``dgate_i = <dout, o_i>`` and ``dlogit_i = dgate_i * g_i * (1 - g_i)``:
    ``do_i = g_i * dout`` and ``dweight[h, i] = sum_r dlogit_i * q``, summed in float32. What
    ``dlogits`` add to the gradient of ``q`` is left to
    :func:`nsa.fused.kernels.query_gradient.query_gradient`.

    Args:
        dout: ``(..., H, D)``; the rest as in forward.

    Returns:
        ``(do_cmp, do_slc, do_win, dlogits, dgates, dweight)``: ``dlogits`` float32 ``(..., H, 3)``,
        the others in the shape and dtype of what they are the gradient of. ``dlogits`` and
        ``dweight`` are None without ``weight``, ``dgates`` without ``gates``. A gradient with a
        placement is 0 where no row lies.
    """
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
    chunks = _Gating(head_dim, form).num_chunks(o_win)
    partial = None
    if form == "weight":
        partial = new((chunks, heads, 3, head_dim), dtype=torch.float32)
    q = q if form == "weight" else None
    tensors, strides = zip(*map(flat_rows, (dout, o_cmp, o_slc, o_win, q)), strict=True)
    outputs = (*dbranches, dlogits if form == "weight" else dgates, partial)
    kernel = compile_backward(o_win.dtype, head_dim, form, are_placed(placements))
    flattened = map(flat, (gates, weight, *outputs))
    places = place_arguments(placements)
    rows = math.prod(leading)
    kernel(*tensors, *flattened, *places, strides, rows, heads, chunks)
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
