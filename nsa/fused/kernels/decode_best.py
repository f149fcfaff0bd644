"""The best of many ranked blocks, found by a CTA: each thread brings some ranks at a time.

As many of the threads' best ranks as blocks are wanted reach a bar; so whatever does not reach it
is not among the best, and what does is little. It goes to shared memory, where the place of each
rank is the number of those above it. All ranks are different (:func:`rank_of`), so each has its own
place, whatever the order in which they came.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr

from nsa.fused.hardware import WARP
from nsa.fused.kernels.best_blocks import FORCED, NO_RANK, rank_of

# Neighbouring threads that have one best rank, where those are enough.
_SHARE = 4


class BestOfCta:
    """The ``count`` best, of up to ``per_thread`` ranks that each thread adds at a time."""

    def __init__(self, count: int, threads: int, per_thread: int):
        self.count = count
        self.threads = threads
        self.per_thread = per_thread
        # There must be as many best ranks as blocks are wanted.
        self.share = _SHARE if count <= threads // _SHARE else 1

    @property
    def words(self) -> int:
        """int64 numbers of shared memory that :meth:`views` needs."""
        groups = self.threads // self.share
        return groups + self.count * (self.per_thread * self.share + 2) + 2

    def views(self, memory: cute.Pointer) -> tuple[cute.Tensor, ...]:
        """In ``memory``: bests of threads, the best so far and candidates, the next best, the bar,
        and how many candidates there are."""
        groups = self.threads // self.share
        sLargest = cute.make_tensor(memory, cute.make_layout(groups))
        memory = memory + groups
        kept = self.count * (self.per_thread * self.share + 1)
        sKept = cute.make_tensor(memory, cute.make_layout(kept))
        sNext = cute.make_tensor(memory + kept, cute.make_layout(self.count))
        sBar = cute.make_tensor(memory + kept + self.count, cute.make_layout(1))
        number = cute.recast_ptr(memory + kept + self.count + 1, dtype=Int32)
        return sLargest, sKept, sNext, sBar, cute.make_tensor(number, cute.make_layout(1))

    @cute.jit
    def reset(self, shared, tidx: Int32):
        """Begin with no rank. The threads meet in :meth:`add` before they read this."""
        if tidx < self.count:
            shared[1][tidx] = Int64(NO_RANK)

    @cute.jit
    def add(self, shared, ranks: cute.Tensor, tidx: Int32):
        """Take the best of those so far and of all threads' ``ranks``.

        The best so far are the first of ``shared[1]``, best first, after the next barrier.
        """
        sLargest, sKept, sNext, sBar, sNumber = shared
        lane = tidx % WARP
        largest = ranks[0]
        for r in cutlass.range_constexpr(1, self.per_thread):
            largest = cutlass.max(largest, ranks[r])
        for stride in cutlass.range_constexpr(1, self.share):
            if const_expr(stride & (stride - 1) == 0):
                other = cute.arch.shuffle_sync_bfly(largest, offset=stride)
                largest = cutlass.max(largest, other)
        if tidx % self.share == 0:
            sLargest[tidx // self.share] = largest
        if tidx < self.count:
            sNext[tidx] = Int64(NO_RANK)
        if tidx == 0:
            sBar[0] = Int64(NO_RANK)
            sNumber[0] = Int32(0)
        cute.arch.barrier()
        # So many threads have a rank that reaches this one, that it is the bar.
        above = self.number_above(sLargest, self.threads // self.share, largest)
        if above == self.count - 1 and largest > Int64(NO_RANK):
            sBar[0] = largest
        cute.arch.barrier()
        bar, last = sBar[0], sKept[self.count - 1]
        ballots, number = [], Int32(0)
        for r in cutlass.range_constexpr(self.per_thread):
            wanted = ranks[r] >= bar and ranks[r] > last
            ballots.append(cute.arch.vote_ballot_sync(wanted))
            number += cute.arch.popc(ballots[r])
        place = Int32(0)
        if lane == 0 and number > 0:
            place = cute.arch.atomic_add(sNumber.iterator, number)
        place = cute.arch.shuffle_sync(place, 0) + self.count
        for r in cutlass.range_constexpr(self.per_thread):
            before = cute.arch.popc(ballots[r] & ((Int32(1) << lane) - 1))
            if (ballots[r] >> lane) & 1 == 1:
                sKept[place + before] = ranks[r]
            place += cute.arch.popc(ballots[r])
        cute.arch.barrier()
        self.sort(sKept, sNext, self.count + sNumber[0], tidx)
        cute.arch.barrier()
        if tidx < self.count:
            sKept[tidx] = sNext[tidx]

    @cute.jit
    def sort(self, sRanks: cute.Tensor, sBest: cute.Tensor, number: Int32, tidx: Int32):
        """Write the ``count`` best of the first ``number`` ranks to ``sBest``, best first.

        Where there are fewer, the rest of ``sBest`` stays as it is.
        """
        for i in cutlass.range(tidx, number, self.threads, unroll=1):
            rank = sRanks[i]
            above = self.number_above(sRanks, number, rank)
            if rank > Int64(NO_RANK) and above < self.count:
                sBest[above] = rank

    @cute.jit
    def number_above(self, sRanks: cute.Tensor, number: Int32, rank: Int64) -> Int32:
        above = Int32(0)
        for i in cutlass.range(number, unroll=8):
            above += Int32(1) if sRanks[i] > rank else Int32(0)
        return above

    @cute.jit
    def place_in_list(
        self, sBest: cute.Tensor, i: Int32, limit: Int32 | None = None
    ) -> tuple[Int32, Int32, Int32]:
        """(Block of the best number ``i``, its place in the list, blocks in the list).

        Only blocks below ``limit`` are listed, in their order. Without one the block is -1, and its
        place is behind them and of no other ``i``.
        """
        own = _block_of(sBest[cutlass.min(i, self.count - 1)], limit)
        own = own if i < self.count else Int32(-1)
        place, listed, before = Int32(0), Int32(0), Int32(0)
        for j in cutlass.range(self.count, unroll=8):
            block = _block_of(sBest[j], limit)
            is_listed = block >= 0
            listed += Int32(1) if is_listed else Int32(0)
            before += Int32(1) if is_listed and j < i else Int32(0)
            place += Int32(1) if is_listed and block < own else Int32(0)
        return own, place if own >= 0 else listed + i - before, listed


@cute.jit
def block_rank(
    score: Float32, block: Int32, own: Int32, num_initial: Int32, num_local: Int32, real: Boolean
) -> Int64:
    """The rank of a block up to ``own``, with the first and last ones forced.

    It is that of no block where there is none, and where the score is NaN.
    """
    forced = block < num_initial or block > own - num_local
    rank = Int64(FORCED) - block if forced else rank_of(score, block)
    # A score that is not equal to itself is NaN.
    real = real and block <= own and (forced or score == score)
    return rank if real else Int64(NO_RANK)


@cute.jit
def _block_of(rank: Int64, limit: Int32 | None) -> Int32:
    """The block of a rank, -1 where it is not listed."""
    block = ~rank.to(Int32)
    listed = rank > Int64(NO_RANK)
    if const_expr(limit is not None):
        listed = listed and block < limit
    return block if listed else Int32(-1)
