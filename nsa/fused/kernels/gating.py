"""Gated sum of the three branches (paper Eq. 5): one pass over memory forward, one backward.

``out = g0 * o_cmp + g1 * o_slc + g2 * o_win`` per row and head, in float32, with the gates in one
of three forms: given; ``g_i = sigmoid(<q, weight[i]>)`` of the head; or 1/3 each.

A CTA keeps to one head, so that the head's weight, and backward its gradient, stay in registers.
``threads_per_row`` neighbouring threads share a row, VECTOR elements each; a CTA handles
``rows_per_step`` rows at once and ``chunks`` CTAs of a head take the steps in turn.
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

from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    FLOAT_DTYPES,
    VECTOR,
    check_float,
    check_tensor,
    compile_kernel,
    dot,
    fake_flat,
    flat,
    load_vector,
    store_vector,
)

FORMS = ("weight", "gates", "mean")
MAX_HEAD_DIM = 32 * VECTOR

_THREADS = 128
# Rows whose loads a thread issues together, before it uses the first: 8 or 10 accesses of 16 bytes.
_ROWS_IN_FLIGHT = 2
# Some 4 fit at a time: several rounds, so that the last one, part empty, costs little.
_CTAS_PER_SM = 32


class _Gating:
    """Geometry and gates, common to both directions. ``parameter`` is the gates or the weight."""

    def __init__(self, head_dim: int, form: str):
        self.head_dim = head_dim
        self.form = form
        vectors = head_dim // VECTOR
        self.threads_per_row = 1 << math.ceil(math.log2(vectors))
        self.is_even = self.threads_per_row == vectors
        self.rows_in_parallel = _THREADS // self.threads_per_row
        self.rows_per_step = self.rows_in_parallel * _ROWS_IN_FLIGHT

    @cute.jit
    def _place(self, heads: Int32) -> tuple[Int32, Int32, Int32, Int32, Boolean]:
        """This thread's (head, chunk, first row of a step, column, whether it has a column)."""
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        column = tidx % self.threads_per_row * VECTOR
        active = Boolean(True)
        if const_expr(not self.is_even):
            active = column < self.head_dim
            # A thread without a column reads the first one, and what it reads is left out.
            column = column if active else Int32(0)
        # Neighbouring CTAs take neighbouring heads, which are neighbours in memory.
        return bidx % heads, bidx // heads, tidx // self.threads_per_row, column, active

    @cute.jit
    def _load_weight(self, mParameter: cute.Tensor, head: Int32, column: Int32):
        """The head's three weight vectors at this thread's column, in float32."""
        rW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rW.fill(0.0)
        if const_expr(self.form == "weight"):
            for i in cutlass.range_constexpr(3):
                offset = Int64((head * 3 + i) * self.head_dim + column)
                rW[None, i].store(load_vector(mParameter, offset).load().to(Float32))
        return rW

    @cute.jit
    def _row_sum(self, value: Float32, active: Boolean) -> Float32:
        """Sum over the threads of a row, in each of them."""
        if const_expr(not self.is_even):
            value = value if active else Float32(0.0)
        return cute.arch.warp_reduction(value, operator.add, threads_in_group=self.threads_per_row)

    def _load_row(self, sources, mParameter, row_head: Int64, column: Int32):
        """(offset, the three gates where they are given, vectors of ``sources``) of one row."""
        offset = row_head * self.head_dim + column
        given = None
        if self.form == "gates":
            given = tuple(mParameter[row_head * 3 + i] for i in range(3))
        return offset, given, tuple(load_vector(mX, offset) for mX in sources)

    def _gates(self, given, q, rW: cute.Tensor, active: Boolean) -> list[Float32]:
        """The gates of a row, from what the form needs: gates, or float32 ``q`` and the weight."""
        if self.form == "mean":
            return [Float32(1.0 / 3.0)] * 3
        if self.form == "gates":
            return [gate.to(Float32) for gate in given]
        logits = [self._row_sum(dot(q, rW[None, i].load()), active) for i in range(3)]
        # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
        exps = [cute.math.exp2(x * -math.log2(math.e), fastmath=True) for x in logits]
        return [cute.arch.rcp_approx(1.0 + exp) for exp in exps]


