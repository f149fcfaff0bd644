"""FlashAttention-4's forward where a query sees the blocks of keys that end before it.

Query ``i`` sees the keys ``j`` with ``j * step + first <= i``. FA4 has no such mask that skips
tiles. Folded into heads, queries have a causal one, but then those that begin or end within a row
need calls of their own, and each head a copy of the keys that it shares with others.

A tile has consecutive queries of one head. Otherwise this is FA4's causal forward: CTAs are
launched from the longest to the shortest, those of a few heads at a time.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from nsa.fused.kernels.hopper import (
    BlockInfo,
    FlashAttentionForwardSm90,
    mask_r2p_lambda,
    r2p_bitmask_below,
    reshape_acc_to_mn,
    sm90_col_to_r2p_idx,
)


class ForwardOfBlocks(FlashAttentionForwardSm90):
    """FA4's forward with the mask of seen blocks. The window's right bound holds ``first``."""

    def __init__(self, *arguments, step: int, **options):
        options |= dict(is_causal=True, is_local=False, pack_gqa=False)
        super().__init__(*arguments, **options)
        self.step = step

    def load(self, *arguments):
        *tensors, block_info, seqlen_info, scheduler = arguments
        super().load(*tensors, _SeenBlocks(block_info, self.step), seqlen_info, scheduler)

    def mma(self, *arguments):
        *tensors, block_info, seqlen_info, mask, scheduler, lists, aux, divmods = arguments
        seen = _SeenBlocks(block_info, self.step)
        super().mma(
            *(*tensors, seen, seqlen_info, lambda seqlen: _SeenMask(mask(seqlen), seen)),
            *(scheduler, lists, aux, divmods),
        )


@dataclass(frozen=True)
class _SeenBlocks:
    """Which tiles of keys a tile of queries sees; in place of FA4's ``BlockInfo``."""

    block_info: BlockInfo
    step: cutlass.Constexpr[int]

    def keys_of(self, query: Int32) -> Int32:
        """The number of keys that a query sees if there are enough."""
        return cutlass.max(query - self.block_info.window_size_right + self.step, 0) // self.step

    def get_n_block_min_max(self, seqlen, m_block: Int32) -> tuple[Int32, Int32]:
        """The range of key tiles: one at least, which the mask hides if no key is seen."""
        info = self.block_info
        seen = self.keys_of((m_block + 1) * info.tile_m - 1)
        tiles = cute.ceil_div(cutlass.min(seen, seqlen.seqlen_k), info.tile_n)
        return Int32(0), cutlass.max(tiles, 1)

    def get_n_block_min_causal_local_mask(self, seqlen, m_block: Int32, first: Int32) -> Int32:
        """The tiles that all queries of the tile see."""
        info = self.block_info
        return cutlass.max(first, self.keys_of(m_block * info.tile_m) // info.tile_n)

    def get_n_block_min_before_local_mask(self, seqlen, m_block: Int32, first: Int32) -> Int32:
        return first


class _SeenMask:
    """FA4's mask, limited to the blocks that a query sees."""

    def __init__(self, mask, seen: _SeenBlocks):
        self.mask, self.seen = mask, seen

    @cute.jit
    def apply_mask(
        self,
        acc_S: cute.Tensor,
        m_block: Int32,
        n_block: Int32,
        thr_mma,
        mask_seqlen: cutlass.Constexpr[bool],
        **_,
    ):
        mask = self.mask
        places = cute.make_identity_tensor((mask.tile_m, mask.tile_n))
        scores = reshape_acc_to_mn(acc_S)
        own = reshape_acc_to_mn(thr_mma.partition_C(places))
        before = n_block * mask.tile_n + own[0][1]
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            end = self.seen.keys_of(m_block * mask.tile_m + own[r, 0][0])
            if const_expr(mask_seqlen):
                end = cutlass.min(end, mask.seqlen_k)
            # FA4's, with predicates of whole registers.
            limit = sm90_col_to_r2p_idx(end - before)
            mask_r2p_lambda(
                scores[r, None], lambda s, limit=limit: r2p_bitmask_below(limit, s), rank1=True
            )
