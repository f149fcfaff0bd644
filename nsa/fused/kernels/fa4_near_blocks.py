"""FlashAttention-4's backward of a window that also attends near blocks for the selected branch.

A query has statistics for each kind of key: its own block, the block before, and all others. With
keys as rows of the scores, a warp group has 64 keys of one block. So it needs one of the three for
each 64 queries, and each warp group gets the ones that it needs.
"""

import inspect

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nsa.fused.kernel_inputs import KINDS_OF_KEYS
from nsa.fused.kernels.fa4_heads import BackwardThroughHeads
from nsa.fused.kernels.hopper import FlashAttentionBackwardSm90, copy_utils

_ROWS = 64  # of queries and of keys, that have one kind
_PLACES = list(inspect.signature(FlashAttentionBackwardSm90.mma).parameters)[1:]


class BackwardWithNearBlocks(BackwardThroughHeads):
    """A head has statistics ``(3, rows)``; ``block_size`` is a multiple of 64."""

    def __init__(self, *arguments, block_size: int, **options):
        super().__init__(*arguments, **options)
        if self.tile_n != _ROWS * self.num_wg_mma or self.tile_m % _ROWS or not self.SdP_swapAB:
            raise ValueError(
                f"near blocks need 64 keys a warp group as rows of the scores, got tiles of "
                f"{self.tile_m} queries and {self.tile_n} keys"
            )
        self.block_size = block_size
        # Of all warp groups but the first.
        self.more_bytes = (self.num_wg_mma - 1) * self.tile_m * 4

    def _get_shared_storage_cls(self):
        """With statistics for each warp group."""
        tile_m = self.tile_m
        self.tile_m = tile_m * self.num_wg_mma
        storage = super()._get_shared_storage_cls()
        self.tile_m = tile_m
        return storage

    def _load_numbers(self, mX, sX, pipeline, seqlen, batch, head_set, n_block):
        mX = seqlen.offset_batch_Q(mX, batch, dim=2, padded=True)[None, head_set]
        gX = cute.local_tile(mX, (_ROWS,), (None,))
        of_head = cute.size(gX, mode=[1]) // self.heads
        of_kind = of_head // KINDS_OF_KEYS
        parts, groups = self.tile_m // _ROWS, self.num_wg_mma
        stages = cute.size(sX, mode=[1])
        layout = cute.make_layout((_ROWS, parts * stages * groups))
        load = copy_utils.cpasync_bulk_get_copy_fn(gX, cute.make_tensor(sX.iterator, layout))
        first_query = seqlen.seqlen_k - seqlen.seqlen_q

        def load_tile(tile, state):
            row_tile, head = tile
            barrier = pipeline.producer_get_barrier(state)
            for part in range(parts):
                rows = row_tile * parts + part
                for group in range(groups):
                    key = n_block * self.tile_n + group * _ROWS
                    kind = self._kind(first_query + rows * _ROWS, key)
                    load(
                        src_idx=head * of_head + kind * of_kind + rows,
                        dst_idx=(group * stages + state.index) * parts + part,
                        tma_bar_ptr=barrier,
                    )

        return load_tile

    @cute.jit
    def _kind(self, query: Int32, key: Int32) -> Int32:
        """Of keys, as queries see them: 0 in their block, 1 in the one before, or 2."""
        before = query // self.block_size - key // self.block_size
        last = KINDS_OF_KEYS - 1
        return cutlass.min(before, last) if before >= 0 else Int32(last)

    def mma(self, *arguments, is_dQ_wg: bool = True):
        arguments = list(arguments)
        tidx = arguments[_PLACES.index("tidx")]
        group = cute.arch.make_warp_uniform(tidx // self.num_threads_per_warp_group)
        for name in ("sLSE", "sdPsum"):
            sX = arguments[_PLACES.index(name)]
            offset = cute.assume(group * cute.size(sX), divby=_ROWS)
            arguments[_PLACES.index(name)] = cute.make_tensor(sX.iterator + offset, sX.layout)
        super().mma(*arguments, is_dQ_wg=is_dQ_wg)
