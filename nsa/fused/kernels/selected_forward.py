"""Selected branch of token mode, forward: each block's keys meet the queries that selected it.

A CTA is one warpgroup and takes one work item of the inverted index: a block's K and V stay in
shared memory while query rows of the item's pairs stream past, 64 at a time. Row r of an item is
query head ``r % G`` of pair ``r // G``, so any group size fills the tiles. Each pair gives a
partial output (normalised, rounded to the dtype of q) and the log-sum-exp of its scores, stored in
the order of the list; then the pairs of each token are added up.

Partial outputs leave the registers as wgmma has them, in vectors of 16 bytes: the columns of V are
permuted within groups of 32 when it enters shared memory, so that the 8 columns of a group that a
thread gets are neighbours. The rows of the next tile are gathered by cp.async, once the
scores of this one are done, into the same stage. Several CTAs share an SM and hide each other's
latencies; there is no warp specialisation.

Partial results of a wave are combined while the next wave is computed, in the same launch: the one
mostly reads memory, the other mostly writes it. Two buffers hold them, by turns.
"""

import functools
import math
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.utils import LayoutEnum, hopper_helpers
from flash_attn.cute import utils
from quack import copy_utils, layout_utils, sm90_utils
from torch import Tensor

from nsa.fused.kernels.inverted_index import (
    ITEM_FIELDS,
    ITEM_TOKENS,
    invert_index,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    compile_kernel,
    fake_flat,
    flat_rows,
    load_vector,
    store_vector,
)
from nsa.fused.token_blocks import TokenBlocks, choose_chunk_tokens, units_of_wave

_THREADS = 128
# Rows of wgmma.
_ROWS = 64
# Threads that share a row of wgmma's registers, and the columns of which each holds a vector.
_QUAD = 4
_GROUP = _QUAD * VECTOR
_LOG2_E = math.log2(math.e)
# How partial outputs are stored ("cs": to leave L2 first, of which they exceed the size), stages of
# queries and CTAs of an SM, whether a launch combines the wave before, and whether the next
# queries are loaded after the softmax.
STORE = "cs"
STAGES, CTAS = 1, 4
OVERLAP = True
LATE = True
_SHARED_BYTES = 227 * 1024
# Partial results that a thread of the combination loads together.
_LOADS = 16


def row_lanes(head_dim: int) -> int:
    """Neighbouring threads that load a row together, 16 bytes each."""
    return 8 if head_dim % 64 == 0 else 4


