"""The best blocks of one list, found by a CTA of 512 threads.

512 blocks are scored at a time, one a thread. The n-th largest of the half-warps' best scores is a
bar that n blocks reach at least; those that do, and are better than the n best so far, are few.
They go to shared memory, from where the first warp merges them into the best.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from nsa.fused.hardware import WARP
from nsa.fused.kernels.best_blocks import FORCED, NO_RANK, BestBlocks, rank_of
from nsa.fused.kernels.hopper import warp_prefix_sum

WARPS = 16
THREADS = WARPS * WARP
# Lanes that have one best score: there are as many of them as lanes in a warp.
_HALF = THREADS // WARP
# Below what every score gives.
_NOTHING = -0x80000000


class BestOfCta(BestBlocks):
    """The ``count`` best, forced blocks included, in the registers of the first warp."""

    def allocate(self, smem) -> tuple[cute.Tensor, ...]:
        return (
            smem.allocate_tensor(Int32, cute.make_layout(WARP), 16),
            smem.allocate_tensor(Int32, cute.make_layout(WARPS), 16),
            smem.allocate_tensor(Int64, cute.make_layout(1), 16),
            smem.allocate_tensor(Int64, cute.make_layout(THREADS), 16),
        )

    @cute.jit
    def find(
        self, shared, score_of, own: Int32, num_initial: Int32, num_local: Int32, blocks: Int32
    ) -> cute.Tensor:
        """The best of the first ``blocks`` blocks and of the forced ones, which end with ``own``.

        ``score_of(block)`` is the score of a block, which is not taken if that is -inf or NaN.
        """
        sBest, sCount, sBar, sWaiting = shared
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        initial_end = cutlass.min(num_initial, own + 1)
        local_begin = cutlass.max(own + 1 - num_local, initial_end)
        num_forced = initial_end + own + 1 - local_begin
        rBest = cute.make_rmem_tensor(self.registers, Int64)
        for r in cutlass.range_constexpr(self.registers):
            slot = r * WARP + lane
            block = slot if slot < initial_end else local_begin + slot - initial_end
            rBest[r] = Int64(FORCED) - block if slot < num_forced else Int64(NO_RANK)
        free_slots = self.count - num_forced
        bar = Int64(NO_RANK)
        blocks = blocks if free_slots > 0 else Int32(0)
        # All have some of few blocks, so that there are enough best scores for the bar.
        width = cutlass.min(cute.ceil_div(blocks, WARP), _HALF)
        for begin in cutlass.range(0, blocks, THREADS, unroll=1):
            block = begin + tidx // _HALF * width + tidx % _HALF
            score = score_of(cutlass.min(block, blocks - 1))
            free = block >= initial_end and (block < local_begin or block > own)
            # A score that is not equal to itself is NaN.
            free = free and tidx % _HALF < width and block < blocks and score == score
            rank = rank_of(score, block) if free else Int64(NO_RANK)
            free = free and rank > bar
            # Integers in the order of the scores.
            bits = Int32(rank >> 32) if free else Int32(_NOTHING)
            best = cute.arch.warp_reduction_max(bits, threads_in_group=_HALF)
            if tidx % _HALF == 0:
                sBest[tidx // _HALF] = best
            cute.arch.barrier()
            # As many blocks as there are free slots reach this, or it is below all.
            reached = self._nth_best(sBest[lane], free_slots, lane)
            wanted = free and bits >= reached
            ballot = cute.arch.vote_ballot_sync(wanted)
            if lane == 0:
                sCount[warp] = cute.arch.popc(ballot)
            cute.arch.barrier()
            counts = sCount[lane % WARPS] if lane < WARPS else Int32(0)
            ends = warp_prefix_sum(counts, lane)
            start = cute.arch.shuffle_sync(ends - counts, warp)
            if wanted:
                before = ballot & ((Int32(1) << lane) - 1)
                sWaiting[start + cute.arch.popc(before)] = rank
            cute.arch.barrier()
            if warp == 0:
                waiting = cute.arch.shuffle_sync(ends, WARP - 1)
                for first in cutlass.range(0, waiting, WARP, unroll=1):
                    place = first + lane
                    rank = sWaiting[cutlass.min(place, waiting - 1)]
                    rank = rank if place < waiting else Int64(NO_RANK)
                    self.merge(rBest, rank, lane)
                last, _ = self.bar(rBest)
                if lane == 0:
                    sBar[0] = last
            cute.arch.barrier()
            bar = sBar[0]
        return rBest

    @cute.jit
    def _nth_best(self, bits: Int32, nth: Int32, lane: Int32) -> Int32:
        """The ``nth`` largest of the lanes' ``bits``; below all if there are fewer lanes."""
        smaller = Int32(0)
        for other in cutlass.range_constexpr(WARP):
            value = cute.arch.shuffle_sync(bits, other)
            # Equal ones are in the order of lanes.
            ahead = value > bits or (value == bits and other < lane)
            smaller += Int32(1) if ahead else Int32(0)
        found = cute.arch.vote_ballot_sync(smaller == nth - 1)
        source = cute.arch.popc((found & -found) - 1)
        value = cute.arch.shuffle_sync(bits, source % WARP)
        return value if nth <= WARP else Int32(_NOTHING)
