"""The best of many ranked blocks, kept in the registers of a warp.

A block is ranked by one int64, all different: the high half orders the scores, the low half the
blocks of equal score, the lower index first.
"""

import math

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64

from nsa.fused.hardware import WARP

FORCED = 0x7FFFFFFFFFFFFFFF
"""Less the index of a block: a rank above every score's."""

LOWEST = -3.4028234663852886e38
"""Below every finite score of every block, above -inf: what is not above it is not taken."""

NO_RANK = ((-0x00800001) ^ 0x7FFFFFFF) << 32
"""Below the rank of every block that is taken."""

_LOW_HALF = 0xFFFFFFFF
_NO_INDEX = 0x7FFFFFFF


class BestBlocks:
    """The ``count`` best, in ``registers`` of each lane, descending over lanes, then registers."""

    def __init__(self, count: int):
        self.count = count
        # The merge needs a power of two.
        self.registers = 1 << math.ceil(math.log2(max(1, count / WARP)))

    def merge(self, rBest: cute.Tensor, waiting: Int64, lane: Int32) -> None:
        """The best of ``rBest`` and a rank in each lane, in the order of ``rBest``."""
        waiting = sorted_lanes(waiting, lane)
        # One of two sorted sequences is reversed. The larger of the two at each place are then the
        # best, in bitonic order, which the exchanges below sort. All but the last register have
        # nothing to be compared with.
        waiting = cute.arch.shuffle_sync(waiting, WARP - 1 - lane)
        best = [rBest[r] for r in range(self.registers)]
        best[-1] = cutlass.max(best[-1], waiting)
        for stride in reversed(_powers(1, self.registers // 2)):
            for r in range(self.registers):
                if r & stride == 0:
                    low, high = best[r], best[r + stride]
                    best[r], best[r + stride] = cutlass.max(low, high), cutlass.min(low, high)
        for stride in reversed(_powers(1, WARP // 2)):
            larger = lane & stride == 0
            best = [_exchange(x, stride, larger) for x in best]
        for r in range(self.registers):
            rBest[r] = best[r]

    def bar(self, rBest: cute.Tensor) -> tuple[Int64, Float32]:
        """Rank and score of the last of the ``count`` best."""
        register, lane = divmod(self.count - 1, WARP)
        bar = cute.arch.shuffle_sync(rBest[register], lane)
        return bar, _score(bar)

    @cute.jit
    def write(
        self,
        rBest: cute.Tensor,
        mOut: cute.Tensor,
        offset: Int64,
        lane: Int32,
    ):
        """The first ``count`` blocks of ``rBest``, by index, -1 where there is none."""
        blocks = []
        for r in cutlass.range_constexpr(self.registers):
            block = ~rBest[r].to(Int32)
            taken = r * WARP + lane < self.count and rBest[r] > NO_RANK
            blocks.append(block if taken else Int32(_NO_INDEX))
        blocks = self._sorted(blocks, lane)
        for r in cutlass.range_constexpr(self.registers):
            slot = r * WARP + lane
            if slot < self.count:
                mOut[offset + slot] = blocks[r] if blocks[r] != _NO_INDEX else Int32(-1)

    def _sorted(self, x: list[Int32], lane: Int32) -> list[Int32]:
        """``x`` ascending over registers, then lanes, by bitonic sort."""
        for size in _powers(2, self.registers * WARP):
            for stride in reversed(_powers(1, size // 2)):
                if stride < WARP:
                    for r in range(self.registers):
                        slot = r * WARP + lane
                        larger = ((slot // size) ^ (slot // stride)) & 1 == 1
                        x[r] = _exchange(x[r], stride, larger)
                    continue
                for r in range(self.registers):
                    other = r + stride // WARP
                    if r & (stride // WARP) == 0:
                        low, high = cutlass.min(x[r], x[other]), cutlass.max(x[r], x[other])
                        ascending = r * WARP & size == 0
                        x[r], x[other] = (low, high) if ascending else (high, low)
        return x


def _powers(first: int, last: int) -> list[int]:
    """Powers of two from ``first`` to ``last``."""
    return [1 << e for e in range(first.bit_length() - 1, last.bit_length())]


def sorted_lanes(x, lane: Int32):
    """The lanes' ``x``, none of them NaN, descending over lanes."""
    for size in _powers(2, WARP):
        for stride in reversed(_powers(1, size // 2)):
            larger = ((lane // size) ^ (lane // stride)) & 1 == 0
            x = _exchange(x, stride, larger)
    return x


@cute.jit
def _exchange(x, stride: int, larger: Boolean):
    """The larger or the smaller of this lane's ``x`` and that of the lane ``stride`` away."""
    other = cute.arch.shuffle_sync_bfly(x, offset=stride)
    return other if (other > x) == larger else x


@cute.jit
def rank_of(score: Float32, block: Int32) -> Int64:
    """The rank of a block that is not forced. A NaN must not be taken."""
    bits = score.bitcast(Int32)
    bits = Int32(0) if bits == -0x80000000 else bits  # -0.0 is 0.0
    high = bits if bits >= 0 else bits ^ 0x7FFFFFFF
    return (Int64(high) << 32) + (Int64(_LOW_HALF) - block)


@cute.jit
def _score(rank: Int64) -> Float32:
    """The score of a rank; NaN where the block is forced."""
    high = Int32(rank >> 32)
    bits = high if high >= 0 else high ^ 0x7FFFFFFF
    return bits.bitcast(Float32)
