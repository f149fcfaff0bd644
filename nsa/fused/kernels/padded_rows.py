"""Row statistics in the form of FlashAttention-4's backward: each sequence starts at a new tile.

A thread copies the statistics of one row and head, or writes those of padding, where P is 0. The
rows may lie apart, as those of folded queries do; neighbouring CTAs take neighbouring heads, which
are then neighbours in memory.
"""

import functools
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from torch import Tensor

from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept

_THREADS = 128


class PadStatistics:
    """``lse_log2`` and ``delta (B, H, S)`` to ``(B, H, rows)``.

    With ``bounds (sequences + 1,)`` the batch is one row of packed sequences, of which number ``i``
    starts at the multiple of ``tile`` that is the largest up to ``bounds[i] + i * tile``.
    """

    def __init__(self, tile: int):
        self.tile = tile

    @cute.jit
    def __call__(
        self,
        mLseLog2: cute.Tensor,
        mDelta: cute.Tensor,
        mPaddedLse: cute.Tensor,
        mPaddedDelta: cute.Tensor,
        mBounds: cute.Tensor | None,
        stream,
    ):
        batch, heads, rows = mPaddedLse.shape
        self.kernel(mLseLog2, mDelta, mPaddedLse, mPaddedDelta, mBounds).launch(
            grid=[heads, cute.ceil_div(rows, _THREADS), batch],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mLseLog2: cute.Tensor,
        mDelta: cute.Tensor,
        mPaddedLse: cute.Tensor,
        mPaddedDelta: cute.Tensor,
        mBounds: cute.Tensor | None,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        head, tile, entry = cute.arch.block_idx()
        row = tile * _THREADS + tidx
        if row < mPaddedLse.shape[2]:
            source, end = row, mLseLog2.shape[2]
            if const_expr(mBounds is not None):
                sequence = self._find_sequence(mBounds, row)
                end = mBounds[sequence + 1]
                source = row - self._start(mBounds, sequence) + mBounds[sequence]
            lse_log2, delta = Float32.inf, Float32(0.0)
            if source < end:
                lse_log2 = mLseLog2[entry, head, source]
                delta = mDelta[entry, head, source]
            mPaddedLse[entry, head, row] = lse_log2
            mPaddedDelta[entry, head, row] = delta

    @cute.jit
    def _start(self, mBounds: cute.Tensor, sequence: Int32) -> Int32:
        return (mBounds[sequence] + sequence * self.tile) // self.tile * self.tile

    @cute.jit
    def _find_sequence(self, mBounds: cute.Tensor, row: Int32) -> Int32:
        """The last sequence that starts at or before ``row``."""
        low, high = Int32(0), mBounds.shape[0] - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._start(mBounds, middle) <= row:
                low = middle
            else:
                high = middle
        return low


@kept
def compile_padding(tile: int | None) -> Callable:
    """The compiled kernel; ``tile`` for packed sequences, None for a batch."""
    batch, heads, length, rows = (cute.sym_int() for _ in range(4))
    given = (_fake(Float32, (batch, heads, length), cute.sym_int64()) for _ in range(2))
    padded = (_fake(Float32, (batch, heads, rows), 1) for _ in range(2))
    bounds = None if tile is None else _fake(Int32, (cute.sym_int(),), 1)
    return compile_kernel(PadStatistics(tile or 1), *given, *padded, bounds)


def _fake(element: type[cutlass.Numeric], shape: tuple, last_stride) -> cute.Tensor:
    strides = (*(cute.sym_int64() for _ in shape[:-1]), last_stride)
    return cute.runtime.make_fake_tensor(element, shape, stride=strides, assumed_align=4)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for tile in (None, 48, 64, 80, 128):
        yield f"padded-rows-{tile}", functools.partial(compile_padding, tile)


def pad_statistics(statistics: RowStatistics, rows: int, tile: int, bounds: Tensor | None):
    """Statistics ``(B, H, rows)``, or ``(H, rows)`` of packed sequences, from those of the queries.

    Args:
        statistics: ``(B, H, S)``, or ``(H, T)`` with ``bounds``; any strides.
        rows: at least the last row of the last sequence.
        tile: queries of a tile; sequences start at multiples of it.
        bounds: int32 ``(S + 1,)``, boundaries of packed queries.
    """
    heads = statistics.delta.shape[:-1]
    padded = torch.empty((2, *heads, rows), dtype=torch.float32, device=statistics.delta.device)
    lse_log2, delta = padded
    pairs = (*statistics, lse_log2, delta)
    if bounds is not None:
        pairs = tuple(x[None] for x in pairs)
    compile_padding(None if bounds is None else tile)(*pairs, bounds)
    return RowStatistics(lse_log2, delta)
