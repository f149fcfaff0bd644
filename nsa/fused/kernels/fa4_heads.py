"""FlashAttention-4's backward with CTAs that pass through several heads that share their keys.

FA4 has a CTA for each tile of keys and each query head. Where heads have few tiles of queries, as
in a window or where queries are folded into heads, it spends a third of its time on loading keys
and on adding float32 gradients of keys. Here one CTA meets the tiles of several heads and adds
these gradients up in registers. It loads and stores as FA4 does; the order of tiles is another.

Tensors have a KV head's heads, or some of them, side by side in their last dimension
(:func:`nsa.fused.fa4_call.side_by_side`), so ``H`` here counts such sets of heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr
from cutlass.pipeline import PipelineUserType, make_pipeline_state

from nsa.fused.kernels.hopper import (
    BlockInfo,
    FlashAttentionBackwardSm90,
    NamedBarrierBwd,
    arrive_inc,
    copy_utils,
    wait_eq,
)


class BackwardThroughHeads(FlashAttentionBackwardSm90):
    """A CTA takes ``heads`` heads; ``qhead_per_kvhead`` counts the CTAs that share a KV head.

    ``by_head`` says whether it ends a head before it begins the next. That suits windows: CTAs of
    neighbouring keys then read a tile of queries soon after one another. Without it, a CTA goes
    down from the last tile of queries, through all heads at each. That suits causal masks: the CTAs
    of all keys begin at the same tile.
    """

    def __init__(self, *arguments, heads: int, by_head: bool, **options):
        super().__init__(*arguments, **options)
        self.heads = heads
        self.by_head = by_head
        # Of statistics, beside those of a tile of queries.
        self.more_bytes = 0

    @cute.jit
    def load(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mdO: cute.Tensor,
        mLSE: cute.Tensor,
        mdPsum: cute.Tensor,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sV: cute.Tensor,
        sdO: cute.Tensor,
        sLSE: cute.Tensor,
        sdPsum: cute.Tensor,
        tma_atom_Q: cute.CopyAtom,
        tma_atom_K: cute.CopyAtom,
        tma_atom_V: cute.CopyAtom,
        tma_atom_dO: cute.CopyAtom,
        pipeline_Q: cutlass.pipeline.PipelineAsync,
        pipeline_dO: cutlass.pipeline.PipelineAsync,
        block_info,
        SeqlenInfoCls: Callable,
        TileSchedulerCls: Callable,
        lists,
        set_divmod,
    ):
        state_Q = make_pipeline_state(PipelineUserType.Producer, self.Q_stage)
        state_dO = make_pipeline_state(PipelineUserType.Producer, self.dO_stage)
        tile_scheduler = TileSchedulerCls()
        work_tile = tile_scheduler.initial_work_tile_info()
        while work_tile.is_valid_tile:
            n_block, head_set, batch, _ = work_tile.tile_idx
            seqlen = SeqlenInfoCls(batch)
            kv_head = head_set
            if const_expr(self.qhead_per_kvhead > 1):
                kv_head = head_set // set_divmod
            load_K = self._load_keys(tma_atom_K, mK, sK, self.tile_hdim, seqlen, work_tile, kv_head)
            load_V = self._load_keys(
                tma_atom_V, mV, sV, self.tile_hdimv, seqlen, work_tile, kv_head
            )
            queries = (pipeline_Q, seqlen, batch, head_set)
            gradients = (pipeline_dO, seqlen, batch, head_set)
            load_Q = self._load_rows(tma_atom_Q, mQ, sQ, self.tile_hdim, *queries)
            load_dO = self._load_rows(tma_atom_dO, mdO, sdO, self.tile_hdimv, *gradients)
            load_LSE = self._load_numbers(mLSE, sLSE, *queries, n_block)
            load_dPsum = self._load_numbers(mdPsum, sdPsum, *gradients, n_block)
            more = self.more_bytes
            tiles = _Tiles(block_info, self.heads, self.by_head)
            _, count = tiles.get_m_block_min_max(seqlen, n_block)
            if self._has_tiles(count):
                tile = tiles.at(seqlen, n_block, Int32(0))
                pipeline_Q.producer_acquire(state_Q, extra_tx_count=self.tma_copy_bytes["K"] + more)
                load_K(tma_bar_ptr=pipeline_Q.producer_get_barrier(state_Q))
                load_Q(tile, state_Q)
                # The statistics may be of the kernel before.
                cute.arch.griddepcontrol_wait()
                load_LSE(tile, state_Q)
                state = state_dO if const_expr(self.Q_stage != self.dO_stage) else state_Q
                pipeline_dO.producer_acquire(state, extra_tx_count=self.tma_copy_bytes["V"] + more)
                load_V(tma_bar_ptr=pipeline_dO.producer_get_barrier(state))
                load_dO(tile, state)
                load_dPsum(tile, state)
                state_Q.advance()
                state_dO.advance()
                for index in cutlass.range(1, count, unroll=1):
                    tile = tiles.at(seqlen, n_block, index)
                    pipeline_Q.producer_acquire(state_Q, extra_tx_count=more)
                    load_Q(tile, state_Q)
                    load_LSE(tile, state_Q)
                    state = state_dO if const_expr(self.Q_stage != self.dO_stage) else state_Q
                    pipeline_dO.producer_acquire(state, extra_tx_count=more)
                    load_dO(tile, state)
                    load_dPsum(tile, state)
                    state_Q.advance()
                    state_dO.advance()
            tile_scheduler.prefetch_next_work()
            tile_scheduler.advance_to_next_work()
            work_tile = tile_scheduler.get_current_work()

    def _load_keys(self, atom, mX, sX, channels, seqlen, work_tile, kv_head) -> Callable:
        n_block, _, batch, _ = work_tile.tile_idx
        mX = seqlen.offset_batch_K(mX, batch, dim=3)[None, None, kv_head]
        gX = cute.local_tile(mX, (self.tile_n, channels), (n_block, 0))
        load, _, _ = copy_utils.tma_get_copy_fn(
            atom, 0, cute.make_layout(1), gX, sX, single_stage=True
        )
        return load

    def _load_rows(self, atom, mX, sX, channels, pipeline, seqlen, batch, head_set) -> Callable:
        """A function of (tile, head) and a pipeline's state that starts to load rows of a head."""
        mX = seqlen.offset_batch_Q(mX, batch, dim=3)[None, None, head_set]
        gX = cute.local_tile(mX, (self.tile_m, channels), (None, None))
        apart = self._apart(cute.size(gX, mode=[3]))
        load, _, _ = copy_utils.tma_get_copy_fn(
            atom, 0, cute.make_layout(1), cute.group_modes(gX, 2, 4), sX
        )
        load = copy_utils.tma_producer_copy_fn(load, pipeline)
        return lambda tile, state: load((tile[0], tile[1] * apart), producer_state=state)

    def _load_numbers(self, mX, sX, pipeline, seqlen, batch, head_set, n_block) -> Callable:
        mX = seqlen.offset_batch_Q(mX, batch, dim=2, padded=True)[None, head_set]
        gX = cute.local_tile(mX, (self.tile_m,), (None,))
        apart = self._apart(cute.size(gX, mode=[1]))
        load = copy_utils.cpasync_bulk_get_copy_fn(gX, sX)
        load = copy_utils.tma_producer_copy_fn(load, pipeline)
        return lambda tile, state: load(tile[0] + tile[1] * apart, producer_state=state)

    def _apart(self, tiles: Int32) -> Int32:
        """How many tiles a head is from the next: the last head of a set has one alone."""
        return (tiles - 1) // (self.heads - 1) if const_expr(self.heads > 1) else Int32(0)

    def _keys_before(self, block_info, seqlen, row_tile: Int32, n_block: Int32) -> Int32:
        """How many tiles of keys add to the gradient of a tile of queries before this one: those
        after it, as FA4 launches them."""
        _, end = block_info.get_n_block_min_max(seqlen, row_tile)
        return end - 1 - n_block

    def _has_tiles(self, count: Int32):
        """Whether a CTA has tiles; FA4 knows at compile time where all have."""
        return const_expr(not self.is_local and not self.is_varlen_q) or count > 0

    def mma(self, *arguments, is_dQ_wg: bool = True):
        *tensors, block_info, seqlen_info, mask, scheduler, aux, divmods, lists, sets = arguments
        tiles = _Tiles(block_info, self.heads, self.by_head)
        super().mma(
            *(*tensors, tiles, seqlen_info, lambda seqlen: _Mask(mask(seqlen), tiles)),
            *(scheduler, aux, divmods, lists, sets),
            is_dQ_wg=is_dQ_wg,
        )

    @cute.jit
    def dQaccum_store(
        self,
        mdQaccum: cute.Tensor,
        sdQaccum: cute.Tensor,
        block_info,
        TileSchedulerCls: Callable,
        SeqlenInfoCls: Callable,
        lists,
        semaphores,
    ):
        threads = self.num_threads_per_warp_group + cute.arch.WARP_SIZE
        parts = self.num_wg_dQ
        numbers = self.tile_m * self.tile_hdim // parts
        tile_scheduler = TileSchedulerCls()
        work_tile = tile_scheduler.initial_work_tile_info()
        while work_tile.is_valid_tile:
            n_block, head_set, batch, _ = work_tile.tile_idx
            seqlen = SeqlenInfoCls(batch)
            mdQ = mdQaccum
            if const_expr(seqlen.has_cu_seqlens_q):
                mdQ = cute.domain_offset(
                    (seqlen.padded_offset_q * self.tile_hdim,), mdQaccum[None, head_set]
                )
            else:
                mdQ = mdQaccum[None, head_set, batch]
            gdQ = cute.local_tile(mdQ, (cute.make_layout((numbers, parts)),), (None,))
            apart = self._apart(cute.size(gdQ, mode=[1]))
            tiles = _Tiles(block_info, self.heads, self.by_head)
            _, count = tiles.get_m_block_min_max(seqlen, n_block)
            if self._has_tiles(count):
                for index in cutlass.range(count, unroll=1):
                    row_tile, head = tiles.at(seqlen, n_block, index)
                    for part in cutlass.range_constexpr(parts):
                        if const_expr(not self.deterministic):
                            cute.arch.cp_async_bulk_wait_group(parts - 1 - part, read=True)
                        cute.arch.barrier_arrive(
                            barrier_id=int(NamedBarrierBwd.dQEmptyWG0) + part,
                            number_of_threads=threads,
                        )
                    if const_expr(self.deterministic):
                        own = head_set * self.heads + head
                        turn = semaphores[row_tile, None, own, batch].iterator
                        before = self._keys_before(block_info, seqlen, row_tile, n_block)
                        wait_eq(turn, cute.arch.lane_idx(), 0, before)
                    for part in cutlass.range_constexpr(parts):
                        cute.arch.barrier(
                            barrier_id=int(NamedBarrierBwd.dQFullWG0) + part,
                            number_of_threads=threads,
                        )
                        with cute.arch.elect_one():
                            copy_utils.cpasync_reduce_bulk_add_f32(
                                sdQaccum[None, part].iterator,
                                gdQ[(None, part), row_tile + head * apart].iterator,
                                self.tma_copy_bytes["dQ"],
                            )
                        cute.arch.cp_async_bulk_commit_group()
                    if const_expr(self.deterministic):
                        cute.arch.cp_async_bulk_wait_group(0, read=False)
                        arrive_inc(turn, cute.arch.lane_idx(), 0, 1)
            tile_scheduler.advance_to_next_work()
            work_tile = tile_scheduler.get_current_work()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@dataclass(frozen=True)
