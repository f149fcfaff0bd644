"""FlashAttention-4's conversion of float32 sums, for those of keys and of values in one launch.

FA4 launches its kernel for each of them. Here the first half of the CTAs' heads are those of keys,
and the others are those of values. A CTA does with a tile what FA4 does on SM90: it copies the sums
to shared memory, reads them as an accumulator of wgmma, rounds them, and writes whole rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from nsa.fused.kernels.hopper import (
    FlashAttentionBackwardPostprocess,
    SeqlenInfoQK,
    SingleTileScheduler,
    SingleTileVarlenScheduler,
    TileSchedulerArguments,
    assume_tensor_aligned,
    get_smem_store_atom,
    predicate_k,
    transpose_view,
)


class _Layouts(NamedTuple):
    """Of a tile in shared memory: of float32 sums, and of what they are rounded to."""

    sums: cute.Layout
    rounded: cute.ComposedLayout


class _Copies(NamedTuple):
    """Of sums to shared memory and from there to registers, and of rounded rows to memory."""

    to_shared: cute.TiledCopy
    from_shared: cute.TiledCopy
    to_memory: cute.TiledCopy


class ConvertKeySums(FlashAttentionBackwardPostprocess):
    """Writes sums of keys times ``scale``, and those of values, in a dtype."""

    @cute.jit
    def __call__(
        self,
        mdKaccum: cute.Tensor,
        mdVaccum: cute.Tensor,
        mdK: cute.Tensor,
        mdV: cute.Tensor,
        scale: Float32,
        mCuSeqlensK: cute.Tensor | None,
        mCuTotalNBlocks: cute.Tensor | None,
        stream,
    ):
        tensors = [assume_tensor_aligned(x) for x in (mdKaccum, mdVaccum, mdK, mdV)]
        self.tiled_mma = self._get_tiled_mma()
        self._setup_attributes()
        packed = const_expr(mCuSeqlensK is not None)
        *leading, rows, heads, channels = mdK.shape
        scheduler = SingleTileVarlenScheduler if packed else SingleTileScheduler
        params = scheduler.to_underlying_arguments(
            TileSchedulerArguments(
                num_block=cute.ceil_div(rows, self.tile_m),
                num_head=2 * heads,
                num_batch=mCuSeqlensK.shape[0] - 1 if packed else leading[0],
                num_splits=1,
                seqlen_k=0,
                headdim=channels,
                headdim_v=0,
                total_q=rows,
                tile_shape_mn=(self.tile_m, 1),
                mCuSeqlensQ=mCuSeqlensK,
                cu_total_m_blocks_ptr=mCuTotalNBlocks,
            )
        )
        layouts = _Layouts(self.sdQaccum_layout, self.sdQ_layout)
        copies = _Copies(
            self.g2s_tiled_copy_dQaccum, self.s2r_tiled_copy_dQaccum, self.gmem_tiled_copy_dQ
        )
        self.convert(
            *tensors, scale, mCuSeqlensK, self.tiled_mma, *layouts, *copies, params, scheduler
        ).launch(
            grid=scheduler.get_grid_shape(params),
            block=[self.num_threads, 1, 1],
            smem=max(
                cute.size_in_bytes(Float32, layouts.sums),
                cute.size_in_bytes(self.dtype, layouts.rounded),
            ),
            stream=stream,
        )

    @cute.kernel
    def convert(
        self,
        mdKaccum: cute.Tensor,
        mdVaccum: cute.Tensor,
        mdK: cute.Tensor,
        mdV: cute.Tensor,
        scale: Float32,
        mCuSeqlensK: cute.Tensor | None,
        tiled_mma: cute.TiledMma,
        sums_layout: cute.Layout,
        rounded_layout: cute.ComposedLayout,
        to_shared: cute.TiledCopy,
        from_shared: cute.TiledCopy,
        to_memory: cute.TiledCopy,
        params,
        TileSchedulerCls: cutlass.Constexpr[Callable],
    ):
        smem = cutlass.utils.SmemAllocator()
        sSums = smem.allocate_tensor(Float32, sums_layout, byte_alignment=1024)
        copies = _Copies(to_shared, from_shared, to_memory)
        work_tile = TileSchedulerCls.create(params).initial_work_tile_info()
        n_block, head, batch, _ = work_tile.tile_idx
        if work_tile.is_valid_tile:
            seqlen = SeqlenInfoQK.create(
                batch, mdK.shape[1], 0, mCuSeqlensQ=mCuSeqlensK, tile_m=self.tile_m
            )
            heads = mdK.shape[len(mdK.shape) - 2]
            tile = (sSums, rounded_layout, tiled_mma, copies, seqlen, n_block, batch)
            if head < heads:
                self._convert_tile(mdKaccum, mdK, scale, head, *tile)
            else:
                self._convert_tile(mdVaccum, mdV, Float32(1.0), head - heads, *tile)

    @cute.jit
    def _convert_tile(
        self,
        mSums: cute.Tensor,
        mX: cute.Tensor,
        scale: Float32,
        head: Int32,
        sSums: cute.Tensor,
        rounded_layout: cute.ComposedLayout,
        tiled_mma: cute.TiledMma,
        copies: cutlass.Constexpr[_Copies],
        seqlen,
        n_block: Int32,
        batch: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        numbers = const_expr(self.tile_m * self.tile_hdim)
        if const_expr(seqlen.has_cu_seqlens_q):
            mX = cute.domain_offset((seqlen.offset_q, 0), mX[None, head, None])
            offset = (seqlen.padded_offset_q * self.tile_hdim,)
            own = cute.domain_offset(offset, mSums[head, None])
            # The compiler does not see that the offset keeps the alignment.
            pointer = cute.make_ptr(
                own.element_type,
                own.iterator.toint(),
                own.iterator.memspace,
                assumed_align=mSums.iterator.alignment,
            )
            mSums = cute.make_tensor(pointer, own.layout)
        else:
            mX, mSums = mX[batch, None, head, None], mSums[batch, head, None]
        gSums = cute.local_tile(mSums, (numbers,), (n_block,))
        gX = cute.local_tile(mX, (self.tile_m, self.tile_hdim), (n_block, 0))

        copy = copies.to_shared.get_slice(tidx)
        sFlat = cute.make_tensor(sSums.iterator, cute.make_layout(numbers))
        cute.copy(copies.to_shared, copy.partition_S(gSums), copy.partition_D(sFlat))
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()

        shape = const_expr((self.tile_m, self.tile_hdim))
        acc = cute.make_rmem_tensor(
            tiled_mma.partition_shape_C(shape[::-1] if self.dQ_swapAB else shape), Float32
        )
        sOwn = copies.from_shared.get_slice(tidx).partition_S(sSums)
        cute.autovec_copy(sOwn, cute.make_tensor(acc.iterator, cute.make_layout(sOwn.shape)))
        rounded = cute.make_fragment_like(acc, self.dtype)
        rounded.store((acc.load() * scale).to(self.dtype))

        cute.arch.barrier()  # rounded rows take the place of sums, which all threads have read
        sX = cute.make_tensor(cute.recast_ptr(sSums.iterator, dtype=self.dtype), rounded_layout)
        atom = get_smem_store_atom(self.arch, self.dtype, transpose=self.dQ_swapAB)
        copy = cute.make_tiled_copy_C(atom, tiled_mma).get_slice(tidx)
        target = transpose_view(sX) if const_expr(self.dQ_swapAB) else sX
        cute.copy(copy, copy.retile(rounded), copy.partition_D(target))
        cute.arch.barrier()

        copy = copies.to_memory.get_slice(tidx)
        sRows, gRows = copy.partition_D(sX), copy.partition_S(gX)
        rows = cute.make_fragment_like(sRows, self.dtype)
        cute.autovec_copy(sRows, rows)
        places = copy.partition_S(cute.make_identity_tensor(shape))
        channels = predicate_k(places, limit=mX.shape[1])
        left = seqlen.seqlen_q - n_block * self.tile_m
        for r in cutlass.range(cute.size(rows.shape[1]), unroll_full=True):
            if places[0, r, 0][0] < left:
                cute.copy(
                    copies.to_memory,
                    rows[None, r, None],
                    gRows[None, r, None],
                    pred=channels[None, r, None],
                )
