"""Attention of a few query rows to many keys in pages: what the kernels of decoding share.

A CTA attends tiles of 64 keys, which cp.async copies some tiles ahead. Each warp holds the scores,
the softmax and the output of 16 query rows in registers. With few rows the warps share the keys of
a tile among them, 16 or 32 each, and add up their outputs at the end; no warp waits for another
within a tile. With more than 32 rows four warps multiply by wgmma, so that they read a tile once.

*Order of keys.* Within each 16 keys, key ``4 t + 2 j + c`` is in row ``8 j + 2 t + c`` of the tile.
The scores that a product gives thread ``t`` of a quad are then those of 4 neighbouring keys.
"""

import functools

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.tensor_utils import LayoutEnum

from nsa.fused.decode_inputs import TILE_KEYS, resident_ctas, tile_groups, tile_stages
from nsa.fused.hardware import WARP, WARPGROUP, WGMMA_ROWS
from nsa.fused.kernels.decode_pages import PagedTensors, copy_once
from nsa.fused.kernels.decode_softmax import softmax
from nsa.fused.kernels.forward_tiles import make_mmas
from nsa.fused.kernels.hopper import (
    cvt_f16,
    gemm,
    make_smem_layout,
    partition_D_position_independent,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    transpose_view,
)
from nsa.fused.kernels.rows import row_copy
from nsa.fused.kernels.vectors import CUTE_DTYPES, VECTOR

MMA_ROWS = 16
"""Query rows of an mma.sync, and keys that a warp takes together."""


