"""Selected branch of token mode, forward: each block's keys meet the queries that selected it.

A CTA is one warpgroup and takes one work item of the inverted index: a block's K and V stay in
shared memory while query rows of the item's pairs stream past, 64 at a time. Row r of an item is
query head ``r % G`` of pair ``r // G``, so any group size fills the tiles. Each pair gives a
partial output (normalised, rounded to the dtype of q) and the log-sum-exp of its scores, stored in
the order of the list; a second kernel adds up the pairs of each token.

The rows of the next tile are gathered by cp.async while this one is computed. The output of a tile
is staged in the shared memory of its queries. Three CTAs share an SM at head dimension 128 and hide
each other's latencies; there is no warp specialisation.
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
_WARP = 32
# Rows of wgmma, and of a warp.
_ROWS = 64
_WARP_ROWS = 16
_SHARED_BYTES = 227 * 1024
_LOG2_E = math.log2(math.e)
# Partial results that a thread of the combination loads together.
_LOADS = 8


def row_lanes(head_dim: int) -> int:
    """Neighbouring threads that load a row together, 16 bytes each."""
    return 8 if head_dim % 64 == 0 else 4


def row_copy(dtype: type[cutlass.Numeric], lanes: int, threads: int, operation) -> cute.TiledCopy:
    """``threads / lanes`` rows at a time, ``lanes`` threads a row."""
    return cute.make_tiled_copy_tv(
        cute.make_copy_atom(operation, dtype, num_bits_per_copy=VECTOR * dtype.width),
        cute.make_ordered_layout((threads // lanes, lanes), order=(1, 0)),
        cute.make_layout((1, VECTOR)),
    )


def async_row_copy(dtype: type[cutlass.Numeric], lanes: int, threads: int) -> cute.TiledCopy:
    """Through L2 only: no CTA reads a row twice."""
    operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    return row_copy(dtype, lanes, threads, operation)


class SelectedForward:
    """Partial results of the pairs of a wave."""

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        head_dim_v: int,
        group: int,
        block_size: int,
        causal: bool,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.block_size = block_size
        self.causal = causal
        self.stage_size = _ROWS * max(head_dim, head_dim_v)
        kv_size = block_size * (head_dim + head_dim_v)
        fixed = kv_size * 2 + ITEM_TOKENS * 4 + 2048
        # Registers allow 3 CTAs; with wide values, whose output takes up to 128 registers, 2.
        most = 3 if head_dim_v <= 128 else 2
        self.ctas = max(1, min(most, _SHARED_BYTES // (fixed + 2 * self.stage_size * 2 + 1024)))

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
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        wave: Int32,
        wave_items: Int32,
        wave_start: Int32,
        unit_pairs: Int32,
        chunks: Int32,
        scale_log2: Float32,
        stream,
    ):
        q_smem, k_smem, v_smem, o_smem = (
            sm90_utils.make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, shape)
            for shape in (
                (_ROWS, self.head_dim),
                (self.block_size, self.head_dim),
                (self.block_size, self.head_dim_v),
                (_ROWS, self.head_dim_v),
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
        tensors = (mQ, mK, mV, mTokens, mItems, mNumItems, mPartial, mLse)
        sizes = (q_stride, k_stride, v_stride, wave, wave_items, wave_start, unit_pairs, chunks)
        layouts = (mma_qk, mma_pv, q_smem, k_smem, v_smem, o_smem)
        self.kernel(*tensors, *sizes, scale_log2, *layouts).launch(
            grid=[wave_items, 1, 1],
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
        mLse: cute.Tensor,
        q_stride: Int64,
        k_stride: Int64,
        v_stride: Int64,
        wave: Int32,
        wave_items: Int32,
        wave_start: Int32,
        unit_pairs: Int32,
        chunks: Int32,
        scale_log2: Float32,
        mma_qk: cute.TiledMma,
        mma_pv: cute.TiledMma,
        q_smem: cute.ComposedLayout,
        k_smem: cute.ComposedLayout,
        v_smem: cute.ComposedLayout,
        o_smem: cute.ComposedLayout,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // _WARP), tidx % _WARP
        if bidx < mNumItems[wave]:
            field = (Int64(wave) * wave_items + bidx) * ITEM_FIELDS
            begin, count = mItems[field], mItems[field + 1]
            first, keys = mItems[field + 2], mItems[field + 3]
            kv_head = begin // unit_pairs // chunks

            smem = cutlass.utils.SmemAllocator()
            sK = smem.allocate_tensor(self.dtype, k_smem.outer, 1024, swizzle=k_smem.inner)
            sV = smem.allocate_tensor(self.dtype, v_smem.outer, 1024, swizzle=v_smem.inner)
            # Two stages; queries, and in their place the output.
            stages = cute.make_layout(2, stride=self.stage_size)
            stage_layout = cute.make_layout(2 * self.stage_size)
            sStages = smem.allocate_tensor(self.dtype, stage_layout, 1024)
            sQ, sO = (
                cute.make_tensor(
                    cute.recast_ptr(sStages.iterator, layout.inner, self.dtype),
                    cute.append(layout.outer, stages),
                )
                for layout in (q_smem, o_smem)
            )
            sTokens = smem.allocate_tensor(Int32, cute.make_layout(ITEM_TOKENS), 16)

            for i in cutlass.range(tidx, count, _THREADS, unroll=1):
                sTokens[i] = mTokens[begin + i]
            self._load_block(mK, sK, k_stride, kv_head * self.head_dim, first, keys, tidx)
            self._load_block(mV, sV, v_stride, kv_head * self.head_dim_v, first, keys, tidx)
            cute.arch.barrier()
            load_queries = functools.partial(
                self._load_queries, mQ, sQ, sTokens, q_stride, kv_head, count, tidx
            )
            load_queries(Int32(0), Int32(0))
            cute.arch.cp_async_commit_group()

            _, tSrQ, tSrK = sm90_utils.partition_fragment_ABC(
                mma_qk.get_slice(0), (_ROWS, self.block_size, self.head_dim), sQ, sK
            )
            _, tOrP, tOrVt = sm90_utils.partition_fragment_ABC(
                mma_pv.get_slice(0),
                (_ROWS, self.head_dim_v, self.block_size),
                None,
                layout_utils.transpose_view(sV),
            )
            store_output, _, _ = copy_utils.get_smem_store_C(
                mma_pv, sO, tidx, position_independent=True
            )
            tScS = layout_utils.reshape_acc_to_mn(
                mma_qk.get_slice(tidx).partition_C(
                    cute.make_identity_tensor((_ROWS, self.block_size))
                )
            )
            out_row = (begin - wave_start) * self.group

            tiles = cute.ceil_div(count * self.group, _ROWS)
            for tile in cutlass.range(tiles, unroll=1):
                stage = tile % 2
                # Also orders what was done in the other stage before it is loaded again.
                cute.arch.cp_async_wait_group(0)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier()
                if tile + 1 < tiles:
                    load_queries(tile + 1, 1 - stage)
                cute.arch.cp_async_commit_group()

                acc_S = sm90_utils.gemm_zero_init(
                    mma_qk, (_ROWS, self.block_size), tSrQ, tSrK, A_idx=stage, wg_wait=-1
                )
                row = tile * _ROWS + tScS[0, 0][0]
                limits = cute.make_rmem_tensor(2, Int32)
                for r in cutlass.range_constexpr(2):
                    limits[r] = keys
                    if const_expr(self.causal):
                        pair = cutlass.min((row + 8 * r) // self.group, count - 1)
                        limits[r] = cutlass.min(keys, sTokens[pair] - first + 1)
                warpgroup.wait_group(0)
                acc_S_mn = layout_utils.reshape_acc_to_mn(acc_S)
                if cutlass.min(limits[0], limits[1]) < self.block_size:
                    for r in cutlass.range_constexpr(2):
                        for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                            visible = tScS[r, c][1] < limits[r]
                            acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

                inverse_sum = cute.make_rmem_tensor(2, Float32)
                for r in cutlass.range_constexpr(2):
                    inverse_sum[r], lse = self._softmax(acc_S_mn[r, None], scale_log2)
                    if tScS[0, 0][1] == 0 and row + 8 * r < count * self.group:
                        mLse[Int64(out_row) + (row + 8 * r)] = lse
                utils.cvt_f16(layout_utils.reshape_acc_to_frgA(acc_S), tOrP)
                acc_O = sm90_utils.gemm_zero_init(
                    mma_pv, (_ROWS, self.head_dim_v), tOrP, tOrVt, wg_wait=0
                )
                acc_O_mn = layout_utils.reshape_acc_to_mn(acc_O)
                for r in cutlass.range_constexpr(2):
                    acc_O_mn[r, None].store(acc_O_mn[r, None].load() * inverse_sum[r])
                rO = utils.cvt_f16(acc_O, self.dtype)

                # All warps have read the queries. Then each warp stores its own rows.
                cute.arch.barrier()
                store_output(rO, dst_idx=stage)
                cute.arch.sync_warp()
                self._store_rows(
                    sO[None, None, stage], mPartial, out_row, tile, count * self.group, warp, lane
                )

    @cute.jit
    def _load_block(
        self,
        mX: cute.Tensor,
        sX: cute.Tensor,
        stride: Int64,
        column: Int32,
        first: Int32,
        keys: Int32,
        tidx: Int32,
    ):
        """Rows past the block's keys repeat its last one: they are masked, but must be finite."""
        width = const_expr(cute.size(sX, mode=[1]))
        lanes = const_expr(row_lanes(width))
        thr_copy = async_row_copy(self.dtype, lanes, _THREADS).get_slice(tidx)
        tXsX = copy_utils.partition_D_position_independent(thr_copy, sX)
        for m in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
            row = first + cutlass.min(tidx // lanes + m * (_THREADS // lanes), keys - 1)
            offset = Int64(row) * stride + column + tidx % lanes * VECTOR
            self._copy_row(mX, tXsX[None, m, None], offset, lanes, thr_copy)

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
    def _softmax(self, row: cute.Tensor, scale_log2: Float32) -> tuple[Float32, Float32]:
        """``row`` becomes ``exp2(scale_log2 * (row - its largest))``; 1 / sum, log2 of the sum."""
        scores = row.load()
        largest = cute.arch.warp_reduction_max(utils.fmax_reduce(scores), threads_in_group=4)
        offset = largest * scale_log2
        scores = cute.math.exp2(scores * scale_log2 - offset, fastmath=True)
        row.store(scores)
        total = cute.arch.warp_reduction_sum(utils.fadd_reduce(scores), threads_in_group=4)
        return cute.arch.rcp_approx(total), offset + cute.math.log2(total, fastmath=True)

    @cute.jit
    def _store_rows(
        self,
        sO: cute.Tensor,
        mPartial: cute.Tensor,
        out_row: Int32,
        tile: Int32,
        rows: Int32,
        warp: Int32,
        lane: Int32,
    ):
        """The warp's 16 rows of the tile, in whole lines."""
        width = const_expr(self.head_dim_v)
        lanes = const_expr(row_lanes(width))
        thr_copy = row_copy(self.dtype, lanes, _WARP, cute.nvgpu.CopyUniversalOp()).get_slice(lane)
        tOsO = thr_copy.partition_S(cute.local_tile(sO, (_WARP_ROWS, width), (warp, 0)))
        for m in cutlass.range_constexpr(cute.size(tOsO, mode=[1])):
            row = tile * _ROWS + warp * _WARP_ROWS + lane // lanes + m * (_WARP // lanes)
            if row < rows:
                offset = (Int64(out_row) + row) * width + lane % lanes * VECTOR
                for k in cutlass.range_constexpr(cute.size(tOsO, mode=[2])):
                    rO = cute.make_rmem_tensor(((VECTOR, 1),), self.dtype)
                    cute.autovec_copy(tOsO[None, m, k], rO)
                    position = cute.assume(offset + k * lanes * VECTOR, divby=VECTOR)
                    target = cute.make_tensor(
                        mPartial.iterator + position, cute.make_layout(((VECTOR, 1),))
                    )
                    cute.autovec_copy(rO, target)


class CombinePartials:
    """Outputs of the tokens of a wave: partial results weighted by their share of the sum."""

    def __init__(self, head_dim_v: int, group: int, slots: int):
        self.head_dim_v = head_dim_v
        self.group = group
        self.slots = slots
        self.lanes = head_dim_v // VECTOR

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
        sizes = (wave_start, first_unit, chunks, chunk_tokens, num_tokens, kv_heads)
        threads = chunk_tokens * (self.group * self.lanes)
        self.kernel(*tensors, *sizes).launch(
            grid=[cute.ceil_div(threads, _THREADS), units, 1],
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
        chunks: Int32,
        chunk_tokens: Int32,
        num_tokens: Int32,
        kv_heads: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, unit, _ = cute.arch.block_idx()
        unit += first_unit
        thread = bidx * _THREADS + tidx
        row, column = thread // self.lanes, thread % self.lanes * VECTOR
        local, head = row // self.group, row % self.group
        kv_head, token = unit // chunks, unit % chunks * chunk_tokens + local
        if local < chunk_tokens and token < num_tokens:
            token_row = Int64(token) * kv_heads + kv_head
            position = cute.make_rmem_tensor(self.slots, Int32)
            aligned = const_expr(4 if self.slots % 4 == 0 else 1)
            pointer = mPosition.iterator + cute.assume(token_row * self.slots, divby=aligned)
            cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(self.slots)), position)
            weight = cute.make_rmem_tensor(self.slots, Float32)
            for i in cutlass.range_constexpr(self.slots):
                weight[i] = -Float32.inf
                if position[i] >= 0:
                    position[i] -= wave_start
                    weight[i] = mPartialLse[Int64(position[i]) * self.group + head]
            largest = weight[0]
            for i in cutlass.range_constexpr(1, self.slots):
                largest = utils.fmax(largest, weight[i])
            # Of a token with no pair, all weights are then 0.
            reference = Float32(0.0) if largest == -Float32.inf else largest
            total = Float32(0.0)
            for i in cutlass.range_constexpr(self.slots):
                weight[i] = cute.math.exp2(weight[i] - reference, fastmath=True)
                total += weight[i]
            inverse = Float32(0.0) if total == 0.0 else 1.0 / total

            out = cute.make_rmem_tensor(VECTOR, Float32)
            out.fill(0.0)
            for start in cutlass.range_constexpr(0, self.slots, _LOADS):
                stop = const_expr(min(start + _LOADS, self.slots))
                loaded = []
                for i in cutlass.range_constexpr(start, stop):
                    # Loads without a condition go out together; with no pair, of some other row.
                    source = Int64(cutlass.max(position[i], 0)) * self.group + head
                    loaded.append(load_vector(mPartial, source * self.head_dim_v + column))
                for i in cutlass.range_constexpr(start, stop):
                    if position[i] >= 0:
                        share = weight[i] * inverse
                        out.store(out.load() + loaded[i - start].load().to(Float32) * share)
            out_row = token_row * self.group + head
            store_vector(out.load(), mOut, out_row * self.head_dim_v + column)
            if column == 0:
                # log2 of 0 is -inf.
                log2_sum = reference + cute.math.log2(total, fastmath=True)
                mLse[out_row] = log2_sum * math.log(2.0)