class GatingForward(_Gating):
    @cute.jit
    def __call__(
        self,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mParameter: cute.Tensor | None,
        mOut: cute.Tensor,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
        stream,
    ):
        self.kernel(mCmp, mSlc, mWin, mQ, mParameter, mOut, rows, heads, chunks).launch(
            grid=[chunks * heads, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mParameter: cute.Tensor | None,
        mOut: cute.Tensor,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
    ):
        head, chunk, first, column, active = self._place(heads)
        rW = self._load_weight(mParameter, head, column)
        sources = (mCmp, mSlc, mWin)
        if const_expr(self.form == "weight"):
            sources = (mCmp, mSlc, mWin, mQ)
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            loaded = []
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                # Past the end, the last row is read again: a load under a condition would wait.
                row_head = Int64(cutlass.min(row, rows - 1)) * heads + head
                loaded.append((row, *self._load_row(sources, mParameter, row_head, column)))
            # All gates before the first store, so that their sums over threads overlap.
            gates = []
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                _, _, given, fragments = loaded[u]
                q = fragments[3].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                row, offset, _, fragments = loaded[u]
                if row < rows and active:
                    out = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        out = out + fragments[i].load().to(Float32) * gates[u][i]
                    store_vector(out, mOut, offset)


class GatingBackward(_Gating):
    """All gradients in one pass; ``mPartial (chunks, H, 3, D)`` sums the weight's over a chunk."""

    @cute.jit
    def __call__(
        self,
        mdOut: cute.Tensor,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mParameter: cute.Tensor | None,
        mdCmp: cute.Tensor,
        mdSlc: cute.Tensor,
        mdWin: cute.Tensor,
        mdQ: cute.Tensor | None,
        mdGates: cute.Tensor | None,
        mPartial: cute.Tensor | None,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
        stream,
    ):
        inputs = (mdOut, mCmp, mSlc, mWin, mQ, mParameter)
        outputs = (mdCmp, mdSlc, mdWin, mdQ, mdGates, mPartial)
        self.kernel(*inputs, *outputs, rows, heads, chunks).launch(
            grid=[chunks * heads, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mdOut: cute.Tensor,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mQ: cute.Tensor | None,
        mParameter: cute.Tensor | None,
        mdCmp: cute.Tensor,
        mdSlc: cute.Tensor,
        mdWin: cute.Tensor,
        mdQ: cute.Tensor | None,
        mdGates: cute.Tensor | None,
        mPartial: cute.Tensor | None,
        rows: Int32,
        heads: Int32,
        chunks: Int32,
    ):
        head, chunk, first, column, active = self._place(heads)
        lane = cute.arch.thread_idx()[0] % self.threads_per_row
        rW = self._load_weight(mParameter, head, column)
        rdW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rdW.fill(0.0)
        branches, dbranches = (mCmp, mSlc, mWin), (mdCmp, mdSlc, mdWin)
        # Constant gates have no gradient, so nothing but dout is read.
        sources = (mdOut,)
        if const_expr(self.form == "gates"):
            sources = (mdOut, *branches)
        if const_expr(self.form == "weight"):
            sources = (mdOut, *branches, mQ)
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            loaded = []
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                row_head = Int64(cutlass.min(row, rows - 1)) * heads + head
                fragments = self._load_row(sources, mParameter, row_head, column)
                loaded.append((row, row_head, *fragments))
            # As in forward: all sums over threads before the first store.
            gates, dgates = [], []
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                _, _, _, given, fragments = loaded[u]
                q = fragments[4].load().to(Float32) if const_expr(self.form == "weight") else None
                gates.append(self._gates(given, q, rW, active))
                dgates.append(self._dgates(fragments, active))
            for u in cutlass.range_constexpr(_ROWS_IN_FLIGHT):
                row, row_head, offset, _, fragments = loaded[u]
                wanted = row < rows and active
                if const_expr(self.form == "weight"):
                    q = fragments[4].load().to(Float32)
                    dq = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        # sigmoid'(x) = g * (1 - g)
                        dlogit = dgates[u][i] * gates[u][i] * (1.0 - gates[u][i])
                        dq = dq + rW[None, i].load() * dlogit
                        # A row past the end repeats the last one, which counts once.
                        counted = dlogit if row < rows else Float32(0.0)
                        rdW[None, i].store(rdW[None, i].load() + q * counted)
                    if wanted:
                        store_vector(dq, mdQ, offset)
                if const_expr(self.form == "gates"):
                    stores = row < rows and lane == 0
                    if stores:
                        for i in cutlass.range_constexpr(3):
                            mdGates[row_head * 3 + i] = dgates[u][i].to(mdGates.element_type)
                if wanted:
                    dout = fragments[0].load().to(Float32)
                    for i in cutlass.range_constexpr(3):
                        store_vector(dout * gates[u][i], dbranches[i], offset)
        if const_expr(self.form == "weight"):
            self._store_partial(rdW, mPartial, chunk * heads + head, first, column, active)

    def _dgates(self, fragments, active: Boolean) -> list[Float32] | None:
        """``<dout, o_i>`` of a row whose fragments are ``dout`` and then the branches."""
        if self.form == "mean":
            return None
        dout, *branches = (fragment.load().to(Float32) for fragment in fragments[:4])
        return [self._row_sum(dot(dout, branch), active) for branch in branches]

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
        for index in cutlass.range(tidx, size, _THREADS):
            total = Float32(0.0)
            for row in cutlass.range_constexpr(self.rows_in_parallel):
                total = total + sdW[row, index]
            mPartial[Int64(chunk_head) * size + index] = total


@functools.lru_cache(maxsize=None)
def compile_forward(dtype: torch.dtype, head_dim: int, form: str) -> Callable:
    """The compiled forward kernel of a dtype, head dimension and form (one of FORMS)."""
    tensor = fake_flat(CUTE_DTYPES[dtype])
    q, parameter = _fake_inputs(dtype, form)
    return compile_kernel(
        GatingForward(head_dim, form),
        *(tensor, tensor, tensor, q, parameter),
        tensor,
        *(Int32(1), Int32(1), Int32(1)),
    )


@functools.lru_cache(maxsize=None)
def compile_backward(dtype: torch.dtype, head_dim: int, form: str) -> Callable:
    """The compiled backward kernel of a dtype, head dimension and form (one of FORMS)."""
    tensor = fake_flat(CUTE_DTYPES[dtype])
    q, parameter = _fake_inputs(dtype, form)
    return compile_kernel(
        GatingBackward(head_dim, form),
        *(tensor, tensor, tensor, tensor, q, parameter),
        *(tensor, tensor, tensor, q),
        parameter if form == "gates" else None,
        fake_flat(Float32) if form == "weight" else None,
        *(Int32(1), Int32(1), Int32(1)),
    )


def _fake_inputs(dtype: torch.dtype, form: str):
    """Stand-ins for ``q`` and the gates or weight, where the form has them."""
    q = fake_flat(CUTE_DTYPES[dtype] if form == "weight" else None)
    return q, fake_flat(None if form == "mean" else CUTE_DTYPES[dtype])


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for head_dim in (64, 96, 128, 192, 256):
            for form in FORMS:
                name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{form}"
                arguments = (dtype, head_dim, form)
                yield f"gating-forward-{name}", functools.partial(compile_forward, *arguments)
                yield f"gating-backward-{name}", functools.partial(compile_backward, *arguments)


def gating_forward(
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``, computed in float32.

    Args:
        o_cmp, o_slc, o_win: ``(R, H, D)``, bfloat16, float16 or float32; D a multiple of 8 up to
            256. Inputs that are not contiguous are copied.
        q: ``(R, H, D)``; with ``weight`` only, else not looked at.
        gates: ``(R, H, 3)`` or None; used as they are.
        weight: ``(H, 3, D)`` or None: ``g_i = sigmoid(<q, weight[h, i]>)``. With neither gates nor
            weight each gate is 1/3; both is an error.

    Returns:
        ``(R, H, D)`` in the dtype of ``o_cmp``.
    """
    form = _check((o_cmp, o_slc, o_win), q, gates, weight)
    out = torch.empty(o_cmp.shape, dtype=o_cmp.dtype, device=o_cmp.device)
    if out.numel() == 0:
        return out
    rows, heads, head_dim = o_cmp.shape
    kernel = compile_forward(o_cmp.dtype, head_dim, form)
    kernel(
        *map(flat, (o_cmp, o_slc, o_win, *_used_inputs(form, q, gates, weight), out)),
        *(rows, heads, _num_chunks(o_cmp)),
    )
    return out


def gating_backward(
    dout: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`gating_forward`, in one pass; the same bits each time on a device.

    With ``dgate_i = <dout, o_i>`` and ``dlogit_i = dgate_i * g_i * (1 - g_i)``:
    ``do_i = g_i * dout``, ``dq = sum_i dlogit_i * weight[h, i]`` and
    ``dweight[h, i] = sum_r dlogit_i * q``, summed in float32.

    Args:
        dout: ``(R, H, D)``; the rest as in forward.

    Returns:
        ``(do_cmp, do_slc, do_win, dq, dgates, dweight)``, each in the shape and dtype of what it is
        the gradient of; ``dq`` and ``dweight`` are None without ``weight``, ``dgates`` without
        ``gates``.
    """
    form = _check((o_cmp, o_slc, o_win), q, gates, weight)
    check_tensor("dout", dout, o_cmp.shape, o_cmp.dtype, o_cmp.device)
    rows, heads, head_dim = o_cmp.shape
    new = functools.partial(torch.empty, dtype=o_cmp.dtype, device=o_cmp.device)
    dbranches = [new(o_cmp.shape) for _ in range(3)]
    dq = new(q.shape) if form == "weight" else None
    dgates = new(gates.shape) if form == "gates" else None
    if o_cmp.numel() == 0:
        dweight = torch.zeros_like(weight) if form == "weight" else None
        return (*dbranches, dq, dgates, dweight)
    chunks = _num_chunks(o_cmp)
    partial = None
    if form == "weight":
        partial = new((chunks, heads, 3, head_dim), dtype=torch.float32)
    kernel = compile_backward(o_cmp.dtype, head_dim, form)
    inputs = (dout, o_cmp, o_slc, o_win, *_used_inputs(form, q, gates, weight))
    kernel(*map(flat, (*inputs, *dbranches, dq, dgates, partial)), rows, heads, chunks)
    dweight = None if partial is None else partial.sum(0).to(weight.dtype)
    return (*dbranches, dq, dgates, dweight)


def _used_inputs(form: str, q: Tensor, gates: Tensor | None, weight: Tensor | None):
    """``q`` and the gates or weight, where the form reads them."""
    return {"weight": (q, weight), "gates": (None, gates), "mean": (None, None)}[form]


def _num_chunks(x: Tensor) -> int:
    """CTAs of a head: enough to fill the GPU, no more than there are steps of rows."""
    rows, heads, head_dim = x.shape
    sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count
    steps = math.ceil(rows / _Gating(head_dim, "mean").rows_per_step)
    return min(steps, max(1, sm_count * _CTAS_PER_SM // heads))


def _check(branches, q: Tensor, gates: Tensor | None, weight: Tensor | None) -> str:
    """Raise on what the kernels cannot take, and return the form of the gates."""
    o_cmp, o_slc, o_win = branches
    check_float("o_cmp", o_cmp)
    if o_cmp.ndim != 3 or o_cmp.shape[2] % VECTOR or not 0 < o_cmp.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"o_cmp has shape {tuple(o_cmp.shape)}; it must be (R, H, D) with D a multiple of "
            f"{VECTOR} up to {MAX_HEAD_DIM}"
        )
    rows, heads, head_dim = o_cmp.shape
    like = (o_cmp.dtype, o_cmp.device)
    for name, x in (("o_slc", o_slc), ("o_win", o_win)):
        check_tensor(name, x, o_cmp.shape, *like)
    if gates is not None and weight is not None:
        raise ValueError("gates and weight are both given; at most one of them may be")
    if gates is not None:
        check_tensor("gates", gates, (rows, heads, 3), *like)
        return "gates"
    if weight is not None:
        check_tensor("q", q, o_cmp.shape, *like)
        check_tensor("weight", weight, (heads, 3, head_dim), *like)
        return "weight"
    return "mean"
