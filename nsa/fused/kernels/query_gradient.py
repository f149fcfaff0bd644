"""Gradient of the queries: the sum of the branches' and of the gates', in one pass over memory.

``dq = dq_cmp + dq_slc + dq_win + sum_i dlogits[i] * weight[h, i]`` per row and head, in float32 and
rounded once, where ``g_i = sigmoid(<q, weight[h, i]>)`` and ``dlogits`` are the gradients of what
the sigmoids take. Tiled as :mod:`nsa.fused.kernels.head_rows` says.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernel_inputs import IN_ORDER, Placements
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.head_rows import (
    PLACED,
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
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

# 9 accesses of 16 bytes that a thread issues together, as many as the gating kernels do.
_ROWS_IN_FLIGHT = 3


@mlir_namedtuple
class _Tensors(NamedTuple):
    """The branches' gradients, those of the logits, the weight, and the result."""

    dq_cmp: cute.Tensor
    dq_slc: cute.Tensor
    dq_win: cute.Tensor
    dlogits: cute.Tensor | None
    weight: cute.Tensor | None
    dq: cute.Tensor


class QueryGradient(HeadRows):
    """``strides`` are the elements from row to row of the branches' gradients and of ``dq``.

    That of a branch with a placement is not looked at. ``dq`` may be that of a branch without: a
    thread reads its elements before it writes them.
    """

    def __init__(self, head_dim: int):
        super().__init__(head_dim, _ROWS_IN_FLIGHT)

    @cute.kernel
    def kernel(self, tensors: _Tensors, places: Places, strides: cute.Stride, sizes: HeadSizes):
        rows, heads, chunks = sizes
        mdLogits = tensors.dlogits
        head, chunk, first, column, active = self.place(heads)
        in_row = head * self.head_dim + column
        rW = self.load_weight(tensors.weight, head, column)
        branches = (tensors.dq_cmp, tensors.dq_slc, tensors.dq_win)
        layouts = (places.cmp_layout, places.slc_layout, None)
        columns = tuple(self.in_place(layouts[i], head, column) for i in range(3))
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            placed = self.load_places((places.cmp, places.slc), step, first, rows)
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = step * self.rows_per_step + u * self.rows_in_parallel + first
                # Past the end, the last row is read again: a load under a condition would wait.
                source = Int64(cutlass.min(row, rows - 1))
                row_places = (*placed[u], None)
                dlogits = ()
                if const_expr(tensors.weight is not None):
                    dlogits = tuple(mdLogits[(source * heads + head) * 3 + i] for i in range(3))
                offsets = [
                    self.offset(row_places[i], layouts[i], source, strides[i], columns[i])
                    for i in range(3)
                ]
                fragments = tuple(map(load_vector, branches, offsets))
                loaded.append((row, source, row_places, dlogits, fragments))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row, source, row_places, dlogits, fragments = loaded[u]
                if row < rows and active:
                    for i in cutlass.range_constexpr(2):
                        self.clear_unplaced(fragments[i], row_places[i])
                    dq = cute.full(VECTOR, 0.0, Float32)
                    for i in cutlass.range_constexpr(3):
                        dq = dq + fragments[i].load().to(Float32)
                        if const_expr(tensors.weight is not None):
                            dq = dq + rW[None, i].load() * dlogits[i]
                    store_vector(dq, tensors.dq, source * strides[3] + in_row)


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
        _Tensors(
            *(fake_flat(element) for _ in range(3)),
            fake_flat(Float32 if with_weight else None),
            fake_flat(element if with_weight else None),
            fake_flat(element),
        ),
        fake_places(placed),
        (Int64(1),) * 4,
        fake_sizes(),
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
    """See :func:`nsa.fused.kernel_calls.query_gradient`."""
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
    tensors = _Tensors(*branches, flat(dlogits), flat(weight), dq)
    sizes = HeadSizes(math.prod(leading), heads, chunks)
    kernel(tensors, place_arguments(placements), strides, sizes)
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
