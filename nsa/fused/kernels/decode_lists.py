"""Decoding's lists of selected blocks: chosen by the CTAs of a cluster, or read.

Each CTA scores its share of the blocks, finds the best of them, and gives them to all CTAs, so that
all have the same list.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import MAX_LISTED, DecodeRule
from nsa.fused.hardware import WARP
from nsa.fused.kernels.best_blocks import NO_RANK
from nsa.fused.kernels.decode_best import BestOfCta, block_rank
from nsa.fused.kernels.decode_outputs import Exchange, recomputed
from nsa.fused.kernels.decode_scores import BlockScores, EntryScores, RecordRows, RecordTensors
from nsa.fused.kernels.hopper import store_shared_remote

# Ranks that a thread brings at a time, once or some times.
_RANKS = 4


class ClusterLists:
    """Lists of ``count`` blocks for ``group`` query heads, by ``cluster`` CTAs of some warps.

    ``record_groups`` groups of slots were recorded together. A thread loads the records of
    ``loads`` heads at a time, and brings ``times`` times a few ranks.
    """

    def __init__(
        self, rule: DecodeRule, group: int, count: int, cluster: int, warps: int,
        record_groups: int, loads: int = 16, times: int = 1,
    ):  # fmt: skip
        self.rule = rule
        self.cluster = cluster
        self.warps = warps
        per_thread = times * min(_RANKS, rule.group_blocks)
        # Blocks that are scored together.
        self.pass_blocks = warps * WARP * per_thread
        self.best = BestOfCta(count, warps * WARP, per_thread)
        self.scores = (BlockScores if record_groups == 1 else EntryScores)(rule, group, warps)
        # Entries that are scored together.
        self.pass_entries = self.pass_blocks // self.scores.entry_blocks
        # Groups that a thread scores together: each trip to memory delays what follows, but the
        # code takes time to load where a CTA has few groups.
        most = max(1, self.pass_blocks // rule.group_blocks // WARP)
        self.together = min(most, max(1, loads // self.scores.each), max(1, 8 // cluster))

    @cute.jit
    def select(
        self, records: RecordTensors, groups: Int32, forced: tuple[Int32, Int32],
        ring: cute.Pointer, exchange: Exchange | None, sBest: cute.Tensor, compressed, sum_up,
        meanwhile, position: Int32, rows: RecordRows, rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Write the ranks of the best blocks to ``sBest``, best first, in all CTAs.

        ``groups`` have room in the records of a row; ``forced`` are the numbers of first and last
        blocks that are taken. ``sum_up()`` finds ``compressed``, the references and sums of heads.
        The ring of tiles, which is empty, has what this needs in shared memory. CTAs send each
        other the best that they have found by ``exchange``; all have started. ``meanwhile()`` is
        done while these are on their way.
        """
        rank, tidx = recomputed(rank), recomputed(tidx)
        layout = cute.make_ordered_layout((self.warps, self.pass_blocks), order=(1, 0))
        sPartial = cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), layout)
        memory = cute.recast_ptr(ring, dtype=Int64) + self.warps * self.pass_blocks // 2
        shared = self.best.views(memory)
        if const_expr(self.scores.record_groups > 1):
            memory = cute.recast_ptr(memory + self.best.words, dtype=Float32)
            tables = self.scores.tables(memory, self.pass_entries)
        self.best.reset(shared, tidx)
        if tidx < self.best.count:
            sBest[tidx] = Int64(NO_RANK)
        own = position // self.rule.select_size
        seen = (position + 1) // self.rule.stride
        # Groups, in whole entries.
        together = const_expr(self.scores.record_groups)
        scored = own // self.scores.entry_blocks + 1
        share = cute.ceil_div(scored, self.cluster) * together
        scored *= together
        first = rank * share
        # One entry at least, which may have no block up to the token's own: it sums up the parts.
        last = cutlass.max(cutlass.min(first + share, scored), first + together)
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        pass_groups = const_expr(self.pass_blocks // self.rule.group_blocks)
        for begin in cutlass.range(first, last, pass_groups, unroll=1):
            here = cutlass.min(last - begin, pass_groups)
            for some in cutlass.range(0, here, WARP * self.together, unroll=1):
                loaded, places = [], []
                for i in cutlass.range_constexpr(self.together):
                    place = some + (i * WARP + lane)
                    places.append(place)
                    group = cutlass.min(begin + place, scored - 1)
                    loaded.append(self.scores.load(records, groups, rows, group, warp))
                if begin + some == first:
                    # While the first records are on their way.
                    sum_up()
                    cute.arch.barrier()
                if const_expr(together > 1):  # noqa: SIM102 (one is decided at compile time)
                    if some == 0:
                        self.scores.tabulate(
                            records, groups, rows, tables, compressed, seen, begin // together,
                            here // together, tidx,
                        )  # fmt: skip
                        cute.arch.barrier()
                for i in cutlass.range_constexpr(self.together):
                    group = cutlass.min(begin + places[i], scored - 1)
                    if const_expr(together > 1):
                        scores = self.scores.add_up_tabulated(
                            loaded[i], tables, compressed, seen, group,
                            cutlass.min(places[i], here - 1) // together, warp,
                        )  # fmt: skip
                    else:
                        scores = self.scores.add_up(loaded[i], compressed, seen, group, warp)
                    if places[i] < here:
                        if const_expr(together > 1):
                            for b in cutlass.range_constexpr(self.rule.group_blocks):
                                sPartial[warp, self.scores.block(places[i], b)] = scores[b]
                        else:
                            sRow = cute.local_tile(
                                sPartial[warp, None], (self.rule.group_blocks,), (places[i],)
                            )
                            cute.autovec_copy(scores, sRow)
            cute.arch.barrier()
            scores = cute.make_rmem_tensor(self.best.per_thread, Float32)
            scores.fill(0.0)
            for w in cutlass.range_constexpr(self.warps):
                for r in cutlass.range_constexpr(self.best.per_thread):
                    scores[r] = scores[r] + sPartial[w, r * (self.warps * WARP) + tidx]
            ranks = cute.make_rmem_tensor(self.best.per_thread, Int64)
            for r in cutlass.range_constexpr(self.best.per_thread):
                # So that few blocks have a thread each.
                block = r * (self.warps * WARP) + tidx
                real = block < here * self.rule.group_blocks
                block += begin * self.rule.group_blocks
                ranks[r] = block_rank(scores[r], block, own, *forced, real)
            self.best.add(shared, ranks, tidx)
        cute.arch.barrier()
        count = const_expr(self.best.count)
        if const_expr(self.cluster == 1):
            if tidx < count:
                sBest[tidx] = shared[1][tidx]
        else:
            number = const_expr(self.cluster * count)
            sAll, barrier = exchange.ranks, exchange.barriers + 2
            for i in cutlass.range(tidx, number, self.warps * WARP, unroll=1):
                place = sAll.iterator + (rank * count + i % count)
                store_shared_remote(shared[1][i % count], place, barrier, i // count)
            meanwhile()
            cute.arch.mbarrier_wait(barrier, 0)
            for i in cutlass.range(tidx, number, self.warps * WARP, unroll=1):
                best = sAll[i]
                above = self._number_above(sAll, best)
                if best > Int64(NO_RANK) and above < count:
                    sBest[above] = best
        cute.arch.barrier()

    @cute.jit
    def _number_above(self, sAll: cute.Tensor, rank: Int64) -> Int32:
        """How many ranks are above this one, in the CTAs' lists of falling ranks."""
        above = [Int32(0)] * self.cluster
        step = 1 << (self.best.count.bit_length() - 1)
        while const_expr(step > 0):
            for peer in cutlass.range_constexpr(self.cluster):
                place = above[peer] + step
                seen = sAll[peer * self.best.count + cutlass.min(place, self.best.count) - 1]
                more = place <= self.best.count and seen > rank
                above[peer] = place if more else above[peer]
            step //= 2
        whole = above[0]
        for peer in cutlass.range_constexpr(1, self.cluster):
            whole += above[peer]
        return whole

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
