"""Attention of a few query rows to many keys in pages: what the kernels of decoding share.

A CTA attends tiles of 64 keys, which cp.async copies some tiles ahead. Each warp holds the scores,
the softmax and the output of 16 query rows in registers. With few rows the warps share the keys of
a tile among them, 16 or 32 each, and add up their outputs at the end; no warp waits for another
within a tile. With more than 32 rows four warps multiply by wgmma, so that they read a tile once.

*Integer references.* The exponentials of a row are relative to ``2^m`` with an integer ``m``. With
``y = scale * log2(e) * score`` and ``n = round(y)``, a key's exponential is ``2^(y - n)`` times
``2^(n - m)``. The first factor depends on the score alone, and a product with a power of two is
exact. So equal keys get equal results wherever they lie and however the keys are split.

*Order of keys.* Within each 16 keys, key ``4 t + 2 j + c`` is in row ``8 j + 2 t + c`` of the tile.
The scores that a product gives thread ``t`` of a quad are then those of 4 neighbouring keys.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.utils import LayoutEnum
from torch import Tensor

from nsa.fused.decode_inputs import (
    LEAST_SHARE,
    NO_REFERENCE,
    TILE_KEYS,
    DecodeRule,
    Pool,
    resident_ctas,
    tile_stages,
)
from nsa.fused.hardware import QUAD, WARP, WARPGROUP, WGMMA_ROWS
from nsa.fused.kernels.forward_tiles import make_mmas
from nsa.fused.kernels.hopper import (
    cvt_f16,
    gemm,
    make_smem_layout,
    mlir_namedtuple,
    partition_D_position_independent,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    transpose_view,
)
from nsa.fused.kernels.rows import row_copy
from nsa.fused.kernels.vectors import CUTE_DTYPES, VECTOR, fake_flat, is_aligned

MMA_ROWS = 16
"""Query rows of an mma.sync, and keys that a warp takes together."""

PDL = True
"""Whether a kernel of a step may start before the one before it has ended, to hide the launch."""

# 1.5 * 2^23: a float32 of moderate size added to it is rounded to an integer, which is what its
# bits are above these.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000
# Columns of an output that a thread takes together: 16 bytes of float32.
COLUMNS = 4
# Exponentials that are smaller than by this power of two are as if by this one.
_LEAST_EXPONENT = -125
# Keys and values that are read once leave L2 first.
_EVICT_FIRST = 0x12F0000000000000


@mlir_namedtuple
class PagedTensors(NamedTuple):
    """Keys and values in pages: flat memory, and elements from page to page, row to row, head to
    head. ``table`` has ``max_pages`` pages for each sequence, of ``page_rows`` rows each."""

    k: cute.Tensor
    v: cute.Tensor
    table: cute.Tensor
    k_page: Int64
    k_row: Int64
    k_head: Int64
    v_page: Int64
    v_row: Int64
    v_head: Int64
    page_rows: Int32
    max_pages: Int32


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
        self.warps = row_groups * self.key_groups
        self.threads = WARP * self.warps
        # Those that multiply by wgmma, which takes 64 rows.
        self.warpgroups = self.rows // WGMMA_ROWS
        # Times that a warp takes 16 keys of a tile.
        self.units = TILE_KEYS // MMA_ROWS // self.key_groups
        self.lanes = 8 if head_dim % 64 == 0 and head_dim_v % 64 == 0 else 4
        self.rows_per_thread = TILE_KEYS * self.lanes // self.threads
        self.ctas = resident_ctas(head_dim, head_dim_v, row_groups)
        self.stages = tile_stages(head_dim, head_dim_v, row_groups, beside)
        # The outputs of the warps are added up where the tiles were, in rows that are so much apart
        # that those of a quarter warp are in different banks, if there is room.
        room = 2 * self.stages * TILE_KEYS * (head_dim + head_dim_v) // (4 * MMA_ROWS * self.warps)
        self.pitch = head_dim_v + (8 if head_dim_v + 8 <= room else 0)
        if self.stages < 2 or self.pitch > room:
            raise ValueError(f"tiles of D={head_dim}, Dv={head_dim_v} do not fit shared memory")

    def layouts(self) -> tuple[cute.ComposedLayout, ...]:
        """Layouts of queries, keys and values in shared memory."""
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        return (
            make_layout((self.rows, self.head_dim)),
            make_layout((TILE_KEYS, self.head_dim), stage=self.stages),
            make_layout((TILE_KEYS, self.head_dim_v), stage=self.stages),
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

        ``whole`` says that a tile lies in one page, row after row, and ``once`` that nothing else
        reads it.
        """
        operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
        thr_copy = row_copy(self.dtype, self.lanes, self.threads, operation).get_slice(tidx)
        tKsK = partition_D_position_independent(thr_copy, sK)[None, None, None, stage]
        tVsV = partition_D_position_independent(thr_copy, sV)[None, None, None, stage]
        # A multiple of 16, within which keys are out of order.
        step = const_expr(self.threads // self.lanes)
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
                mma.get_slice(warp_index * WARP // WARPGROUP * WARPGROUP),
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
                mma.get_slice(warp_index * WARP // WARPGROUP * WARPGROUP),
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

    @cute.jit
    def wait_for_tile(self):
        """Wait for the next tile, and until all warps are done with the one before it."""
        cute.arch.cp_async_wait_group(self.stages - 2)
        if const_expr(self.warpgroups > 0):
            # Wgmma reads what threads have copied.
            cute.arch.fence_view_async_shared()
        cute.arch.barrier()

    @cute.jit
    def load_ahead(self, load_tile, i: Int32, count: Int32) -> Int32:
        """Start to copy a tile behind tile ``i``, which all have; returns the stage of ``i``."""
        ahead = i + (self.stages - 1)
        if ahead < count:
            load_tile(ahead, ahead % self.stages)
        cute.arch.cp_async_commit_group()
        return i % self.stages

    @cute.jit
    def softmax(
        self, accs, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, low, high,
        lane: Int32, scale_log2: Float32,
    ):  # fmt: skip
        """Turn products into exponentials relative to ``reference``, which rises with them.

        ``accs[u]`` is for 16 keys, of which row ``r`` of the thread's two sees those from
        ``low[u]`` up to but without ``high[r][u]``. ``total`` has this thread's sums.
        """
        first = lane % QUAD * 4
        hidden = Boolean(False)
        for u in cutlass.range_constexpr(self.units):
            for r in cutlass.range_constexpr(2):
                hidden = hidden or low[u] > 0 or high[r][u] < MMA_ROWS
        hidden = cute.arch.vote_any_sync(hidden)
        # Rounded exponents, as the bits of a float above those of none.
        bits = [[cute.make_rmem_tensor(4, Int32) for _ in range(self.units)] for _ in range(2)]
        for r in cutlass.range_constexpr(2):
            for u in cutlass.range_constexpr(self.units):
                for q in cutlass.range_constexpr(4):
                    place = q % 2 + 2 * r + 4 * (q // 2)
                    score = accs[u][place]
                    rounded = cute.math.fma(score, scale_log2, Float32(_ROUNDER))
                    rest = cute.math.fma(score, scale_log2, Float32(_ROUNDER) - rounded)
                    accs[u][place] = cute.math.exp2(rest, fastmath=True)
                    bits[r][u][q] = rounded.bitcast(Int32)
        if hidden:
            for r in cutlass.range_constexpr(2):
                for u in cutlass.range_constexpr(self.units):
                    for q in cutlass.range_constexpr(4):
                        seen = first + q >= low[u] and first + q < high[r][u]
                        n = bits[r][u][q]
                        bits[r][u][q] = n if seen else Int32(NO_REFERENCE + _ROUNDER_BITS)
        for r in cutlass.range_constexpr(2):
            largest = bits[r][0][0]
            for u in cutlass.range_constexpr(self.units):
                for q in cutlass.range_constexpr(4):
                    largest = cutlass.max(largest, bits[r][u][q])
            for offset in cutlass.range_constexpr(2):
                other = cute.arch.shuffle_sync_bfly(largest, offset=1 << offset)
                largest = cutlass.max(largest, other)
            before = reference[r] + Int32(_ROUNDER_BITS)
            largest = cutlass.max(largest, before)
            factor = power_of_two(before - largest)
            changed = cute.arch.vote_any_sync(before != largest)
            reference[r] = largest - Int32(_ROUNDER_BITS)
            if changed:
                total[r] = total[r] * factor
                for i in cutlass.range_constexpr(cute.size(acc_O) // 4):
                    for c in cutlass.range_constexpr(2):
                        acc_O[c + 2 * r + 4 * i] = acc_O[c + 2 * r + 4 * i] * factor
            for u in cutlass.range_constexpr(self.units):
                for q in cutlass.range_constexpr(4):
                    place = q % 2 + 2 * r + 4 * (q // 2)
                    exponent = cutlass.max(bits[r][u][q] - largest, Int32(_LEAST_EXPONENT))
                    shifted = accs[u][place].bitcast(Int32) + (exponent << 23)
                    accs[u][place] = shifted.bitcast(Float32)
        if hidden:
            # What lies past the keys may be NaN.
            for r in cutlass.range_constexpr(2):
                for u in cutlass.range_constexpr(self.units):
                    for q in cutlass.range_constexpr(4):
                        place = q % 2 + 2 * r + 4 * (q // 2)
                        seen = bits[r][u][q] != Int32(NO_REFERENCE + _ROUNDER_BITS)
                        power = accs[u][place]
                        accs[u][place] = power if seen else Float32(0.0)
        for r in cutlass.range_constexpr(2):
            for u in cutlass.range_constexpr(self.units):
                for q in cutlass.range_constexpr(4):
                    total[r] = total[r] + accs[u][q % 2 + 2 * r + 4 * (q // 2)]

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
        self.softmax(accs, acc_O, reference, total, low, [high, high], lane, scale_log2)
        self.add_values(mmas, acc_O, accs, sV, key_group, warp_index, lane)

    @cute.jit
    def share_outputs(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, ring: cute.Pointer,
        warp_sums, row_groups: cutlass.Constexpr[int], tidx: Int32,
    ):  # fmt: skip
        """Write the warps' outputs to shared memory, relative to the largest reference of a row.

        Warp ``w`` has row group ``w % row_groups``. Returns outputs ``(copies, rows, Dv)``, which
        are there after a barrier, and references and sums ``(copies, rows)`` of the warps. No
        thread reads tiles any more once all threads are here.
        """
        copies, rows = const_expr(self.warps // row_groups), const_expr(MMA_ROWS * row_groups)
        layout = cute.make_layout((copies, rows), stride=(rows, 1))
        sM, sL = (cute.make_tensor(x.iterator, layout) for x in warp_sums)
        strides = rows * self.pitch, self.pitch, 1
        layout = cute.make_layout((copies, rows, self.head_dim_v), stride=strides)
        sO = cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), layout)
        warp_index, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        copy = warp_index // row_groups
        row = warp_index % row_groups * MMA_ROWS + lane // QUAD
        for r in cutlass.range_constexpr(2):
            for offset in cutlass.range_constexpr(2):
                total[r] += cute.arch.shuffle_sync_bfly(total[r], offset=1 << offset)
            if lane % QUAD == 0:
                sM[copy, row + 8 * r] = reference[r]
                sL[copy, row + 8 * r] = total[r]
        cute.arch.barrier()
        for r in cutlass.range_constexpr(2):
            largest = sM[0, row + 8 * r]
            for c in cutlass.range_constexpr(1, copies):
                largest = cutlass.max(largest, sM[c, row + 8 * r])
            factor = power_of_two(reference[r] - largest)
            for i in cutlass.range_constexpr(self.head_dim_v // 8):
                rPair = cute.make_rmem_tensor(2, Float32)
                for c in cutlass.range_constexpr(2):
                    rPair[c] = acc_O[c + 2 * r + 4 * i] * factor
                place = (copy * rows + row + 8 * r) * self.pitch + (8 * i + lane % QUAD * 2)
                pointer = sO.iterator + cute.assume(place, divby=2)
                cute.autovec_copy(rPair, cute.make_tensor(pointer, cute.make_layout(2)))
        return sO, sM, sL

    @cute.jit
    def sum_warps(self, sM: cute.Tensor, sL: cute.Tensor, row: Int32) -> tuple[Int32, Float32]:
        """The largest reference of a row, of the warps that have it, and their sums together."""
        copies = const_expr(cute.size(sM, mode=[0]))
        largest, whole = sM[0, row], Float32(0.0)
        for c in cutlass.range_constexpr(1, copies):
            largest = cutlass.max(largest, sM[c, row])
        for c in cutlass.range_constexpr(copies):
            whole += sL[c, row] * power_of_two(sM[c, row] - largest)
        return largest, whole

    @cute.jit
    def store_part(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, ring: cute.Pointer,
        warp_sums, out, slot: Int64, rows: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up what the warps have and store the part. All threads have read the tiles before.

        ``out`` are flat tensors: outputs ``(slots, rows, Dv)``, references and sums
        ``(slots, rows)``.
        """
        mO, mM, mL = out
        dim, each = const_expr(self.head_dim_v), const_expr(self.head_dim_v // COLUMNS)
        sO, sM, sL = self.share_outputs(
            acc_O, reference, total, ring, warp_sums, self.row_groups, tidx
        )
        cute.arch.barrier()
        for v in cutlass.range_constexpr(cute.ceil_div(self.rows * each, self.threads)):
            index = v * self.threads + tidx
            row, column = index // each, index % each * COLUMNS
            if row < rows:
                whole = self.sum_copies(sO.iterator, row, column, self.row_groups)
                pointer = mO.iterator + cute.assume((slot * rows + row) * dim + column, divby=4)
                cute.autovec_copy(whole, cute.make_tensor(pointer, cute.make_layout(COLUMNS)))
        if tidx < rows:
            largest, whole_sum = self.sum_warps(sM, sL, tidx)
            mM[slot * rows + tidx] = largest
            mL[slot * rows + tidx] = whole_sum

    @cute.jit
    def sum_copies(
        self, sO: cute.Pointer, row: Int32, column: Int32, row_groups: cutlass.Constexpr[int]
    ) -> cute.Tensor:
        """A vector of the output of all warps, from shared memory of this CTA or another one."""
        copies, rows = const_expr(self.warps // row_groups), const_expr(MMA_ROWS * row_groups)
        vectors = []
        for c in cutlass.range_constexpr(copies):
            offset = cute.assume((c * rows + row) * self.pitch + column, divby=COLUMNS)
            rX = cute.make_rmem_tensor(COLUMNS, Float32)
            cute.autovec_copy(cute.make_tensor(sO + offset, cute.make_layout(COLUMNS)), rX)
            vectors.append(rX)
        for c in cutlass.range_constexpr(1, copies):
            for i in cutlass.range_constexpr(COLUMNS):
                vectors[0][i] = vectors[0][i] + vectors[c][i]
        return vectors[0]


@functools.cache
def make_attention(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, row_groups: int, beside: int = 0
) -> TileAttention:
    return TileAttention(CUTE_DTYPES[dtype], head_dim, head_dim_v, row_groups, beside)


@cute.jit
def wait_for_previous():
    """Wait until the kernel before this one has ended, then let the next one start.

    A kernel that runs was let start by all CTAs of the one before it, which had waited by then. So
    what the kernels before that one wrote is there without waiting, and may be read. Nothing is
    written without waiting.
    """
    if const_expr(PDL):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()


def _ldmatrix(dtype: type[cutlass.Numeric], transpose: bool = False) -> cute.CopyAtom:
    operation = warp.LdMatrix8x8x16bOp(transpose=transpose, num_matrices=4)
    return cute.make_copy_atom(operation, dtype)


@dsl_user_op
def copy_once(target: cute.Pointer, source: cute.Pointer, valid: Boolean, *, loc=None, ip=None):
    """Start to copy 16 bytes to shared memory, zeros where not ``valid``; L2 need not keep them."""
    size = Int32(valid) * 16
    llvm.inline_asm(
        None,
        [
            target.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            source.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            size.ir_value(loc=loc, ip=ip),
            Int64(_EVICT_FIRST).ir_value(loc=loc, ip=ip),
        ],
        "cp.async.cg.shared.global.L2::cache_hint [$0], [$1], 16, $2, $3;",
        "r,l,r,l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@cute.jit
def power_of_two(exponent: Int32) -> Float32:
    """``2^exponent`` for an exponent that is not positive, 0 where it is below -126."""
    bits = (exponent + 127) << 23
    bits = bits if exponent > -127 else Int32(0)
    return bits.bitcast(Float32)


@cute.jit
def num_tiles(rule: DecodeRule, start: Int32, new: Int32, limit: Int32) -> Int32:
    """Tiles of a sequence of up to ``limit`` tokens, if all its new tokens have a place."""
    slots = cutlass.min(start + new, limit) // rule.stride
    tiles = cute.ceil_div(slots, TILE_KEYS)
    return tiles if new > 0 and slots > rule.carried else Int32(0)


def tile_share(tiles: Int32, ctas: Int32) -> Int32:
    """Tiles of a CTA, of those of all units."""
    return cutlass.max(cute.ceil_div(tiles, ctas), LEAST_SHARE)


@cute.jit
def unit_parts(
    mTiles: cute.Tensor, sequence: Int32, unit: Int32, sequence_units: Int32
) -> tuple[Int32, Int32]:
    """The slot of the first part of a unit of the sequence, and how many parts it has."""
    share = mTiles[0]
    start = mTiles[sequence + 1]
    tiles = mTiles[sequence + 2] - start
    first = start * sequence_units + unit * tiles
    cta = first // share
    count = (first + tiles - 1) // share - cta + 1 if tiles > 0 else Int32(0)
    return cta + sequence * sequence_units + unit, count


def fake_pages(dtype: type[cutlass.Numeric]) -> PagedTensors:
    """Stand-in for pages, to compile with."""
    return PagedTensors(
        *(fake_flat(dtype) for _ in range(2)),
        fake_flat(Int32, alignment=4),
        *(Int64(8) for _ in range(6)),
        *(Int32(1) for _ in range(2)),
    )


def page_arguments(pool: Pool, table: Tensor) -> PagedTensors:
    """``pool`` and its table as a kernel takes them; strides are kept, nothing is copied."""
    k, v = (flat_pool(name, x) for name, x in (("k pages", pool.k), ("v pages", pool.v)))
    return PagedTensors(
        k, v, table.view(-1), *pool.k.stride()[:3], *pool.v.stride()[:3],
        pool.k.shape[1], table.shape[1],
    )  # fmt: skip


def flat_pool(name: str, x: Tensor) -> Tensor:
    """The memory of ``x (pages, rows, H_kv, D)`` as one dimension."""
    if x.stride(3) != 1 or any(s % VECTOR for s in x.stride()[:3]) or not is_aligned(x):
        raise ValueError(
            f"{name} has strides {x.stride()} and address {x.data_ptr()}; channels must be "
            f"adjacent, other strides multiples of {VECTOR}, and the address of 16 bytes"
        )
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((span,), (1,))