class _Tiles:
    """The tiles of queries that a CTA meets, in order; in place of FA4's ``BlockInfo``."""

    block_info: BlockInfo
    heads: cutlass.Constexpr[int]
    by_head: cutlass.Constexpr[bool]

    def get_m_block_min_max(self, seqlen, n_block: Int32) -> tuple[int, Int32]:
        """0, and the number of tiles of all heads."""
        first, end = self.block_info.get_m_block_min_max(seqlen, n_block)
        return 0, (end - first) * self.heads

    def at(self, seqlen, n_block: Int32, index: Int32) -> tuple[Int32, Int32]:
        """The tile of queries, and the head in the set."""
        first, end = self.block_info.get_m_block_min_max(seqlen, n_block)
        if self.by_head:
            head = index // (end - first)
            return first + index - head * (end - first), head
        passed = index // self.heads
        return end - 1 - passed, index - passed * self.heads


class _Mask:
    """FA4's mask for the tile of an index into :class:`_Tiles`."""

    def __init__(self, mask, tiles: _Tiles):
        self.mask, self.tiles = mask, tiles

    def apply_mask(self, scores: cute.Tensor, *, m_block: Int32, n_block: Int32, **options):
        tile, _ = self.tiles.at(self.mask.seqlen_info, n_block, m_block)
        self.mask.apply_mask(scores, m_block=tile, n_block=n_block, **options)
