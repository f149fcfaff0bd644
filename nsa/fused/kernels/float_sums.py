"""Float32 sums in global memory that many CTAs add to.

A row of sums holds each 16 columns in the order in which the threads of a quad have them after a
wgmma, so that a thread adds 16 bytes at a time. The conversion to the result's dtype restores the
order of the columns.
"""

import functools
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from torch import Tensor

from nsa.fused.hardware import QUAD
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import atomic_add_fp32x4, reshape_acc_to_mn
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    fake_flat,
    load_vector,
    store_vector,
)

_THREADS = 256
# Columns of a row of sums that a quad of threads adds together, 4 each.
_QUAD_COLUMNS = 4 * QUAD


@cute.jit
def add_row(
    acc: cute.Tensor, r: cutlass.Constexpr[int], mSum: cute.Tensor, offset: Int64, lane: Int32
):
    """Add the thread's row ``r`` of a wgmma accumulator to the row of sums at ``offset``."""
    row = reshape_acc_to_mn(acc)[r, None]
    pointer = mSum.iterator + (offset + lane % QUAD * 4)
    for i in cutlass.range_constexpr(cute.size(row) // 4):
        values = tuple(row[4 * i + j] for j in range(4))
        atomic_add_fp32x4(*values, pointer + i * _QUAD_COLUMNS)


class ConvertSums:
    """Writes rows of sums, times a factor, in a dtype and in the order of the columns."""

    @cute.jit
    def __call__(self, mSum: cute.Tensor, mX: cute.Tensor, quads: Int32, factor: Float32, stream):
        self.kernel(mSum, mX, quads, factor).launch(
            grid=[cute.ceil_div(quads, _THREADS), 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mSum: cute.Tensor, mX: cute.Tensor, quads: Int32, factor: Float32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        quad = bidx * _THREADS + tidx
        if quad < quads:
            offset = Int64(quad) * _QUAD_COLUMNS
            halves = [load_vector(mSum, offset + i * VECTOR) for i in range(2)]
            for i in cutlass.range_constexpr(2):
                # Column 8 i + 2 t + c stands at 4 t + 2 i + c: thread t of the quad had it.
                out = cute.make_rmem_tensor(VECTOR, Float32)
                for t in cutlass.range_constexpr(QUAD):
                    for c in cutlass.range_constexpr(2):
                        out[2 * t + c] = halves[t // 2][t % 2 * 4 + 2 * i + c]
                store_vector(out.load() * factor, mX, offset + i * VECTOR)


@kept
def compile_convert(dtype: torch.dtype) -> Callable:
    tensors = fake_flat(Float32), fake_flat(CUTE_DTYPES[dtype])
    return compile_kernel(ConvertSums(), *tensors, Int32(1), Float32(1.0))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"convert-sums-{name}", functools.partial(compile_convert, dtype)


def convert_sums(sums: Tensor, shape: tuple[int, ...], dtype: torch.dtype, factor: float) -> Tensor:
    """``factor * sums`` as a new tensor; ``sums`` is flat float32, the rows a multiple of 16."""
    out = torch.empty(shape, dtype=dtype, device=sums.device)
    round_sums(sums, out, factor)
    return out


def round_sums(sums: Tensor, out: Tensor, factor: float) -> None:
    """See :func:`nsa.fused.kernel_calls.round_sums`."""
    if out.numel():
        convert = compile_convert(out.dtype)
        convert(sums.view(-1), out.view(-1), out.numel() // _QUAD_COLUMNS, factor)
