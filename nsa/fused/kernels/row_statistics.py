"""Row statistics of attention alone, from its results and their gradients."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.rows import row_lanes
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    dot,
    fake_flat,
    flat_rows,
    load_vector,
)

_THREADS = 256


@mlir_namedtuple
class _Tensors(NamedTuple):
    """What the statistics are computed from, then these."""

    dout: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    dlse: cute.Tensor | None
    lse_log2: cute.Tensor
    delta: cute.Tensor


class StatisticsKernel:
    """Computes ``lse * log2(e)`` and delta, the sum of ``dout * out``, for each row and head.

    With ``dlse``, delta is less by that: then ``dS = P * (dP - delta)`` has what comes through the
    log-sum-exp, whose derivative is P.
    """

    def __init__(self, head_dim_v: int):
        self.head_dim_v = head_dim_v
        self.lanes = row_lanes(head_dim_v)

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
        stream,
    ):
        grid = [cute.ceil_div(rows, _THREADS // self.lanes), 1, 1]
        self.kernel(tensors, strides, rows, heads).launch(
            grid=grid, block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        strides: cute.Stride,
        rows: Int32,
        heads: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        row, lane = bidx * (_THREADS // self.lanes) + tidx // self.lanes, tidx % self.lanes
        # Past the end, the last row again: all threads of a warp take part in the sum.
        source = cutlass.min(row, rows - 1)
        token, column = Int64(source // heads), source % heads * self.head_dim_v + lane * VECTOR
        loaded = []
        for k in cutlass.range_constexpr(self.head_dim_v // (self.lanes * VECTOR)):
            at = column + k * self.lanes * VECTOR
            rdO = load_vector(tensors.dout, token * strides[0] + at)
            loaded.append((rdO, load_vector(tensors.out, token * strides[1] + at)))
        delta = Float32(0.0)
        for rdO, rO in loaded:
            delta += dot(rdO.load().to(Float32), rO.load().to(Float32))
        delta = cute.arch.warp_reduction_sum(delta, threads_in_group=self.lanes)
        if lane == 0 and row < rows:
            lse = tensors.lse[row]
            tensors.lse_log2[row] = Float32.inf if lse == -Float32.inf else lse * LOG2_E
            if const_expr(tensors.dlse is not None):
                delta -= tensors.dlse[row]
            tensors.delta[row] = delta


@kept
def compile_statistics(dtype: torch.dtype, head_dim_v: int, with_dlse: bool) -> Callable:
    dlse = Float32 if with_dlse else None
    return compile_kernel(
        StatisticsKernel(head_dim_v),
        _Tensors(
            *(fake_flat(CUTE_DTYPES[dtype]) for _ in range(2)),
            *(fake_flat(x, alignment=4) for x in (Float32, dlse, Float32, Float32)),
        ),
        (Int64(1),) * 2,
        *(Int32(1), Int32(1)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, with_dlse in itertools.product((64, 96, 128, 256), (False, True)):
            statistics = functools.partial(compile_statistics, dtype, dim, with_dlse)
            yield f"row-statistics-{name}-{dim}{'-dlse' if with_dlse else ''}", statistics


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> RowStatistics:
    """See :func:`nsa.fused.kernel_calls.row_statistics`."""
    total, heads, head_dim_v = out.shape
    statistics = RowStatistics(*lse.new_empty(2, total, heads))
    (dout, do_stride), (out, out_stride) = map(flat_rows, (dout, out))
    lse, dlse = (None if x is None else x.contiguous().view(-1) for x in (lse, dlse))
    compile_statistics(out.dtype, head_dim_v, dlse is not None)(
        _Tensors(dout, out, lse, dlse, *(x.view(-1) for x in statistics)),
        (do_stride, out_stride),
        *(total * heads, heads),
    )
    return statistics
