"""Decoding's lists of selected blocks: chosen by the CTAs of a cluster, or read.

Each CTA scores its share of the blocks and finds the best of them. All then read the best of each,
so that all have the same list.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from nsa.fused.decode_inputs import CLUSTERS, MAX_LISTED, DecodeRule
from nsa.fused.hardware import WARP
from nsa.fused.kernels.best_blocks import NO_RANK
from nsa.fused.kernels.decode_best import BestOfCta, best_words, block_rank
from nsa.fused.kernels.decode_outputs import load_peer, meet_cluster
from nsa.fused.kernels.decode_scores import BlockScores, RecordTensors

# Ranks that a thread brings at a time.
_RANKS = 4


def selection_bytes(threads: int) -> int:
    """Shared memory that :meth:`BlockLists.select` needs meanwhile, at most."""
    return 8 * best_words(threads, _RANKS, max(CLUSTERS))


class BlockLists:
    """Lists of ``count`` blocks, by ``cluster`` CTAs of ``threads`` threads."""

    def __init__(self, rule: DecodeRule, count: int, cluster: int, threads: int):
        self.rule = rule
        self.cluster = cluster
        self.best = BestOfCta(count, threads, min(_RANKS, rule.group_blocks))
        self.scores = BlockScores(rule)

    @cute.jit
    def select(
        self, records: RecordTensors, groups: Int32, heads: Int32, forced: tuple[Int32, Int32],
        memory: cute.Pointer, bests, compressed, position: Int32, record_row: Int64, rank: Int32,
        tidx: Int32,
    ):  # fmt: skip
        """Write the ranks of the best blocks to ``bests[1]``, best first, in all CTAs.

        ``groups`` have room in the records of a row; ``forced`` are the numbers of first and last
        blocks that are taken. ``memory`` is shared, for what this needs meanwhile.
        """
        shared = self.best.views(cute.recast_ptr(memory, dtype=Int64))
        self.best.reset(shared, tidx)
        # The sums of the parts, too, are there.
        cute.arch.barrier()
        own = position // self.rule.select_size
        scored = own // self.rule.group_blocks + 1
        share = cute.ceil_div(scored, self.cluster)
        first = rank * share
        last = cutlass.min(first + share, scored)
        for begin in cutlass.range(first, last, self.best.threads, unroll=1):
            group = begin + tidx
            scores = self.scores.of_group(
                records, groups, record_row, heads, compressed,
                (position + 1) // self.rule.stride, cutlass.min(group, last - 1),
            )  # fmt: skip
            for start in cutlass.range_constexpr(0, self.rule.group_blocks, self.best.per_thread):
                ranks = cute.make_rmem_tensor(self.best.per_thread, Int64)
                for r in cutlass.range_constexpr(self.best.per_thread):
                    block = group * self.rule.group_blocks + start + r
                    ranks[r] = block_rank(
                        scores[start + r], block, own, *forced, group < last
                    )  # fmt: skip
                self.best.add(shared, ranks, tidx)
        cute.arch.barrier()
        sShare, sBest = bests
        if tidx < self.best.count:
            kept = shared[1][tidx]
            sShare[tidx] = kept
            sBest[tidx] = kept if const_expr(self.cluster == 1) else Int64(NO_RANK)
        if const_expr(self.cluster > 1):
            meet_cluster(self.cluster)
            number = const_expr(self.cluster * self.best.count)
            pointer = cute.recast_ptr(memory, dtype=Int64) + self.best.words
            sAll = cute.make_tensor(pointer, cute.make_layout(number))
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