class TileAttention:
    """Up to ``16 * row_groups`` query rows of one KV head; ``row_groups`` is 1, 2, 4 or 8.

    Tiles leave ``beside`` bytes of shared memory for the kernel.
    """

    def __init__(
        self, dtype: type[cutlass.Numeric], head_dim: int, head_dim_v: int, row_groups: int,
        beside: int,
    ):  # fmt: skip
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.row_groups = row_groups
        self.rows = MMA_ROWS * row_groups
        self.key_groups = max(1, 4 // row_groups)
        # Groups of warps that take tiles in turn, and the threads of one.
        self.tile_groups = tile_groups(head_dim, head_dim_v, row_groups)
        self.tile_threads = WARP * row_groups * self.key_groups
        self.threads = self.tile_threads * self.tile_groups
        self.warps = self.threads // WARP
        # Those that multiply by wgmma, which takes 64 rows.
        self.warpgroups = self.rows // WGMMA_ROWS
        # Times that a warp takes 16 keys of a tile.
        self.units = TILE_KEYS // MMA_ROWS // self.key_groups
        self.lanes = 8 if head_dim % 64 == 0 and head_dim_v % 64 == 0 else 4
        self.rows_per_thread = TILE_KEYS * self.lanes // self.tile_threads
        self.ctas = resident_ctas(head_dim, head_dim_v, row_groups)
        # Of a group of warps.
        self.stages = tile_stages(head_dim, head_dim_v, row_groups, beside)
        tiles = self.stages * self.tile_groups
        # The outputs of the warps are added up where the tiles were, in rows that are so much apart
        # that those of a quarter warp are in different banks, if there is room.
        room = 2 * tiles * TILE_KEYS * (head_dim + head_dim_v) // (4 * MMA_ROWS * self.warps)
        self.pitch = head_dim_v + (8 if head_dim_v + 8 <= room else 0)
        if self.stages < 2 or self.pitch > room:
            raise ValueError(f"tiles of D={head_dim}, Dv={head_dim_v} do not fit shared memory")

    def layouts(self) -> tuple[cute.ComposedLayout, ...]:
        """Layouts of queries, keys and values in shared memory."""
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        return (
            make_layout((self.rows, self.head_dim)),
            *(
                make_layout((TILE_KEYS, dim), stage=self.stages * self.tile_groups)
                for dim in (self.head_dim, self.head_dim_v)
            ),
        )

    def make_mmas(self) -> tuple[cute.TiledMma, ...]:
        """The products for the scores and for the output: of one warp, or by wgmma."""
        if self.warpgroups:
            return make_mmas(self.dtype, TILE_KEYS, self.head_dim_v, self.warpgroups)
        mma = cute.make_tiled_mma(
            warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)),
            (1, 1, 1),
            permutation_mnk=(MMA_ROWS, 16, 16),
        )
        return mma, mma

    def allocate(self, smem, layouts) -> tuple[cute.Tensor, ...]:
        """(sQ, sK, sV, where the tiles are, references, sums of warps' rows) in shared memory."""
        q_smem, k_smem, v_smem = layouts
        sQ = smem.allocate_tensor(self.dtype, q_smem.outer, 1024, swizzle=q_smem.inner)
        # One piece of memory: keys, values, and later the outputs.
        k_bytes = const_expr(2 * cute.cosize(k_smem.outer))
        v_bytes = const_expr(2 * cute.cosize(v_smem.outer))
        memory = smem.allocate(k_bytes + v_bytes, 1024)
        sK = cute.make_tensor(cute.recast_ptr(memory, k_smem.inner, dtype=self.dtype), k_smem.outer)
        sV = cute.make_tensor(
            cute.recast_ptr(memory + k_bytes, v_smem.inner, dtype=self.dtype), v_smem.outer
        )
        layout = cute.make_layout(MMA_ROWS * self.warps)
        sM = smem.allocate_tensor(Int32, layout, 16)
        sL = smem.allocate_tensor(Float32, layout, 16)
        return sQ, sK, sV, memory, sM, sL

    @cute.jit
    def load_queries(self, mQ: cute.Tensor, sQ: cute.Tensor, offset, valid, tidx: Int32):
        """Start to copy rows to ``sQ``; ``offset(row)`` is where one is, zeros if not ``valid``.

        ``offset`` and ``valid`` are functions of the row.
        """
        vectors = const_expr(self.head_dim // VECTOR)
        total = const_expr(cute.size(sQ, mode=[0]) * vectors)
        sVectors = cute.flat_divide(sQ, (1, VECTOR))
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
            self.dtype,
            num_bits_per_copy=128,
        )
        for i in cutlass.range_constexpr(cute.ceil_div(total, self.threads)):
            index = i * self.threads + tidx
            if total % self.threads == 0 or index < total:
                row, channel = index // vectors, index % vectors
                predicate = cute.make_rmem_tensor(1, Boolean)
                predicate[0] = valid(row)
                place = offset(row) if predicate[0] else Int64(0)
                place = cute.assume(place + channel * VECTOR, divby=VECTOR)
                source = cute.make_tensor(mQ.iterator + place, cute.make_layout(((VECTOR, 1),)))
                target = cute.make_tensor(
                    sVectors[0, None, row, channel].iterator, cute.make_layout(((VECTOR, 1),))
                )
                cute.copy(atom, source, target, pred=predicate)

    def key_of_row(self, row: Int32) -> Int32:
        """Which key of a tile is in a row of it."""
        low = (row & 1) | ((row & 6) << 1) | ((row & 8) >> 2)
        return (row & ~15) | low

    @cute.jit
    def load_tile(
        self, pages: PagedTensors, sK: cute.Tensor, sV: cute.Tensor, place, kv_head: Int32,
        whole: cutlass.Constexpr[bool], once: cutlass.Constexpr[bool], tidx: Int32, stage: Int32,
    ):  # fmt: skip
        """Start to copy a tile; ``place(key)`` gives (page, row, whether there is such a key).

        ``tidx`` is the thread's number in its group, as in all that follows from tile to tile.
        ``whole`` says that a tile lies in one page, row after row, and ``once`` that nothing else
        reads it.
        """
        operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
        thr_copy = row_copy(self.dtype, self.lanes, self.tile_threads, operation).get_slice(tidx)
        tKsK = partition_D_position_independent(thr_copy, sK)[None, None, None, stage]
        tVsV = partition_D_position_independent(thr_copy, sV)[None, None, None, stage]
        # A multiple of 16, within which keys are out of order.
        step = const_expr(self.tile_threads // self.lanes)
        column = tidx % self.lanes * VECTOR
        places, starts = [], []
        for m in cutlass.range_constexpr(self.rows_per_thread):
            places.append(place(self.key_of_row(tidx // self.lanes) + m * step))
        for m in cutlass.range_constexpr(self.rows_per_thread):
            if const_expr(m == 0 or not whole):
                page, row, _ = places[m]
                k = Int64(page) * pages.k_page + Int64(row) * pages.k_row
                v = Int64(page) * pages.v_page + Int64(row) * pages.v_row
                k, v = k + kv_head * pages.k_head + column, v + kv_head * pages.v_head + column
            else:
                k, v = k + step * pages.k_row, v + step * pages.v_row
            starts.append((k, v))
        for m in cutlass.range_constexpr(self.rows_per_thread):
            k, v = starts[m]
            self._copy_row(thr_copy, pages.k, tKsK, k, m, places[m][2], once)
            self._copy_row(thr_copy, pages.v, tVsV, v, m, places[m][2], once)

    @cute.jit
    def _copy_row(
        self, thr_copy, mX: cute.Tensor, tXsX: cute.Tensor, offset: Int64,
        m: cutlass.Constexpr[int], valid: Boolean, once: cutlass.Constexpr[bool],
    ):  # fmt: skip
        predicate = cute.make_rmem_tensor(1, Boolean)
        predicate[0] = valid
        for k in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            pointer = mX.iterator + cute.assume(offset + k * self.lanes * VECTOR, divby=VECTOR)
            if const_expr(once):
                copy_once(tXsX[None, m, k].iterator, pointer, valid)
            else:
                source = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
                cute.copy(thr_copy, source, tXsX[None, m, k], pred=predicate)

    def make_rows(self, sQ: cute.Tensor, mma: cute.TiledMma, lane: Int32) -> cute.Tensor:
        """Registers for 16 rows of ``sQ (rows, D)``."""
        thr_mma = mma.get_slice(lane)
        sQw = cute.local_tile(sQ, (MMA_ROWS, self.head_dim), (0, 0))
        return thr_mma.make_fragment_A(thr_mma.partition_A(sQw))

    @cute.jit
    def read_rows(
        self, rQ: cute.Tensor, sQ: cute.Tensor, mma: cute.TiledMma, row_group: Int32, lane: Int32
    ):
        """Read the warp's rows of ``sQ (rows, D)``."""
        copy_q = cute.make_tiled_copy_A(_ldmatrix(self.dtype), mma).get_slice(lane)
        sQw = cute.local_tile(sQ, (MMA_ROWS, self.head_dim), (row_group, 0))
        cute.copy(copy_q, copy_q.partition_S(sQw), copy_q.retile(rQ))

    @cute.jit
    def compute_scores(
        self, mmas: tuple[cute.TiledMma, ...], queries: cute.Tensor, sK: cute.Tensor,
        key_group: Int32, warp_index: Int32, lane: Int32,
    ):  # fmt: skip
        """Products of the warp's rows with its keys of ``sK (64, D)``: 8 numbers for each 16 keys.

        ``queries`` are those of :meth:`read_rows`, with wgmma all rows in shared memory. With wgmma
        this only starts it.
        """
        mma, _ = mmas
        accs = []
        if const_expr(self.warpgroups > 0):
            acc, rQ, rK = partition_fragment_ABC(
                mma.get_slice(self._warpgroup(warp_index) * WARPGROUP),
                (self.rows, TILE_KEYS, self.head_dim), queries, sK,
            )  # fmt: skip
            gemm(mma, acc, rQ, rK, zero_init=True, wg_wait=-1)
            for u in cutlass.range_constexpr(self.units):
                accs.append(cute.make_tensor(acc.iterator + 8 * u, cute.make_layout(8)))
        else:
            thr_mma = mma.get_slice(lane)
            copy_k = cute.make_tiled_copy_B(_ldmatrix(self.dtype), mma).get_slice(lane)
            rKs, views, sources = [], [], []
            for u in cutlass.range_constexpr(self.units):
                sKw = cute.local_tile(sK, (16, self.head_dim), (key_group + u * self.key_groups, 0))
                rK = thr_mma.make_fragment_B(thr_mma.partition_B(sKw))
                acc = cute.make_rmem_tensor(thr_mma.partition_shape_C((MMA_ROWS, 16)), Float32)
                acc.fill(0.0)
                accs.append(acc)
                rKs.append(rK)
                views.append(copy_k.retile(rK))
                sources.append(copy_k.partition_S(sKw))
            for k in cutlass.range_constexpr(self.head_dim // 16):
                for u in cutlass.range_constexpr(self.units):
                    cute.copy(copy_k, sources[u][None, None, k], views[u][None, None, k])
                    cute.gemm(mma, accs[u], queries[None, None, k], rKs[u][None, None, k], accs[u])
        return accs

    @cute.jit
    def add_values(
        self, mmas: tuple[cute.TiledMma, ...], acc_O: cute.Tensor, accs, sV: cute.Tensor,
        key_group: Int32, warp_index: Int32, lane: Int32,
    ):  # fmt: skip
        """Add the values of the warp's keys of ``sV (64, Dv)``, weighted with ``accs``.

        With wgmma this only starts it.
        """
        _, mma = mmas
        sVt = transpose_view(sV)
        if const_expr(self.warpgroups > 0):
            _, rP, rV = partition_fragment_ABC(
                mma.get_slice(self._warpgroup(warp_index) * WARPGROUP),
                (self.rows, self.head_dim_v, TILE_KEYS), None, sVt,
            )  # fmt: skip
            shape = mmas[0].partition_shape_C((self.rows, TILE_KEYS))
            acc = cute.make_tensor(accs[0].iterator, cute.make_layout(shape))
            cvt_f16(reshape_acc_to_frgA(acc), rP)
            gemm(mma, acc_O, rP, rV, zero_init=False, wg_wait=-1)
        else:
            thr_mma = mma.get_slice(lane)
            copy_v = cute.make_tiled_copy_B(_ldmatrix(self.dtype, True), mma).get_slice(lane)
            for u in cutlass.range_constexpr(self.units):
                rP = cute.make_fragment_like(accs[u], self.dtype)
                rP.store(accs[u].load().to(self.dtype))
                rP = reshape_acc_to_frgA(rP)
                sVw = cute.local_tile(
                    sVt, (self.head_dim_v, 16), (0, key_group + u * self.key_groups)
                )
                rV = thr_mma.make_fragment_B(thr_mma.partition_B(sVw))
                cute.copy(copy_v, copy_v.partition_S(sVw), copy_v.retile(rV))
                cute.gemm(mma, acc_O, rP[None, None, 0], rV[None, None, 0], acc_O)

    def make_output(self, mmas: tuple[cute.TiledMma, ...], lane: Int32) -> cute.Tensor:
        rows = WGMMA_ROWS if self.warpgroups else MMA_ROWS
        return cute.make_rmem_tensor(
            mmas[1].get_slice(lane).partition_shape_C((rows, self.head_dim_v)), Float32
        )

    @cute.jit
    def start_tiles(self, load_tile, count: Int32):
        """Start to copy the first tiles of ``count``; ``load_tile(i, stage)`` starts one.

        It is called for one tile after another.
        """
        for i in cutlass.range(self.stages - 1, unroll=1):
            if i < count:
                load_tile(i, i)
            cute.arch.cp_async_commit_group()

    def _warpgroup(self, warp_index: Int32) -> Int32:
        """Which 64 rows a warp multiplies by wgmma, of those of its group."""
        return warp_index * WARP % self.tile_threads // WARPGROUP

    @cute.jit
    def wait_for_queries(self):
        """Wait for what :meth:`load_queries` copies; tiles may be on their way."""
        cute.arch.cp_async_wait_group(self.stages - 1)
        if const_expr(self.warpgroups > 0):
            # Wgmma reads what threads have copied.
            cute.arch.fence_view_async_shared()
        cute.arch.barrier()

    @cute.jit
    def wait_for_tile(self, group: Int32):
        """Wait for the next tile, and until all warps of the group are done with the one before."""
        cute.arch.cp_async_wait_group(self.stages - 2)
        if const_expr(self.warpgroups > 0):
            cute.arch.fence_view_async_shared()
        if const_expr(self.tile_groups == 1):
            cute.arch.barrier()
        else:
            # Barrier 0 is that of all threads.
            cute.arch.barrier(barrier_id=1 + group, number_of_threads=self.tile_threads)

    @cute.jit
    def load_ahead(self, load_tile, i: Int32, count: Int32) -> Int32:
        """Start to copy a tile behind tile ``i``, which all have; returns the stage of ``i``."""
        ahead = i + (self.stages - 1)
        if ahead < count:
            load_tile(ahead, ahead % self.stages)
        cute.arch.cp_async_commit_group()
        return i % self.stages

    @cute.jit
    def attend_tile(
        self, mmas: tuple[cute.TiledMma, ...], queries: cute.Tensor, sK: cute.Tensor,
        sV: cute.Tensor, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor,
        key_position, first_key: Int32, first: Int32, last: Int32, key_group: Int32,
        warp_index: Int32, lane: Int32, scale_log2: Float32,
    ):  # fmt: skip
        """Attend a tile whose keys are ``first_key`` and so on; rows see the positions ``first`` to
        ``last``. 16 keys that begin at a multiple of 16 have positions in a row."""
        accs = self.compute_scores(mmas, queries, sK, key_group, warp_index, lane)
        low, high = [], []
        for u in cutlass.range_constexpr(self.units):
            key = first_key + (key_group + u * self.key_groups) * MMA_ROWS
            position = key_position(key)
            low.append(first - position)
            high.append(last + 1 - position)
        softmax(accs, acc_O, reference, total, [low, low], [high, high], lane, scale_log2)
        self.add_values(mmas, acc_O, accs, sV, key_group, warp_index, lane)


@functools.cache
def make_attention(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, row_groups: int, beside: int = 0
) -> TileAttention:
    return TileAttention(CUTE_DTYPES[dtype], head_dim, head_dim_v, row_groups, beside)


def _ldmatrix(dtype: type[cutlass.Numeric], transpose: bool = False) -> cute.CopyAtom:
    operation = warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4)
    return cute.make_copy_atom(operation, dtype)
