"""Decoding's lists of selected blocks: chosen by the CTAs of a cluster, or read.

Each CTA scores its share of the blocks and finds the best of them. All then read the best of each,
so that all have the same list.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import MAX_LISTED, DecodeRule
from nsa.fused.hardware import WARP
from nsa.fused.kernels.best_blocks import NO_RANK
from nsa.fused.kernels.decode_best import BestOfCta, block_rank
from nsa.fused.kernels.decode_outputs import load_peer
from nsa.fused.kernels.decode_scores import BlockScores, RecordTensors

# Ranks that a thread brings at a time.
_RANKS = 4
# Records of heads that a thread loads together.
_LOADS = 16


class BlockLists:
    """Lists of ``count`` blocks for ``group`` query heads, by ``cluster`` CTAs of some warps.

    ``record_groups`` groups of slots were recorded together.
    """

    def __init__(
        self, rule: DecodeRule, group: int, count: int, cluster: int, warps: int,
        record_groups: int,
    ):  # fmt: skip
        self.rule = rule
        self.cluster = cluster
        self.warps = warps
        per_thread = min(_RANKS, rule.group_blocks)
        # Blocks that are scored together.
        self.pass_blocks = warps * WARP * per_thread
        self.best = BestOfCta(count, warps * WARP, per_thread)
        self.scores = BlockScores(rule, group, warps, record_groups)
        # Groups that a thread scores together: each trip to memory delays what follows, but the
        # code takes time to load where a CTA has few groups.
        most = max(1, self.pass_blocks // rule.group_blocks // WARP)
        self.together = min(most, max(1, _LOADS // self.scores.each), max(1, 8 // cluster))

    @cute.jit
    def select(
        self, records: RecordTensors, groups: Int32, forced: tuple[Int32, Int32],
        ring: cute.Pointer, bests, compressed, position: Int32, record_row: Int64, rank: Int32,
        tidx: Int32,
    ):  # fmt: skip
        """Write the ranks of the best blocks to ``bests[1]``, best first, in all CTAs.

        ``groups`` have room in the records of a row; ``forced`` are the numbers of first and last
        blocks that are taken. The ring of tiles, which is empty, has what this needs in shared
        memory.
        """
        layout = cute.make_ordered_layout((self.warps, self.pass_blocks), order=(1, 0))
        sPartial = cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), layout)
        memory = cute.recast_ptr(ring, dtype=Int64) + self.warps * self.pass_blocks // 2
        shared = self.best.views(memory)
        self.best.reset(shared, tidx)
        # The sums of the parts, too, are there.
        cute.arch.barrier()
        own = position // self.rule.select_size
        seen = (position + 1) // self.rule.stride
        scored = own // self.rule.group_blocks + 1
        share = cute.ceil_div(scored, self.cluster)
        first = rank * share
        last = cutlass.min(first + share, scored)
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        pass_groups = const_expr(self.pass_blocks // self.rule.group_blocks)
        for begin in cutlass.range(first, last, pass_groups, unroll=1):
            here = cutlass.min(last - begin, pass_groups)
            for some in cutlass.range(0, here, WARP * self.together, unroll=1):
                loaded, places = [], []
                for i in cutlass.range_constexpr(self.together):
                    place = some + (i * WARP + lane)
                    places.append(place)
                    group = cutlass.min(begin + place, last - 1)
                    loaded.append(self.scores.load(records, groups, record_row, group, warp))
                for i in cutlass.range_constexpr(self.together):
                    group = cutlass.min(begin + places[i], last - 1)
                    scores = self.scores.add_up(loaded[i], compressed, seen, group, warp)
                    if places[i] < here:
                        sRow = cute.local_tile(
                            sPartial[warp, None], (self.rule.group_blocks,), (places[i],)
                        )
                        cute.autovec_copy(scores, sRow)
            cute.arch.barrier()
            scores = cute.make_rmem_tensor(self.best.per_thread, Float32)
            scores.fill(0.0)
            for w in cutlass.range_constexpr(self.warps):
                partial = cute.make_rmem_tensor(self.best.per_thread, Float32)
                sRow = cute.local_tile(sPartial[w, None], (self.best.per_thread,), (tidx,))
                cute.autovec_copy(sRow, partial)
                for r in cutlass.range_constexpr(self.best.per_thread):
                    scores[r] = scores[r] + partial[r]
            ranks = cute.make_rmem_tensor(self.best.per_thread, Int64)
            for r in cutlass.range_constexpr(self.best.per_thread):
                block = tidx * self.best.per_thread + r
                real = block < here * self.rule.group_blocks
                block += begin * self.rule.group_blocks
                ranks[r] = block_rank(scores[r], block, own, *forced, real)
            self.best.add(shared, ranks, tidx)
        cute.arch.barrier()
        sShare, sBest = bests
        if tidx < self.best.count:
            kept = shared[1][tidx]
            sShare[tidx] = kept
            sBest[tidx] = kept if const_expr(self.cluster == 1) else Int64(NO_RANK)
        if const_expr(self.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
            number = const_expr(self.cluster * self.best.count)
            sAll = cute.make_tensor(memory + self.best.words, cute.make_layout(number))
            if tidx < self.best.count:
                for peer in cutlass.range_constexpr(self.cluster):
                    rank_there = load_peer(sShare, tidx, peer, self.cluster)
                    sAll[peer * self.best.count + tidx] = rank_there
            cute.arch.barrier()
            self.best.sort(sAll, sBest, Int32(number), tidx)
        cute.arch.barrier()

    @cute.jit
    def list_best(
        self, mBlocks: cute.Tensor, listed: cute.Tensor, sBest: cute.Tensor, list_row: Int64,
        rank: Int32,
    ) -> Int32:  # fmt: skip
        """List the best blocks in their order; returns how many there are."""
        tidx, _, _ = cute.arch.thread_idx()
        block, entry, valid = self.best.place_in_list(sBest, tidx)
        if tidx < self.best.count:
            listed[entry] = block
            if rank == 0:
                mBlocks[list_row * self.best.count + entry] = block
        return valid


@cute.jit
def load_list(
    mBlocks: cute.Tensor, slots: Int32, select_size: cutlass.Constexpr[int],
    listed: cute.Tensor, position: Int32, list_row: Int64,
) -> Int32:  # fmt: skip
    """Load the list of a token; returns how many blocks it has."""
    tidx, _, _ = cute.arch.thread_idx()
    lane = tidx % WARP
    valid = Int32(0)
    for i in cutlass.range_constexpr(MAX_LISTED // WARP):
        slot = i * WARP + lane
        block = Int32(-1)
        if slot < slots:
            block = mBlocks[list_row * slots + slot]
        # A list may name a block that starts past the token. It has no page perhaps.
        real = block >= 0 and block * select_size <= position
        valid += cute.arch.popc(cute.arch.vote_ballot_sync(real))
        # All warps find the same; one writes.
        if tidx < WARP:
            listed[slot] = block
    return valid
