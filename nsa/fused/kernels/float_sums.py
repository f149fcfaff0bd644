"""Float32 sums in global memory that many CTAs add to.

A row of sums holds each 16 columns in the order in which the threads of a quad have them after a
wgmma, so that a thread adds 16 bytes at a time. The conversion to the result's dtype restores the
order of the columns.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import QUAD
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import atomic_add_fp32x4, mlir_namedtuple, reshape_acc_to_mn
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_added,
    fake_flat,
    flat,
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


@mlir_namedtuple
class _Sums(NamedTuple):
    """Sums of keys or of values, and what is made of them.

    A quad is ``_QUAD_COLUMNS`` columns of a row.

    Attributes:
        total: the sums.
        out: where the gradients are written.
        last: gradients of the last keys of each entry, which are added.
        factor: multiplies the sums.
        quads: of the sums.
        of_entry: those of an entry.
        of_last: those of its last keys.
    """

    total: cute.Tensor
    out: cute.Tensor
    last: cute.Tensor | None
    factor: Float32
    quads: Int32
    of_entry: Int32
    of_last: Int32


class ConvertSums:
    """Writes rows of sums, times a factor, in a dtype and in the order of the columns.

    Gradients of the last keys are added before the sums are rounded, where they are given.
    """

    @cute.jit
    def __call__(self, first: _Sums, second: _Sums | None, stream):
        quads, tensors = first.quads, 1
        if const_expr(second is not None):
            quads, tensors = cutlass.max(quads, second.quads), 2
        self.kernel(first, second).launch(
            grid=[cute.ceil_div(quads, _THREADS), tensors, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, first: _Sums, second: _Sums | None):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, tensor, _ = cute.arch.block_idx()
        quad = bidx * _THREADS + tidx
        if const_expr(second is None):
            self._convert(first, quad)
        else:
            if tensor == 0:
                self._convert(first, quad)
            else:
                self._convert(second, quad)

    @cute.jit
    def _convert(self, sums: _Sums, quad: Int32):
        if quad < sums.quads:
            offset = Int64(quad) * _QUAD_COLUMNS
            halves = [load_vector(sums.total, offset + i * VECTOR) for i in range(2)]
            at, added = Int32(-1), [[], []]
            if const_expr(sums.last is not None):
                # Loads without a condition go out together; what is not wanted is not added.
                entry = quad // sums.of_entry
                at = quad - entry * sums.of_entry - (sums.of_entry - sums.of_last)
                last = (Int64(entry) * sums.of_last + cutlass.max(at, 0)) * _QUAD_COLUMNS
                added = [[load_vector(sums.last, last + i * VECTOR)] for i in range(2)]
            for i in cutlass.range_constexpr(2):
                # Column 8 i + 2 t + c stands at 4 t + 2 i + c: thread t of the quad had it.
                out = cute.make_rmem_tensor(VECTOR, Float32)
                for t in cutlass.range_constexpr(QUAD):
                    for c in cutlass.range_constexpr(2):
                        out[2 * t + c] = halves[t // 2][t % 2 * 4 + 2 * i + c]
                out.store(out.load() * sums.factor)
                for j in cutlass.range_constexpr(len(added[i])):
                    if at >= 0:
                        out.store(out.load() + added[i][j].load().to(Float32))
                store_vector(out.load(), sums.out, offset + i * VECTOR)


@kept
def compile_convert(dtype: torch.dtype, tensors: int, last: bool = False) -> Callable:
    """The kernel for keys and values, or for one of them; with gradients of last keys."""
    element = CUTE_DTYPES[dtype]

    def fakes() -> _Sums:
        flats = fake_flat(Float32), fake_flat(element), fake_flat(element if last else None)
        return _Sums(*flats, Float32(1.0), *(Int32(1) for _ in range(3)))

    return compile_kernel(ConvertSums(), fakes(), fakes() if tensors == 2 else None)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for tensors, last in ((1, False), (2, False), (2, True)):
            form = f"{tensors}{'-last' if last else ''}"
            compile_form = functools.partial(compile_convert, dtype, tensors, last)
            yield f"convert-sums-{name}-{form}", compile_form


def round_sums(
    sums: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: Sequence[float],
    last: Sequence[Tensor] | None = None,
) -> None:
    """See :func:`nsa.fused.kernel_calls.round_sums`."""
    if not any(out.numel() for out in outs):
        return
    if last is not None and not any(x.numel() for x in last):
        last = None  # nothing to add
    lasts = [None] * len(outs) if last is None else last
    parts = map(_sums, sums, outs, factors, lasts)
    first, second = (*parts, None)[:2]
    compile_convert(outs[0].dtype, len(outs), last is not None)(first, second)


def _sums(total: Tensor, out: Tensor, factor: float, last: Tensor | None) -> _Sums:
    of_entry, of_last = 1, 0
    if last is not None:
        check_added("last", last, out, (out.dtype,))
        of_entry, of_last = (math.prod(x.shape[-3:]) // _QUAD_COLUMNS for x in (out, last))
    quads = out.numel() // _QUAD_COLUMNS
    return _Sums(total.view(-1), out.view(-1), flat(last), factor, quads, of_entry, of_last)
