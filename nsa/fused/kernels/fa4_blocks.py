"""FlashAttention-4's backward where a query sees the blocks of keys that end before it.

Query ``i`` sees the keys ``j`` with ``j * step + first <= i``. FA4 has no such mask that skips
tiles; folded into heads, queries have a causal one, but then float32 gradients of queries lie in
another order than those of the other branches, which could be added to the same memory.

A CTA has a tile of keys, one head and a segment of its queries, from the last tile to the first. So
CTAs are alike, and those of one head and segment, which are launched one after another, meet the
same tile at about the same time. It and its gradients then stay in L2.

Keys and values have stride 0 over an entry for each segment, which FA4 launches CTAs for. All other
tensors have one entry; where CTAs add in a fixed order, sums of keys have one for each segment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from nsa.fused.kernels.fa4_heads import BackwardThroughHeads
from nsa.fused.kernels.hopper import (
    BlockInfo,
    SingleTileLPTBwdScheduler,
    SingleTileScheduler,
    WorkTileInfo,
    reshape_acc_to_mn,
)


class BackwardOfBlocks(BackwardThroughHeads):
    """``first`` is the right bound of the window, the left one is the tiles of a segment."""

    def __init__(self, *arguments, step: int, **options):
        super().__init__(*arguments, heads=1, by_head=False, **options)
        self.step = step

    def load(self, *arguments):
        *tensors, block_info, seqlen_info, scheduler, lists, sets = arguments
        blocks = _Blocks(block_info, self.step, scheduler.args[0])
        super().load(*tensors, blocks, seqlen_info, self._in_segments(scheduler), lists, sets)

    def mma(self, *arguments, is_dQ_wg: bool = True):
        *tensors, block_info, seqlen_info, mask, scheduler, aux, divmods, lists, sets = arguments
        blocks = self.blocks = _Blocks(block_info, self.step, scheduler.args[0])
        super().mma(
            *(*tensors, blocks, seqlen_info, lambda seqlen: _BlockMask(mask(seqlen), blocks)),
            *(self._in_segments(scheduler), aux, divmods, lists, sets),
            is_dQ_wg=is_dQ_wg,
        )

    def dQaccum_store(self, mdQ, sdQ, block_info, scheduler, seqlen_info, lists, semaphores):
        blocks = _Blocks(block_info, self.step, scheduler.args[0])
        scheduler = self._in_segments(scheduler)
        super().dQaccum_store(mdQ, sdQ, blocks, scheduler, seqlen_info, lists, semaphores)

    def _keys_before(self, block_info, seqlen, row_tile: Int32, n_block: Int32) -> Int32:
        """All tiles of keys before this one: they see the queries too."""
        return n_block

    @cute.jit
    def epilogue_dKV(
        self,
        acc_dV: cute.Tensor,
        mdV: cute.Tensor,
        sV: cute.Tensor,
        acc_dK: cute.Tensor,
        mdK: cute.Tensor,
        sK: cute.Tensor,
        seqlen,
        tma_atom_dK,
        tma_atom_dV,
        tiled_mma_dK,
        tiled_mma_dV,
        tidx: Int32,
        n_block: Int32,
        head_idx: Int32,
        batch_idx: Int32,
        divmod_heads,
        mdK_semaphore,
        mdV_semaphore,
    ):
        tensors = (acc_dV, mdV, sV, acc_dK, mdK, sK, seqlen)
        kinds = (tma_atom_dK, tma_atom_dV, tiled_mma_dK, tiled_mma_dV, tidx, n_block, head_idx)
        others = (divmod_heads, mdK_semaphore, mdV_semaphore)
        if const_expr(self.deterministic):
            # Those without queries too: others wait for them.
            segment = self.blocks.segment(seqlen)
            BackwardThroughHeads.epilogue_dKV(self, *tensors, *kinds, segment, *others)
        else:
            first, end = self.blocks.get_m_block_min_max(seqlen, n_block)
            if first < end:
                BackwardThroughHeads.epilogue_dKV(self, *tensors, *kinds, batch_idx, *others)

    def _in_segments(self, scheduler: partial) -> Callable:
        kind = _OrderedSegments if self.deterministic else _Segments
        return partial(kind.create, *scheduler.args)


@dataclass(frozen=True)
class _Blocks:
    """Which tiles of queries see a tile of keys; in place of FA4's ``BlockInfo``."""

    block_info: BlockInfo
    step: cutlass.Constexpr[int]
    params: object  # of the scheduler

    @property
    def first(self) -> Int32:
        return self.block_info.window_size_right

    def segment(self, seqlen) -> Int32:
        """The CTA's segment: the last ones are launched first."""
        segments = cute.ceil_div(self._tiles(seqlen), self.block_info.window_size_left)
        params = self.params
        if const_expr(isinstance(params, SingleTileLPTBwdScheduler.Params)):
            _, _, launched = _in_one_row(params)
        else:
            _, _, launched = cute.arch.block_idx()
        return segments - 1 - launched

    def get_m_block_min_max(self, seqlen, n_block: Int32) -> tuple[Int32, Int32]:
        """Of the CTA's segment."""
        info = self.block_info
        start = self.segment(seqlen) * info.window_size_left
        end = cutlass.min(start + info.window_size_left, self._tiles(seqlen))
        first_query = cutlass.max(n_block * (info.tile_n * self.step) + self.first, 0)
        return cutlass.min(cutlass.max(first_query // info.tile_m, start), end), end

    def _tiles(self, seqlen) -> Int32:
        return cute.ceil_div(seqlen.seqlen_q, self.block_info.tile_m)


class _BlockMask:
    """FA4's mask, of its ``step`` and first key alone."""

    def __init__(self, mask, blocks: _Blocks):
        self.mask, self.blocks = mask, blocks
        self.seqlen_info = mask.seqlen_info

    @cute.jit
    def apply_mask(self, scores: cute.Tensor, *, m_block: Int32, n_block: Int32, thr_mma, **_):
        mask, transposed = self.mask, self.mask.swap_AB
        shape = (mask.tile_n, mask.tile_m) if transposed else (mask.tile_m, mask.tile_n)
        places = cute.make_identity_tensor(shape)
        scores_mn = reshape_acc_to_mn(scores, transpose=transposed)
        # Places of the first thread are known at compile time; others differ by a constant.
        own = reshape_acc_to_mn(thr_mma.partition_C(places), transpose=transposed)[0]
        known = reshape_acc_to_mn(thr_mma.get_slice(0).partition_C(places), transpose=transposed)
        query, key = (1, 0) if transposed else (0, 1)
        first_key = n_block * mask.tile_n + own[key]
        last_key = mask.seqlen_k - first_key
        # A key is seen from this row on, counted from the thread's first one.
        row_of_key = first_key * self.blocks.step + self.blocks.first
        row_of_key -= m_block * mask.tile_m + own[query]
        for c in cutlass.range_constexpr(cute.size(scores_mn, mode=[1])):
            of_key = known[0, c][key]
            row = row_of_key + of_key * self.blocks.step
            row = row if of_key < last_key else Int32(mask.tile_m)
            for r in cutlass.range_constexpr(cute.size(scores_mn, mode=[0])):
                hidden = known[r, 0][query] < row
                scores_mn[r, c] = -Float32.inf if hidden else scores_mn[r, c]


class _Segments(SingleTileScheduler):
    """A tile of keys, a head, and the only entry of queries; the third index is of a segment."""

    @staticmethod
    def create(params, ctx=None, *, loc=None, ip=None) -> "_Segments":
        return _Segments(params, cute.arch.block_idx(), loc=loc, ip=ip)

    def get_current_work(self, *, loc=None, ip=None) -> WorkTileInfo:
        tile, head, _ = self._blk_coord
        return WorkTileInfo((tile, head, Int32(0), Int32(0)), self._is_first_block)

    def __new_from_mlir_values__(self, values):
        rebuilt = []
        for x, count in zip([self.params, self._blk_coord], self._values_pos, strict=True):
            rebuilt.append(cutlass.new_from_mlir_values(x, values[:count]))
            values = values[count:]
        scheduler = _Segments(*rebuilt, loc=self._loc)
        scheduler._is_first_block = self._is_first_block
        return scheduler


class _OrderedSegments(SingleTileLPTBwdScheduler):
    """The same where CTAs wait for one another, which FA4 launches in one dimension."""

    @staticmethod
    @cute.jit
    def create(params, *, loc=None, ip=None) -> "_OrderedSegments":
        return _OrderedSegments(params, cute.arch.block_idx()[0], loc=loc, ip=ip)

    @cute.jit
    def get_current_work(self, *, loc=None, ip=None) -> WorkTileInfo:
        tile, head, _ = _in_one_row(self.params)
        valid = self._tile_idx < self.params.total_blocks
        return WorkTileInfo((tile, Int32(head), Int32(0), Int32(0)), valid)


def _in_one_row(params) -> tuple[Int32, Int32, Int32]:
    """The tile of keys, head and segment of a CTA in one dimension."""
    index, _, _ = cute.arch.block_idx()
    of_all = index // params.num_block
    segment, head = divmod(of_all, params.num_head_divmod)
    return index - of_all * params.num_block, head, segment