@functools.lru_cache(maxsize=None)
def compile_forward(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        SelectedForward(cute_dtype, head_dim, head_dim_v, group, block_size, causal),
        *(fake_flat(cute_dtype) for _ in range(3)),
        *(fake_flat(Int32, alignment=4) for _ in range(3)),
        fake_flat(cute_dtype),
        fake_flat(Float32, alignment=4),
        *(Int64(1) for _ in range(3)),
        *(Int32(1) for _ in range(5)),
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


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, group, size in ((64, 1, 64), (96, 3, 32), (128, 16, 64), (256, 6, 64)):
            for causal in (True, False) if dim == 128 else (True,):
                arguments = (dtype, dim, dim, group, size, causal)
                form = f"{name}-{dim}-{group}-{size}{'' if causal else '-all'}"
                yield f"selected-forward-{form}", functools.partial(compile_forward, *arguments)
            combine = functools.partial(compile_combine, dtype, dim, group, 16 if group > 1 else 3)
            yield f"combine-partials-{name}-{dim}-{group}", combine


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
    wave = units_of_wave(chunk, slots, group, head_dim_v)
    index = invert_index(block_indices, blocks, block_size, causal, chunk, wave)
    out = torch.empty(total, heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(total, heads, dtype=torch.float32, device=q.device)
    forward = compile_forward(q.dtype, head_dim, head_dim_v, group, block_size, causal)
    combine = compile_combine(q.dtype, head_dim_v, group, slots)
    (q, q_stride), (k, k_stride), (v, v_stride) = flat_rows(q), flat_rows(k), flat_rows(v)

    unit_pairs = index.chunk_tokens * slots
    rows = min(index.wave_units, index.units) * unit_pairs * group
    partial = torch.empty(rows * head_dim_v, dtype=q.dtype, device=q.device)
    partial_lse = torch.empty(rows, dtype=torch.float32, device=q.device)
    waves, wave_items, _ = index.items.shape
    items, position = index.items.view(-1), index.position.view(-1)
    for wave in range(waves):
        first_unit = wave * index.wave_units
        units = min(index.wave_units, index.units - first_unit)
        wave_start = first_unit * unit_pairs
        forward(
            *(q, k, v, index.tokens, items, index.num_items, partial, partial_lse),
            *(q_stride, k_stride, v_stride, wave, wave_items, wave_start, unit_pairs),
            *(index.chunks, scale * _LOG2_E),
        )
        combine(
            *(partial, partial_lse, position, out.view(-1), lse.view(-1)),
            *(wave_start, first_unit, units, index.chunks, index.chunk_tokens, total, kv_heads),
        )
    return out, lse
