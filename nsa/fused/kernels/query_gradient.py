"""Gradient of the queries: the sum of the branches' and of the gates', in one pass over memory.

``dq = dq_cmp + dq_slc + dq_win + sum_i dlogits[i] * weight[h, i]`` per row and head, in float32 and
rounded once, where ``g_i = sigmoid(<q, weight[h, i]>)`` and ``dlogits`` are the gradients of what
the sigmoids take. Tiled as :mod:`nsa.fused.kernels.head_rows` says.
"""

import functools
import math
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernel_inputs import IN_ORDER, Placements
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
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

# 9 accesses of 16 bytes that a thread issues together, as many as the gating kernels do.
_ROWS_IN_FLIGHT = 3


class QueryGradient(HeadRows):
    """``strides`` are the elements from row to row of the branches' gradients and of ``dq``.

    That of a branch with a placement is not looked at. ``mdQ`` may be that of a branch without: a
    thread reads its elements before it writes them.
    """

    def __init__(self, head_dim: int):
        super().__init__(head_dim, _ROWS_IN_FLIGHT)

    @cute.jit
    def __call__(
        self,
        mCmp: cute.Tensor,
        mSlc: cute.Tensor,
        mWin: cute.Tensor,
        mdLogits: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mdQ: cute.Tensor,
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
        tensors = (mCmp, mSlc, mWin, mdLogits, mWeight, mdQ)
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
        mdLogits: cute.Tensor | None,
        mWeight: cute.Tensor | None,
        mdQ: cute.Tensor,
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
        branches, layouts = (mCmp, mSlc, mWin), (cmp_layout, slc_layout, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(3))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((mCmpPlace, mSlcPlace), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                # Past the end, the last row is read again: a load under a condition would wait.
                source = Int64(cutlass.min(row, rows - 1))
                places = (*placed[u], None)
                dlogits = ()
                if const_expr(mWeight is not None):
                    dlogits = tuple(mdLogits[(source * heads + head) * 3 + i] for i in range(3))
                offsets = [
                    self.offset(places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(3)
                ]
                fragments = tuple(map(load_vector, branches, offsets))
                loaded.append((row, source, places, dlogits, fragments))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, source, places, dlogits, fragments = loaded[u]
                if row < rows and active:
                    for i in cutlass.range_constexpr(2):
                        self.clear_unplaced(fragments[i], places[i])
                    dq = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        dq = dq + fragments[i].load().to(Float32)
                        if const_expr(mWeight is not None):
                            dq = dq + rW[None, i].load() * dlogits[i]
                    store_vector(dq, mdQ, source * strides[3] + in_row)


@kept
def compile_query_gradient(
    dtype: torch.dtype, head_dim: int, with_weight: bool, placed: tuple[bool, bool]
) -> Callable:
    """The compiled kernel of a dtype and head dimension, with or without gates from a weight.

    ``placed`` says which of the compressed and selected branch have a placement.
    """
    element = CUTE_DTYPES[dtype]
    return compile_kernel(
        QueryGradient(head_dim),
        *(fake_flat(element) for _ in range(3)),
        fake_flat(Float32 if with_weight else None),
        fake_flat(element if with_weight else None),
        fake_flat(element),
        *fake_places(placed),
        (Int64(1),) * 4,
        *(Int32(1), Int32(1), Int32(1)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for head_dim in (64, 96, 128, 192, 256):
            for with_weight in (False, True):
                form = "weight" if with_weight else "plain"
                for placed in PLACED:
                    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{form}-{sum(placed)}"
                    arguments = (dtype, head_dim, with_weight, placed)
                    compiled = functools.partial(compile_query_gradient, *arguments)
                    yield f"query-gradient-{name}", compiled


def query_gradient(
    dq_cmp: Tensor,
    dq_slc: Tensor,
    dq_win: Tensor,
    dlogits: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """``dq_cmp + dq_slc + dq_win + sum_i dlogits[..., i] * weight[:, i]``, rounded once.

    Args:
        dq_cmp, dq_slc, dq_win: ``(..., H, D)``, bfloat16, float16 or float32; D a multiple of 8 up
            to 256. Slices of heads are read where they are; other strides are copied. With a
            placement any ``(..., D)``, contiguous and not empty.
        dlogits: float32 ``(..., H, 3)``, or None without ``weight``.
        weight: ``(H, 3, D)`` in the dtype of ``dq_win``, or None: the plain sum of three.
        out: where to write the result: like ``dq_win``, a slice of heads at most. It may be one of
            the gradients without a placement; it must not overlap any otherwise. By default new.
        placements: where the rows of ``dq_cmp`` and ``dq_slc`` lie.

    Returns:
        ``(..., H, D)`` in the dtype of ``dq_win``: ``out`` where it is given.
    """
    _check(dq_cmp, dq_slc, dq_win, dlogits, weight, out, placements)
    if out is None:
        out = torch.empty(dq_win.shape, dtype=dq_win.dtype, device=dq_win.device)
    if out.numel() == 0:
        return out
    *leading, heads, head_dim = dq_win.shape
    tensors, strides = zip(*map(flat_rows, (dq_cmp, dq_slc, dq_win, out)), strict=True)
    *branches, dq = tensors
    placed = are_placed(placements)
    kernel = compile_query_gradient(dq_win.dtype, head_dim, weight is not None, placed)
    chunks = QueryGradient(head_dim).num_chunks(dq_win)
    places, rows = place_arguments(placements), math.prod(leading)
    kernel(*branches, flat(dlogits), flat(weight), dq, *places, strides, rows, heads, chunks)
    return out


def _check(dq_cmp, dq_slc, dq_win, dlogits, weight, out, placements) -> None:
    """Raise on what the kernel cannot take."""
    check_head_rows("dq_win", dq_win)
    *leading, heads, head_dim = dq_win.shape
    like = (dq_win.dtype, dq_win.device)
    for name, x, placement in zip(("dq_cmp", "dq_slc"), (dq_cmp, dq_slc), placements, strict=True):
        check_branch(name, x, placement, dq_win)
    if (dlogits is None) != (weight is None):
        missing = "dlogits" if dlogits is None else "weight"
        raise ValueError(f"{missing} is None; dlogits and weight must both be given or neither")
    if weight is not None:
        check_tensor("dlogits", dlogits, (*leading, heads, 3), torch.float32, dq_win.device)
        check_tensor("weight", weight, (heads, 3, head_dim), *like)
    if out is not None:
        check_tensor("out", out, dq_win.shape, *like)
        check_output("out", out)