def async_row_copy(dtype: type[cutlass.Numeric], lanes: int, threads: int) -> cute.TiledCopy:
    """``threads / lanes`` rows at a time. Through L2 only: no CTA reads a row twice."""
    operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    return cute.make_tiled_copy_tv(
        cute.make_copy_atom(operation, dtype, num_bits_per_copy=VECTOR * dtype.width),
        cute.make_ordered_layout((threads // lanes, lanes), order=(1, 0)),
        cute.make_layout((1, VECTOR)),
    )


class SelectedForward:
    """Partial results of the pairs of a wave; and outputs of the tokens of the wave before."""

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        head_dim_v: int,
        group: int,
        block_size: int,
        causal: bool,
        slots: int,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.block_size = block_size
        self.causal = causal
        self.stages, self.overlap, self.late = STAGES, OVERLAP, LATE
        self.combine = CombinePartials(head_dim_v, group, slots)
        # Of queries, keys and values.
        self.elements = (
            self.stages * _ROWS * head_dim,
            block_size * head_dim,
            block_size * head_dim_v,
        )
        self.shared_elements = max(sum(self.elements), self.combine.elements)
        # Of wide values, the output alone takes 128 registers.
        most = CTAS if head_dim_v <= 128 else 2
        shared_bytes = 2 * self.shared_elements + 4 * ITEM_TOKENS
        self.ctas = min(most, _SHARED_BYTES // (shared_bytes + 3072))

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mTokens: cute.Tensor,
        mItems: cute.Tensor,
        mNumItems: cute.Tensor,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        mDonePartial: cute.Tensor,
        mDoneLse: cute.Tensor,
        mPosition: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        wave: Int32,
        waves: Int32,
        wave_items: Int32,
        wave_units: Int32,
        units: Int32,
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
        scale_log2: Float32,
        stream,
    ):
        q_smem, k_smem, v_smem = (
            sm90_utils.make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, shape, stages)
            for shape, stages in (
                ((_ROWS, self.head_dim), self.stages),
                ((self.block_size, self.head_dim), None),
                ((self.block_size, self.head_dim_v), None),
            )
        )
        make_mma = functools.partial(
            hopper_helpers.make_trivial_tiled_mma,
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            acc_dtype=Float32,
            atom_layout_mnk=(1, 1, 1),
        )
        mma_qk = make_mma(b_leading_mode=OperandMajorMode.K, tiler_mn=(_ROWS, self.block_size))
        mma_pv = make_mma(
            b_leading_mode=OperandMajorMode.MN,
            tiler_mn=(_ROWS, self.head_dim_v),
            a_source=warpgroup.OperandSource.RMEM,
        )
        tensors = (mQ, mK, mV, mTokens, mItems, mNumItems, mPartial, mPartialLse)
        tensors = (*tensors, mDonePartial, mDoneLse, mPosition, mOut, mLse)
        sizes = (q_stride, k_stride, v_stride, wave, waves, wave_items, wave_units, units)
        sizes = (*sizes, chunks, chunk_tokens, num_tokens, kv_heads)
        layouts = (mma_qk, mma_pv, q_smem, k_smem, v_smem)
        # In the order of the grid, each work item is followed by its share of the tiles of the
        # wave before, which are combined beside it.
        roles = Int32(1)
        if const_expr(self.overlap):
            tiles = self.combine.tiles_of_unit(chunk_tokens) * wave_units
            if wave > 0:
                roles += cute.ceil_div(tiles, wave_items)
        self.kernel(*tensors, *sizes, roles, scale_log2, *layouts).launch(
            grid=[wave_items * roles, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mTokens: cute.Tensor,
        mItems: cute.Tensor,
        mNumItems: cute.Tensor,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        mDonePartial: cute.Tensor,
        mDoneLse: cute.Tensor,
        mPosition: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        wave: Int32,
        waves: Int32,
        wave_items: Int32,
        wave_units: Int32,
        units: Int32,
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
        roles: Int32,
        scale_log2: Float32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        q_smem: cute.ComposedLayout,
        k_smem: cute.ComposedLayout,
        v_smem: cute.ComposedLayout,
    ):
        bidx, _, _ = cute.arch.block_idx()
        item, role = bidx // roles, bidx % roles
        unit_pairs = chunk_tokens * self.combine.slots
        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout(self.shared_elements)
        shared = smem.allocate_tensor(self.dtype, layout, 1024).iterator
        sTokens = smem.allocate_tensor(Int32, cute.make_layout(ITEM_TOKENS), 16)
        # After the last wave, its partial results are combined.
        items = mNumItems[cutlass.min(wave, waves - 1)]
        if role == 0 and wave < waves and item < items:
            self._attend(
                *(mQ, mK, mV, mTokens, mItems, mPartial, mPartialLse),
                *(q_stride, k_stride, v_stride),
                (Int64(wave) * wave_items + item) * ITEM_FIELDS,
                *(wave * wave_units * unit_pairs, unit_pairs, chunks, scale_log2),
                *(mma_qk, mma_pv, q_smem, k_smem, v_smem, shared, sTokens),
            )
        if const_expr(self.overlap):
            first_unit = (wave - 1) * wave_units
            done_units = cutlass.min(wave_units, units - first_unit)
            if role > 0:
                self.combine.combine_tile(
                    *(mDonePartial, mDoneLse, mPosition, mOut, mLse),
                    *(first_unit * unit_pairs, first_unit, done_units),
                    *(chunks, chunk_tokens, num_tokens, kv_heads, shared),
                    item * (roles - 1) + (role - 1),
                )

    @cute.jit
    def _attend(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mTokens: cute.Tensor,
        mItems: cute.Tensor,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        field: Int64,
        wave_start: Int32,
        unit_pairs: Int32,
        chunks: Int32,
        scale_log2: Float32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        q_smem: cute.ComposedLayout,
        k_smem: cute.ComposedLayout,
        v_smem: cute.ComposedLayout,
        shared: cute.Pointer,
        sTokens: cute.Tensor,
    ):
        """The work item at ``field``."""
        tidx, _, _ = cute.arch.thread_idx()
        begin, count = mItems[field], mItems[field + 1]
        first, keys = mItems[field + 2], mItems[field + 3]
        kv_head = begin // unit_pairs // chunks

        q_elements, k_elements, _ = self.elements
        offsets = (0, q_elements, q_elements + k_elements)
        sQ, sK, sV = (
            cute.make_tensor(
                cute.recast_ptr(shared + offset, layout.inner, self.dtype), layout.outer
            )
            for offset, layout in zip(offsets, (q_smem, k_smem, v_smem), strict=True)
        )

        values = self._load_values(mV, v_stride, kv_head * self.head_dim_v, first, keys, tidx)
        self._load_keys(mK, sK, k_stride, kv_head * self.head_dim, first, keys, tidx)
        for i in cutlass.range(tidx, count, _THREADS, unroll=1):
            sTokens[i] = mTokens[begin + i]
        cute.arch.barrier()
        load_queries = functools.partial(
            self._load_queries, mQ, sQ, sTokens, q_stride, kv_head, count, tidx
        )
        load_queries(Int32(0), Int32(0))
        self._store_values(values, sV, tidx)

        _, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(
            mma_qk.get_slice(0), (_ROWS, self.block_size, self.head_dim), sQ, sK
        )
        _, tOrP, tOrVt = sm90_utils.partition_fragment_ABC(
            mma_pv.get_slice(0),
            (_ROWS, self.head_dim_v, self.block_size),
            None,
            layout_utils.transpose_view(sV),
        )
        tScS = layout_utils.reshape_acc_to_mn(
            mma_qk.get_slice(tidx).partition_C(cute.make_identity_tensor((_ROWS, self.block_size)))
        )
        rows = count * self.group
        out_row = Int64(begin - wave_start) * self.group

        tiles = cute.ceil_div(rows, _ROWS)
        for tile in cutlass.range(tiles, unroll=1):
            stage = tile % self.stages
            cute.arch.cp_async_commit_group()
            # Also orders what was read in the other stage before it is loaded again.
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier()
            if const_expr(self.stages == 2):
                other = 1 - stage
                if tile + 1 < tiles:
                    load_queries(tile + 1, other)

            acc_S = sm90_utils.gemm_zero_init(
                mma_qk, (_ROWS, self.block_size), tSrQ, tSrK, A_idx=stage, wg_wait=-1
            )
            # A thread has two rows, this one and the 8th after it.
            row = tile * _ROWS + tScS[0, 0][0]
            limits = cute.make_rmem_tensor(2, Int32)
            for r in cutlass.range_constexpr(2):
                limits[r] = keys
                if const_expr(self.causal):
                    pair = cutlass.min((row + 8 * r) // self.group, count - 1)
                    limits[r] = cutlass.min(keys, sTokens[pair] - first + 1)
            warpgroup.wait_group(0)
            if const_expr(self.stages == 1 and not self.late):
                # All warps have read the queries.
                cute.arch.barrier()
                if tile + 1 < tiles:
                    load_queries(tile + 1, stage)
            acc_S_mn = layout_utils.reshape_acc_to_mn(acc_S)
            if cutlass.min(limits[0], limits[1]) < self.block_size:
                for r in cutlass.range_constexpr(2):
                    for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                        visible = tScS[r, c][1] < limits[r]
                        acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

            inverse_sum = cute.make_rmem_tensor(2, Float32)
            for r in cutlass.range_constexpr(2):
                inverse_sum[r], lse = self._softmax(acc_S_mn[r, None], scale_log2)
                if tidx % _QUAD == 0 and row + 8 * r < rows:
                    mPartialLse[out_row + (row + 8 * r)] = lse
            utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), tOrP)
            # Earlier, with 4 CTAs an SM, registers do not suffice for wgmmas that follow each other
            # without a wait.
            if const_expr(self.stages == 1 and self.late):
                # All warps have read the queries.
                cute.arch.barrier()
                if tile + 1 < tiles:
                    load_queries(tile + 1, stage)
            acc_O = sm90_utils.gemm_zero_init(
                mma_pv, (_ROWS, self.head_dim_v), tOrP, tOrVt, wg_wait=0
            )
            acc_O_mn = layout_utils.reshape_acc_to_mn(acc_O)
            for r in cutlass.range_constexpr(2):
                acc_O_mn[r, None].store(acc_O_mn[r, None].load() * inverse_sum[r])
            rO = utils.cvt_f16(acc_O, self.dtype)
            for r in cutlass.range_constexpr(2):
                if row + 8 * r < rows:
                    offset = (out_row + (row + 8 * r)) * self.head_dim_v
                    self._store_row(rO, r, mPartial, offset + tidx % _QUAD * VECTOR)

    @cute.jit
    def _load_keys(
        self,
        mK: cute.Tensor,
        sK: cute.Tensor,
        stride: Int64,
        column: Int32,
        first: Int32,
        keys: Int32,
        tidx: Int32,
    ):
        """Rows past the block's keys repeat its last one: they are masked, but must be finite."""
        lanes = const_expr(row_lanes(self.head_dim))
        thr_copy = async_row_copy(self.dtype, lanes, _THREADS).get_slice(tidx)
        tKsK = copy_utils.partition_D_position_independent(thr_copy, sK)
        for m in cutlass.range_constexpr(cute.size(tKsK, mode=[1])):
            row = first + cutlass.min(tidx // lanes + m * (_THREADS // lanes), keys - 1)
            offset = Int64(row) * stride + column + tidx % lanes * VECTOR
            self._copy_row(mK, tKsK[None, m, None], offset, lanes, thr_copy)

    @cute.jit
    def _load_queries(
        self,
        mQ: cute.Tensor,
        sQ: cute.Tensor,
        sTokens: cute.Tensor,
        stride: Int64,
        kv_head: Int32,
        count: Int32,
        tidx: Int32,
        tile: Int32,
        stage: Int32,
    ):
        """Rows past the item's pairs repeat heads of its last one; they are not stored."""
        lanes = const_expr(row_lanes(self.head_dim))
        thr_copy = async_row_copy(self.dtype, lanes, _THREADS).get_slice(tidx)
        tQsQ = copy_utils.partition_D_position_independent(thr_copy, sQ)[None, None, None, stage]
        for m in cutlass.range_constexpr(cute.size(tQsQ, mode=[1])):
            row = tile * _ROWS + tidx // lanes + m * (_THREADS // lanes)
            pair, head = row // self.group, kv_head * self.group + row % self.group
            token = sTokens[cutlass.min(pair, count - 1)]
            offset = Int64(token) * stride + head * self.head_dim + tidx % lanes * VECTOR
            self._copy_row(mQ, tQsQ[None, m, None], offset, lanes, thr_copy)

    @cute.jit
    def _copy_row(
        self,
        mX: cute.Tensor,
        sRow: cute.Tensor,
        offset: Int64,
        lanes: cutlass.Constexpr[int],
        thr_copy: cute.ThrCopy,
    ):
        for k in cutlass.range_constexpr(cute.size(sRow, mode=[1])):
            pointer = mX.iterator + cute.assume(offset + k * lanes * VECTOR, divby=VECTOR)
            source = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
            cute.copy(thr_copy, source, sRow[None, k])

    @cute.jit
    def _load_values(
        self,
        mV: cute.Tensor,
        stride: Int64,
        column: Int32,
        first: Int32,
        keys: Int32,
        tidx: Int32,
    ) -> cute.Tensor:
        """A thread's groups of columns: (words, vectors, groups). Rows as of the keys."""
        groups = const_expr(self.block_size * self.head_dim_v // _GROUP)
        values = cute.make_rmem_tensor((_QUAD, _QUAD, cute.ceil_div(groups, _THREADS)), Int32)
        for i in cutlass.range_constexpr(cute.size(values, mode=[2])):
            if groups % _THREADS == 0 or i * _THREADS + tidx < groups:
                row, group = self._place(i * _THREADS + tidx)
                key = first + cutlass.min(row, keys - 1)
                offset = Int64(key) * stride + (column + group * _GROUP)
                for v in cutlass.range_constexpr(_QUAD):
                    vector = load_vector(mV, offset + v * VECTOR)
                    values[None, v, i].store(cute.recast_tensor(vector, Int32).load())
        return values

    @cute.jit
    def _store_values(self, values: cute.Tensor, sV: cute.Tensor, tidx: Int32):
        """In each group, word ``w`` of vector ``v`` (two columns) becomes word ``v`` of vector
        ``w``. In a row of the output, the words that wgmma gives one thread are then a vector."""
        groups = const_expr(self.block_size * self.head_dim_v // _GROUP)
        for i in cutlass.range_constexpr(cute.size(values, mode=[2])):
            if groups % _THREADS == 0 or i * _THREADS + tidx < groups:
                row, group = self._place(i * _THREADS + tidx)
                for w in cutlass.range_constexpr(_QUAD):
                    vector = cute.make_rmem_tensor(VECTOR, self.dtype)
                    cute.recast_tensor(vector, Int32).store(values[w, None, i].load())
                    target = cute.local_tile(sV, (1, VECTOR), (row, group * _QUAD + w))
                    cute.autovec_copy(vector, cute.group_modes(target, 0, 2))

    def _place(self, index: Int32) -> tuple[Int32, Int32]:
        """Row and group of columns; neighbours differ in the banks of shared memory."""
        side = 2 if self.head_dim_v % (2 * _GROUP) == 0 else 1
        row = index // side % self.block_size
        return row, index // (side * self.block_size) * side + index % side

    @cute.jit
    def _store_row(
        self, rO: cute.Tensor, r: cutlass.Constexpr[int], mPartial: cute.Tensor, offset: Int64
    ):
        """From registers as they are: words of the thread's two rows alternate."""
        words = cute.recast_tensor(cute.make_tensor(rO.iterator, cute.size(rO)), Int32)
        for group in cutlass.range_constexpr(self.head_dim_v // _GROUP):
            vector = [words[2 * (group * _QUAD + w) + r] for w in range(_QUAD)]
            pointer = mPartial.iterator + (offset + group * _GROUP)
            copy_utils.store_v4(pointer, *vector, cop=STORE)

    @cute.jit
    def _softmax(self, row: cute.Tensor, scale_log2: Float32) -> tuple[Float32, Float32]:
        """``row`` becomes ``exp2(scale_log2 * (row - its largest))``; 1 / sum, log2 of the sum."""
        scores = row.load()
        largest = cute.arch.warp_reduction_max(utils.fmax_reduce(scores), threads_in_group=4)
        offset = largest * scale_log2
        scores = cute.math.exp2(scores * scale_log2 - offset, fastmath=True)
        row.store(scores)
        total = cute.arch.warp_reduction_sum(utils.fadd_reduce(scores), threads_in_group=4)
        return cute.arch.rcp_approx(total), offset + cute.math.log2(total, fastmath=True)


class CombinePartials:
    """Outputs of the tokens of a wave: partial results weighted by their share of the sum.

    A CTA takes a tile of consecutive rows (query heads of tokens), a thread ``VECTOR`` columns of
    one. All that a thread loads but the positions is under way together, so that few threads keep
    the memory busy.
    """

    def __init__(self, head_dim_v: int, group: int, slots: int):
        self.head_dim_v = head_dim_v
        self.group = group
        self.slots = slots
        self.lanes = head_dim_v // VECTOR
        # Of shared memory: what a CTA has under way.
        self.elements = min(_LOADS, slots) * _THREADS * VECTOR

    @cute.jit
    def __call__(
        self,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        mPosition: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        wave_start: Int32,
        first_unit: Int32,
        units: Int32,
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
        stream,
    ):
        tensors = (mPartial, mPartialLse, mPosition, mOut, mLse)
        sizes = (wave_start, first_unit, units, chunks, chunk_tokens, num_tokens, kv_heads)
        self.kernel(*tensors, *sizes).launch(
            grid=[self.tiles_of_unit(chunk_tokens) * units, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        mPosition: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        wave_start: Int32,
        first_unit: Int32,
        units: Int32,
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
    ):
        bidx, _, _ = cute.arch.block_idx()
        tensors = (mPartial, mPartialLse, mPosition, mOut, mLse)
        sizes = (wave_start, first_unit, units, chunks, chunk_tokens, num_tokens, kv_heads)
        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout(self.elements)
        sPartial = smem.allocate_tensor(mPartial.element_type, layout, 128)
        self.combine_tile(*tensors, *sizes, sPartial.iterator, bidx)

    def tiles_of_unit(self, chunk_tokens: Int32) -> Int32:
        return cute.ceil_div(chunk_tokens * (self.group * self.lanes), _THREADS)

    @cute.jit
    def combine_tile(
        self,
        mPartial: cute.Tensor,
        mPartialLse: cute.Tensor,
        mPosition: cute.Tensor,
        mOut: cute.Tensor,
        mLse: cute.Tensor,
        wave_start: Int32,
        first_unit: Int32,
        units: Int32,
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
        shared: cute.Pointer,
        tile: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        tiles = self.tiles_of_unit(chunk_tokens)
        unit = first_unit + tile // tiles
        thread = tile % tiles * _THREADS + tidx
        row, column = thread // self.lanes, thread % self.lanes * VECTOR
        local, head = row // self.group, row % self.group
        kv_head, token = unit // chunks, unit % chunks * chunk_tokens + local
        # Of warps, all threads go the same way, with nothing to do as well.
        wanted = local < chunk_tokens and token < num_tokens
        if unit < first_unit + units:
            token_row = Int64(cutlass.min(token, num_tokens - 1)) * kv_heads + kv_head
            position = cute.make_rmem_tensor(self.slots, Int32)
            aligned = const_expr(4 if self.slots % 4 == 0 else 1)
            pointer = mPosition.iterator + cute.assume(token_row * self.slots, divby=aligned)
            cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(self.slots)), position)
            for i in cutlass.range_constexpr(self.slots):
                present = wanted and position[i] >= 0
                position[i] = position[i] - wave_start if present else Int32(-1)
            # Loads have no condition, which would hold up the next. Where there is no pair, they
            # are of the first in the workspace, perhaps not written, and what comes is dropped.
            # Partial results pass through shared memory, and warps synchronise, for else the
            # compiler puts loads off until their results are needed, to save registers.
            layout = cute.make_ordered_layout((_LOADS, _THREADS, (VECTOR, 1)), order=(2, 1, 0))
            sPartial = cute.make_tensor(shared, layout)[None, tidx, None]
            load_partials = functools.partial(
                self._load_partials,
                *(mPartial, sPartial, position, head * self.head_dim_v + column),
            )
            load_partials(0)
            cute.arch.sync_warp()
            weight = cute.make_rmem_tensor(self.slots, Float32)
            for i in cutlass.range_constexpr(self.slots):
                source = cutlass.max(position[i], 0)
                weight[i] = mPartialLse[Int64(source) * self.group + head]
            cute.arch.sync_warp()
            for i in cutlass.range_constexpr(self.slots):
                weight[i] = weight[i] if position[i] >= 0 else -Float32.inf
            largest = weight[0]
            for i in cutlass.range_constexpr(1, self.slots):
                largest = utils.fmax(largest, weight[i])
            # Of a token with no pair, all weights are then 0.
            reference = Float32(0.0) if largest == -Float32.inf else largest
            total = Float32(0.0)
            for i in cutlass.range_constexpr(self.slots):
                weight[i] = cute.math.exp2(weight[i] - reference, fastmath=True)
                total += weight[i]
            inverse = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)

            out = cute.make_rmem_tensor(VECTOR, Float32)
            out.fill(0.0)
            for start in cutlass.range_constexpr(0, self.slots, _LOADS):
                if const_expr(start > 0):
                    load_partials(start)
                cute.arch.cp_async_wait_group(0)
                for i in cutlass.range_constexpr(start, min(start + _LOADS, self.slots)):
                    share = weight[i] * inverse
                    self._accumulate(out, sPartial[i - start, None], position[i], share)
            if wanted:
                out_row = token_row * self.group + head
                store_vector(out.load(), mOut, out_row * self.head_dim_v + column)
                if column == 0:
                    # log2 of 0 is -inf.
                    log2_sum = reference + cute.math.log2(total, fastmath=True)
                    mLse[out_row] = log2_sum * math.log(2.0)

    @cute.jit
    def _accumulate(self, out: cute.Tensor, sVector: cute.Tensor, position: Int32, share: Float32):
        vector = cute.make_rmem_tensor(VECTOR, sVector.element_type)
        cute.autovec_copy(cute.group_modes(sVector, 0, 1), vector)
        # All ones with a pair, else zeros: what is not written may be NaN.
        mask = ~(position >> 31)
        words = cute.recast_tensor(vector, Int32)
        for w in cutlass.range_constexpr(cute.size(words)):
            words[w] = words[w] & mask
        out.store(out.load() + vector.load().to(Float32) * share)

    @cute.jit
    def _load_partials(
        self,
        mPartial: cute.Tensor,
        sPartial: cute.Tensor,
        position: cute.Tensor,
        column: Int32,
        start: cutlass.Constexpr[int],
    ):
        """Those of the slots from ``start`` on; a thread reads what it loaded itself."""
        operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
        bits = const_expr(VECTOR * mPartial.element_type.width)
        atom = cute.make_copy_atom(operation, mPartial.element_type, num_bits_per_copy=bits)
        for i in cutlass.range_constexpr(start, min(start + _LOADS, self.slots)):
            source = cutlass.max(position[i], 0)
            offset = Int64(source) * (self.group * self.head_dim_v) + column
            pointer = mPartial.iterator + cute.assume(offset, divby=VECTOR)
            vector = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
            cute.copy(atom, vector, sPartial[i - start, None])
        cute.arch.cp_async_commit_group()


@functools.lru_cache(maxsize=None)
def compile_forward(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
    slots: int,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        SelectedForward(cute_dtype, head_dim, head_dim_v, group, block_size, causal, slots),
        *(fake_flat(cute_dtype) for _ in range(3)),
        *(fake_flat(Int32, alignment=4) for _ in range(3)),
        *(fake_flat(cute_dtype), fake_flat(Float32, alignment=4)),
        *(fake_flat(cute_dtype), fake_flat(Float32, alignment=4)),
        *(fake_flat(Int32), fake_flat(cute_dtype), fake_flat(Float32, alignment=4)),
        *(Int64(1) for _ in range(3)),
        *(Int32(1) for _ in range(9)),
        Float32(1.0),
    )


@functools.lru_cache(maxsize=None)
def compile_combine(dtype: torch.dtype, head_dim_v: int, group: int, slots: int) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        CombinePartials(head_dim_v, group, slots),
        fake_flat(cute_dtype),
        fake_flat(Float32, alignment=4),
        fake_flat(Int32),
        fake_flat(cute_dtype),
        fake_flat(Float32, alignment=4),
        *(Int32(1) for _ in range(7)),
    )


# Head dimensions of queries and values, and query heads of a KV head, that are compiled as a test.
_SHAPES = (
    *((64, 64, 1), (96, 96, 3), (128, 128, 16)),
    *((256, 256, 6), (256, 128, 16), (64, 128, 3)),
)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, dim_v, group in _SHAPES:
            size, slots = (32, 3) if group == 3 else (64, 16)
            for causal in (True, False) if group == 16 else (True,):
                arguments = (dtype, dim, dim_v, group, size, causal, slots)
                form = f"{name}-{dim}-{dim_v}-{group}-{size}{'' if causal else '-all'}"
                yield f"selected-forward-{form}", functools.partial(compile_forward, *arguments)
            combine = functools.partial(compile_combine, dtype, dim_v, group, slots)
            yield f"combine-partials-{name}-{dim_v}-{group}-{slots}", combine


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of each token over the keys of its blocks.

    Args:
        q: ``(T, H, D)``, bfloat16 or float16. Slices of heads are read where they are, as of k, v.
        k: ``(T, H_kv, D)``.
        v: ``(T, H_kv, Dv)``.
        block_indices: int32 ``(T, H_kv, slots)``, indices in the token's sequence, in any order and
            none twice. Others than those that ``blocks`` lets the token attend are left out.
        blocks: of the ``T`` tokens.
        block_size: tokens of a block, 32 or 64.
        scale: positive.
        causal: whether a token sees only keys at or before it.

    Returns:
        out: ``(T, H, Dv)`` in the dtype of q, 0 for a token with no block.
        lse: float32 ``(T, H)``, natural logarithm, -inf for a token with no block.
    """
    total, heads, head_dim = q.shape
    kv_heads, head_dim_v = v.shape[1:]
    group, slots = heads // kv_heads, block_indices.shape[2]
    chunk = choose_chunk_tokens(total, group, len(blocks.first), slots, 2 * head_dim)
    wave = units_of_wave(chunk, slots, group, head_dim_v, 2 if OVERLAP else 1)
    index = invert_index(block_indices, blocks, block_size, causal, chunk, wave)
    out = torch.empty(total, heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(total, heads, dtype=torch.float32, device=q.device)
    forward = compile_forward(q.dtype, head_dim, head_dim_v, group, block_size, causal, slots)
    (q, q_stride), (k, k_stride), (v, v_stride) = flat_rows(q), flat_rows(k), flat_rows(v)

    unit_pairs = index.chunk_tokens * slots
    waves, wave_items, _ = index.items.shape
    rows = min(index.wave_units, index.units) * unit_pairs * group
    partial, partial_lse = (
        torch.empty(min(waves, 2 if OVERLAP else 1), size, dtype=dtype, device=q.device)
        for size, dtype in ((rows * head_dim_v, q.dtype), (rows, torch.float32))
    )
    items, position = index.items.view(-1), index.position.view(-1)
    for wave in range(waves + OVERLAP):
        now, done = wave % len(partial), (wave - 1) % len(partial)
        forward(
            *(q, k, v, index.tokens, items, index.num_items),
            *(partial[now], partial_lse[now], partial[done], partial_lse[done]),
            *(position, out.view(-1), lse.view(-1), q_stride, k_stride, v_stride),
            *(wave, waves, wave_items, index.wave_units, index.units),
            *(index.chunks, index.chunk_tokens, total, kv_heads, scale * _LOG2_E),
        )
        if not OVERLAP:
            first_unit = wave * index.wave_units
            compile_combine(q.dtype, head_dim_v, group, slots)(
                *(partial[0], partial_lse[0], position, out.view(-1), lse.view(-1)),
                *(first_unit * unit_pairs, first_unit),
                min(index.wave_units, index.units - first_unit),
                *(index.chunks, index.chunk_tokens, total, kv_heads),
            )
    return out, lse
