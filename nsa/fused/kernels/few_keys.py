"""The delta of queries that see a few keys, from these keys themselves.

Delta is the sum of P * dP over the keys of a row. As the product of the output and its gradient it
has the error of the output's rounding, which does not cancel in dS where keys are few. A row's
threads compute P and dP of each key here, in float32. Tiled as :mod:`nsa.fused.kernels.head_rows`
says.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import MOST_FEW_KEYS, FewKeys, Placement, RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.head_rows import (
    THREADS,
    HeadRows,
    HeadSizes,
    check_branch,
    check_placement,
    fake_sizes,
    vector_of,
)
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    check_tensor,
    dot,
    fake_flat,
    flat_rows,
    load_vector,
)

_Layout = tuple[Int32, Int32, Int32, Int32]


@mlir_namedtuple
class _Tensors(NamedTuple):
    """What :func:`few_key_deltas` takes; a place is None where rows follow each other."""

    dout: cute.Tensor
    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    lse_log2: cute.Tensor
    delta: cute.Tensor
    query: cute.Tensor
    first: cute.Tensor
    keys: cute.Tensor
    dout_place: cute.Tensor | None
    statistics_place: cute.Tensor | None


@mlir_namedtuple
class _Options(NamedTuple):
    """The numbers of the placements, query heads of a KV head, the scale times log2(e)."""

    dout_layout: _Layout | None
    statistics_layout: _Layout
    group: Int32
    scale_log2: Float32


class FewKeyDeltas(HeadRows):
    """``strides`` are the elements from row to row of ``dout``, ``q``, ``k`` and ``v``."""

    def __init__(self, head_dim: int):
        super().__init__(head_dim, rows_in_flight=1)

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        options: _Options,
        strides: cute.Stride,
        sizes: HeadSizes,
        stream,
    ):
        self.kernel(tensors, options, strides, sizes).launch(
            grid=[sizes.chunks * sizes.heads, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, options: _Options, strides: cute.Stride, sizes: HeadSizes):
        rows, heads, chunks = sizes
        head, chunk, first, column, active = self.place(heads)
        lane = cute.arch.thread_idx()[0] % self.threads_per_row
        in_row = head * self.head_dim + column
        in_key = head // options.group * self.head_dim + column
        for step in cutlass.range(chunk, cute.ceil_div(rows, self.rows_per_step), chunks):
            index = step * self.rows_per_step + first
            source = Int64(cutlass.min(index, rows - 1))
            query, key, count = (mX[source] for mX in (tensors.query, tensors.first, tensors.keys))
            # What a row that is none reads is left out.
            row = Int64(cutlass.max(query, 0))
            place, layout = None, options.dout_layout
            if const_expr(tensors.dout_place is not None):
                place = tensors.dout_place[row]
            start = self.offset(place, layout, row, strides[0], self.in_place(layout, head, column))
            place = query
            if const_expr(tensors.statistics_place is not None):
                place = tensors.statistics_place[row]
            layout = options.statistics_layout
            statistic = Int64(cutlass.max(place, 0)) * layout[0] + vector_of(layout, head)
            lse_log2 = tensors.lse_log2[statistic]
            dout = load_vector(tensors.dout, start)
            q = load_vector(tensors.q, row * strides[1] + in_row)
            keys, values = [], []
            for i in cutlass.range_constexpr(MOST_FEW_KEYS):
                at = Int64(key + cutlass.min(Int32(i), count - 1))
                keys.append(load_vector(tensors.k, at * strides[2] + in_key))
                values.append(load_vector(tensors.v, at * strides[3] + in_key))
            total, product = Float32(0.0), Float32(0.0)
            for i in cutlass.range_constexpr(MOST_FEW_KEYS):
                score = self.row_sum(_product(q, keys[i]), active)
                weight = cute.math.exp2(score * options.scale_log2 - lse_log2, fastmath=True)
                weight = weight if i < count else Float32(0.0)
                total += weight
                product += weight * self.row_sum(_product(dout, values[i]), active)
            if lane == 0 and index < rows and query >= 0 and place >= 0 and total > 0.0:
                tensors.delta[statistic] = product / total


def _product(a: cute.Tensor, b: cute.Tensor) -> Float32:
    return dot(a.load().to(Float32), b.load().to(Float32))


@kept
def compile_deltas(
    dtype: torch.dtype, head_dim: int, dout_placed: bool, statistics_placed: bool
) -> Callable:
    """The compiled kernel; the last two say which placements have places."""
    layout, places = (Int32(1),) * 4, (dout_placed, statistics_placed)
    return compile_kernel(
        FewKeyDeltas(head_dim),
        _Tensors(
            *(fake_flat(CUTE_DTYPES[dtype]) for _ in range(4)),
            *(fake_flat(Float32, alignment=4) for _ in range(2)),
            *(fake_flat(Int32, alignment=4) for _ in range(3)),
            *(fake_flat(Int32 if x else None, alignment=4) for x in places),
        ),
        _Options(layout if dout_placed else None, layout, Int32(1), Float32(1.0)),
        (Int64(1),) * 4,
        fake_sizes(),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 96, 128, 256):
            for placed in ((False, False), (False, True), (True, True)):
                name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{sum(placed)}"
                arguments = (dtype, head_dim, *placed)
                yield f"few-keys-{name}", functools.partial(compile_deltas, *arguments)


_geometry = functools.cache(FewKeyDeltas)


def few_key_deltas(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    few: FewKeys,
    scale: float,
    statistics_placement: Placement,
    placement: Placement | None,
) -> None:
    """See :func:`nsa.fused.kernel_calls.few_key_deltas`."""
    check_branch("dout", dout, placement, q)
    for name, x in zip(RowStatistics._fields, statistics, strict=True):
        check_tensor(name, x, x.shape, torch.float32, q.device)
        check_placement(name, x, statistics_placement, q)
    rows = few.query.numel()
    if not (rows and k.numel()):
        return
    heads, head_dim = q.shape[-2:]
    tensors, strides = zip(*map(flat_rows, (dout, q, k, v)), strict=True)
    places = (None if placement is None else placement.place, statistics_placement.place)
    layouts = (None if x is None else tuple(x[1:]) for x in (placement, statistics_placement))
    candidates = few.query.view(rows, 1, 1).expand(rows, heads, 1)
    compile_deltas(q.dtype, head_dim, *(x is not None for x in places))(
        _Tensors(*tensors, *(x.view(-1) for x in statistics), *few, *places),
        _Options(*layouts, heads // k.shape[-2], scale * LOG2_E),
        strides,
        HeadSizes(rows, heads, _geometry(head_dim).num_chunks(candidates)),
    )
