"""Importance of selection blocks to each token and KV head (paper Eq. 8 to 10), on Hopper.

The product is transposed, ``S^T = K_cmp Q^T``: the accumulator's rows are compressed tokens and its
columns are (token, query head) pairs. A thread holds the same quarter of the columns in every row,
and which query is in which column is free. So the heads of a token are put in the columns of one
thread, and their sum needs no exchange between threads, whatever the number of heads.

A CTA has a warp that loads compressed keys by TMA and two warpgroups, each with query columns of
its own in shared memory for the whole run. The work of a warpgroup is a sequence of units, 64
compressed tokens by its columns (or half of them): while one unit's product is computed, the
exponentials of the unit before it are. The sums of a unit go through shared memory, to be weighted
by overlap and written, block by block. What the end of a tile adds to the first blocks of the next
one waits in the registers of the threads that write these.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.hardware import LOG2_E, QUAD, WARP, WARP_ROWS, WARPGROUP, WGMMA_ROWS
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import gemm, make_smem_layout, mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
)
from nsa.fused.token_inputs import (
    MAX_GROUP,
    PITCH,
    TILE_FIELDS,
    WARPGROUPS,
    Rule,
    TokenTiles,
    choose_shape,
)

_THREADS = (1 + WARPGROUPS) * WARPGROUP


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Compressed keys, the other inputs but the queries, and the scores."""

    k: cute.Tensor
    lse: cute.Tensor
    tiles: cute.Tensor
    first_tile: cute.Tensor
    scores: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """``tiles`` of tokens in all, ``grid_tiles`` of them for this chunk; ``width`` of the scores.

    The tokens of the chunk are ``start`` to ``stop - 1``.
    """

    batch: Int32
    length: Int32
    kv_heads: Int32
    tiles: Int32
    grid_tiles: Int32
    chunk: Int32
    start: Int32
    stop: Int32
    width: Int32


class ImportanceScores:
    """Scores of all selection blocks that start at or before each token of a chunk."""

    def __init__(self, dtype: type[cutlass.Numeric], head_dim: int, group: int, rule: Rule):
        self.dtype = dtype
        self.head_dim = head_dim
        self.group = group
        self.rule = rule
        self.shape = choose_shape(head_dim, group)
        self.blocks = rule.rows // rule.per_select
        self.weights = rule.weights()
        # (Selection block of a tile, token of a unit) pairs that a thread weights.
        self.items = -(-self.blocks * self.shape.unit_tokens // WARPGROUP)

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        tensors: _Tensors,
        sizes: _Sizes,
        compressed: Int32,
        q_stride: Int64,
        scale_log2: Float32,
        stream,
    ):
        shape, dim = self.shape, self.head_dim
        row = cute.assume(Int64(sizes.kv_heads) * dim, divby=VECTOR)
        entry = cute.assume(Int64(compressed) * sizes.kv_heads * dim, divby=VECTOR)
        shape_k = (compressed, dim, sizes.kv_heads, sizes.batch)
        k_layout = cute.make_layout(shape_k, stride=(row, 1, dim, entry))
        k_smem = make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, (WGMMA_ROWS, dim), shape.stages)
        q_smem = make_smem_layout(
            self.dtype, LayoutEnum.ROW_MAJOR, (shape.columns, dim), WARPGROUPS * shape.parts
        )
        tma_atom, tma_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(tensors.k.iterator, k_layout),
            cute.select(k_smem, mode=[0, 1]),
            (WGMMA_ROWS, dim),
            1,
        )
        tiled_mma = hopper_helpers.make_trivial_tiled_mma(
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            atom_layout_mnk=(1, 1, 1),
            tiler_mn=(WGMMA_ROWS, shape.columns),
        )
        tensors = tensors._replace(k=tma_tensor)
        layouts = (q_smem, k_smem)
        self.kernel(
            *(mQ, tma_atom, tensors, sizes, q_stride, scale_log2, tiled_mma, layouts)
        ).launch(
            grid=[sizes.grid_tiles * sizes.kv_heads * sizes.batch, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        mQ: cute.Tensor,
        tma_atom: cute.CopyAtom,
        tensors: _Tensors,
        sizes: _Sizes,
        q_stride: Int64,
        scale_log2: Float32,
        tiled_mma: cute.TiledMma,
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        q_smem, k_smem = layouts
        batch, length, kv_heads, tiles, grid_tiles, chunk, start, stop, width = sizes
        mTiles = tensors.tiles
        shape, rule = self.shape, self.rule
        units = const_expr(WARPGROUPS * shape.parts)
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tidx // WARP)
        if warp == 0:
            cpasync.prefetch_descriptor(tma_atom)

        smem = cutlass.memory.SmemAllocator()
        barriers = smem.allocate_array(Int64, 2 * shape.stages)
        sQ = smem.allocate_tensor(
            self.dtype, q_smem.outer, byte_alignment=1024, swizzle=q_smem.inner
        )
        sK = smem.allocate_tensor(
            self.dtype, k_smem.outer, byte_alignment=1024, swizzle=k_smem.inner
        )
        sums_layout = cute.make_layout(
            (shape.unit_tokens, PITCH, 2, WARPGROUPS),
            stride=(PITCH, 1, shape.unit_tokens * PITCH, 2 * shape.unit_tokens * PITCH),
        )
        sSums = smem.allocate_tensor(Float32, sums_layout, byte_alignment=16)
        lse_layout = cute.make_ordered_layout((shape.lse_pitch, QUAD, units), order=(0, 1, 2))
        sLse = smem.allocate_tensor(Float32, lse_layout, byte_alignment=16)
        bounds_layout = cute.make_ordered_layout((shape.unit_tokens, units), order=(0, 1))
        sVisible = smem.allocate_tensor(Int32, bounds_layout, byte_alignment=16)
        sBlocks = smem.allocate_tensor(Int32, bounds_layout, byte_alignment=16)

        group_of = functools.partial(pipeline.CooperativeGroup, pipeline.Agent.Thread)
        pipeline_k = pipeline.PipelineTmaAsync.create(
            barrier_storage=barriers,
            num_stages=shape.stages,
            producer_group=group_of(1),
            consumer_group=group_of(WARPGROUPS * WARPGROUP // WARP),
            tx_count=WGMMA_ROWS * self.head_dim * self.dtype.width // 8,
        )

        # Late tiles see most and start first; the heads of a tile run together.
        kv_head, entry = bidx % kv_heads, bidx // kv_heads % batch
        tile = tensors.first_tile[chunk] + grid_tiles - 1 - bidx // (kv_heads * batch)
        field = cutlass.min(tile, tiles - 1) * TILE_FIELDS
        tile_start, position, count = mTiles[field], mTiles[field + 1], mTiles[field + 2]
        k_start, k_count, k_blocks = mTiles[field + 3], mTiles[field + 4], mTiles[field + 5]
        count = count if tile < tiles else Int32(0)
        # Tokens low .. high - 1 of the tile are in the chunk.
        low, high = cutlass.max(start - tile_start, 0), cutlass.min(count, stop - tile_start)
        num_blocks = k_blocks
        if const_expr(rule.causal):
            num_blocks = (position + high - 1) // rule.select_size + 1
        num_tiles = Int32(0)
        if low < high:
            num_tiles = cute.ceil_div(num_blocks, self.blocks)
        # Two units a step.
        num_steps = num_tiles if const_expr(shape.parts == 2) else (num_tiles + 1) // 2

        if warp < 4:
            cute.arch.setmaxregister_decrease(24)
            if warp == 0:
                loads = num_tiles if const_expr(shape.parts == 2) else 2 * num_steps
                self._load_keys(tma_atom, tensors.k, sK, pipeline_k, kv_head, entry, k_start, loads)
        else:
            cute.arch.setmaxregister_increase(240)
            if num_steps > 0:
                tid = tidx % WARPGROUP
                wg = cute.arch.make_warp_uniform(tidx // WARPGROUP - 1)
                row = entry * length + tile_start
                for part in cutlass.range_constexpr(shape.parts):
                    unit = wg * shape.parts + part
                    self._load_queries(mQ, sQ, q_stride, row, count, kv_head, unit, tid)
                cute.arch.cp_async_commit_group()
                for part in cutlass.range_constexpr(shape.parts):
                    unit = wg * shape.parts + part
                    if tid < shape.columns:
                        lse_row = (entry * kv_heads + kv_head) * self.group
                        offset = Int64(lse_row) * length + tile_start
                        self._load_lse(tensors.lse, sLse, offset, length, count, unit, tid)
                    if tid < shape.unit_tokens:
                        token = unit * shape.unit_tokens + tid
                        visible, blocks = k_count, k_blocks
                        if const_expr(rule.causal):
                            seen = position + token + 1 - rule.covered + rule.stride
                            visible = cutlass.min(cutlass.max(seen, 0) // rule.stride, k_count)
                            blocks = (position + token) // rule.select_size + 1
                        sVisible[tid, unit] = visible
                        # Nothing is written for a token outside of the chunk.
                        sBlocks[tid, unit] = blocks if token >= low and token < high else Int32(0)
                cute.arch.cp_async_wait_group(0)
                # Written by ordinary copies, read by the tensor cores.
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=1 + wg, number_of_threads=WARPGROUP)

                score_row = (
                    (Int64(entry) * kv_heads + kv_head) * (stop - start) + tile_start - start
                )
                mOut = cute.make_tensor(
                    tensors.scores.iterator + score_row * width, cute.make_layout(1 << 30)
                )
                self._score_tiles(
                    tiled_mma, pipeline_k, sQ, sK, sSums, sLse, sVisible, sBlocks, mOut,
                    num_steps, width, scale_log2, wg, tid,
                )  # fmt: skip

    @cute.jit
    def _load_keys(
        self,
        tma_atom: cute.CopyAtom,
        mK: cute.Tensor,
        sK: cute.Tensor,
        pipeline_k: pipeline.PipelineTmaAsync,
        kv_head: Int32,
        entry: Int32,
        first: Int32,
        loads: Int32,
    ):
        """Load tiles of compressed keys, from key ``first``, every ``rule.rows`` keys."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.shape.stages)
        for i in cutlass.range(loads, unroll=1):
            # TMA gives zeros past the last key of the tensor. Keys of other sequences are masked.
            mTile = cute.domain_offset(
                (first + i * self.rule.rows, 0), mK[None, None, kv_head, entry]
            )
            gK = cute.local_tile(mTile, (WGMMA_ROWS, self.head_dim), (0, 0))
            tKsK, tKgK = cpasync.tma_partition(
                tma_atom,
                0,
                cute.make_layout(1),
                cute.group_modes(sK, 0, 2),
                cute.group_modes(gK, 0, 2),
            )
            pipeline_k.producer_acquire(state)
            cute.copy(
                tma_atom,
                tKgK,
                tKsK[None, state.index],
                tma_bar_ptr=pipeline_k.producer_get_barrier(state),
            )
            pipeline_k.producer_commit(state)
            state.advance()

    def _query(self, column: Int32) -> tuple[Int32, Int32]:
        """The token of the unit and the head of the group in a column.

        A lane holds the pairs of columns ``8 i + 2 lane``; in their order, the heads of its first
        token, then of its second. Tokens are numbered with the lane fastest.
        """
        in_lane = column // 8 * 2 + column % 2
        return in_lane // self.group * QUAD + column % 8 // 2, in_lane % self.group

    @cute.jit
    def _load_queries(
        self,
        mQ: cute.Tensor,
        sQ: cute.Tensor,
        stride: Int64,
        row: Int32,
        count: Int32,
        kv_head: Int32,
        unit: Int32,
        tid: Int32,
    ):
        """Start to copy the queries of a unit; columns without one stay as they are, and unused."""
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
            self.dtype,
            num_bits_per_copy=128,
        )
        vectors = const_expr(self.head_dim // VECTOR)
        total = const_expr(self.shape.columns * vectors)
        sVectors = cute.flat_divide(sQ, (1, VECTOR))
        for i in cutlass.range(cute.ceil_div(total, WARPGROUP), unroll=4):
            vector = i * WARPGROUP + tid
            column, channel = vector // vectors, vector % vectors
            slot, head = self._query(column)
            token = unit * self.shape.unit_tokens + slot
            if vector < total and slot < self.shape.unit_tokens and token < count:
                in_row = (kv_head * self.group + head) * self.head_dim + channel * VECTOR
                offset = cute.assume(Int64(row + token) * stride + in_row, divby=VECTOR)
                source = cute.make_tensor(mQ.iterator + offset, cute.make_layout(VECTOR))
                cute.copy(atom, source, sVectors[0, None, column, channel, unit])

    @cute.jit
    def _load_lse(
        self,
        mLse: cute.Tensor,
        sLse: cute.Tensor,
        offset: Int64,
        length: Int32,
        count: Int32,
        unit: Int32,
        column: Int32,
    ):
        """What is added to the exponent in a column."""
        slot, head = self._query(column)
        token = unit * self.shape.unit_tokens + slot
        value = Float32(0.0)
        if slot < self.shape.unit_tokens and token < count:
            value = -LOG2_E * mLse[offset + Int64(head) * length + token]
        sLse[column // 8 * 2 + column % 2, column % 8 // 2, unit] = value

    @cute.jit
    def _score_tiles(
        self,
        tiled_mma: cute.TiledMma,
        pipeline_k: pipeline.PipelineTmaAsync,
        sQ: cute.Tensor,
        sK: cute.Tensor,
        sSums: cute.Tensor,
        sLse: cute.Tensor,
        sVisible: cute.Tensor,
        sBlocks: cute.Tensor,
        mOut: cute.Tensor,
        num_steps: Int32,
        width: Int32,
        scale_log2: Float32,
        wg: Int32,
        tid: Int32,
    ):
        """A step has two units: the parts of a tile, or two tiles where there is one part."""
        shape = self.shape
        side_by_side = const_expr(shape.parts == 2)
        thread_mma = tiled_mma.get_slice(0)
        tSrK = thread_mma.make_fragment_A(thread_mma.partition_A(sK))
        tSrQ = thread_mma.make_fragment_B(thread_mma.partition_B(sQ))
        acc_shape = tiled_mma.partition_shape_C((WGMMA_ROWS, shape.columns))
        acc0 = cute.make_rmem_tensor(acc_shape, Float32)
        acc1 = cute.make_rmem_tensor(acc_shape, Float32)
        # For each part, what the tile before adds to the blocks of this thread.
        rCarry = cute.make_rmem_tensor((self.items, shape.parts), Float32)
        rCarry.fill(0.0)
        unit0 = wg * shape.parts
        unit1 = unit0 + 1 if const_expr(side_by_side) else unit0
        tQ0, tQ1 = tSrQ[None, None, None, unit0], tSrQ[None, None, None, unit1]
        sums0, sums1 = sSums[None, None, 0, wg], sSums[None, None, 1, wg]
        rCarry0 = rCarry[None, 0]
        rCarry1 = rCarry[None, shape.parts - 1]
        # In registers: products read three quarters of what shared memory gives, and these loads
        # would take the rest.
        rLse = cute.make_rmem_tensor((shape.columns // QUAD, shape.parts), Float32)
        for part in cutlass.range_constexpr(shape.parts):
            for i in cutlass.range_constexpr(shape.columns // QUAD):
                rLse[i, part] = sLse[i, tid % QUAD, unit0 + part]
        rLse0, rLse1 = rLse[None, 0], rLse[None, shape.parts - 1]
        weight = functools.partial(
            self._score_unit, sVisible, sBlocks, mOut, width, scale_log2, wg, tid
        )

        read = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, shape.stages)
        free = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, shape.stages)
        tile0, tile1 = Int32(0), Int32(0) if const_expr(side_by_side) else Int32(1)
        tiles_a_step = const_expr(1 if side_by_side else 2)

        pipeline_k.consumer_wait(read)
        gemm(tiled_mma, acc0, tSrK[None, None, None, read.index], tQ0, zero_init=True, wg_wait=-1)
        if const_expr(not side_by_side):
            read.advance()
            pipeline_k.consumer_wait(read)
        gemm(tiled_mma, acc1, tSrK[None, None, None, read.index], tQ1, zero_init=True, wg_wait=-1)
        read.advance()
        warpgroup.wait_group(1)
        if const_expr(not side_by_side):
            pipeline_k.consumer_release(free)
            free.advance()
        weight(acc0, rLse0, sums0, rCarry0, unit0, tile0)
        warpgroup.wait_group(0)
        pipeline_k.consumer_release(free)
        free.advance()
        for _ in cutlass.range(num_steps - 1, unroll=1):
            pipeline_k.consumer_wait(read)
            gemm(
                tiled_mma, acc0, tSrK[None, None, None, read.index], tQ0, zero_init=True, wg_wait=-1
            )
            if const_expr(not side_by_side):
                read.advance()
            weight(acc1, rLse1, sums1, rCarry1, unit1, tile1)
            tile1 += tiles_a_step
            if const_expr(not side_by_side):
                pipeline_k.consumer_wait(read)
            gemm(
                tiled_mma, acc1, tSrK[None, None, None, read.index], tQ1, zero_init=True, wg_wait=-1
            )
            read.advance()
            warpgroup.wait_group(1)
            if const_expr(not side_by_side):
                pipeline_k.consumer_release(free)
                free.advance()
            tile0 += tiles_a_step
            weight(acc0, rLse0, sums0, rCarry0, unit0, tile0)
            warpgroup.wait_group(0)
            pipeline_k.consumer_release(free)
            free.advance()
        weight(acc1, rLse1, sums1, rCarry1, unit1, tile1)

    @cute.jit
    def _score_unit(
        self,
        sVisible: cute.Tensor,
        sBlocks: cute.Tensor,
        mOut: cute.Tensor,
        width: Int32,
        scale_log2: Float32,
        wg: Int32,
        tid: Int32,
        acc: cute.Tensor,
        rLse: cute.Tensor,
        sums: cute.Tensor,
        rCarry: cute.Tensor,
        unit: Int32,
        tile: Int32,
    ):
        """From the products of a unit to the scores of its blocks."""
        shape, rule = self.shape, self.rule
        lane = tid % QUAD
        # The first of this thread's rows; the other is 8 further.
        row = tid // WARP * WARP_ROWS + tid % WARP // QUAD
        totals = self._sum_over_heads(acc, rLse, scale_log2)
        for u in cutlass.range_constexpr(shape.tokens):
            slot = u * QUAD + lane
            visible = sVisible[slot, unit] - tile * rule.rows
            for half in cutlass.range_constexpr(2):
                # Not even the log-sum-exp need be defined for keys that are not visible.
                place = row + 8 * half
                total = totals[u][half]
                sums[slot, place + place // 32] = total if place < visible else Float32(0.0)
        cute.arch.barrier(barrier_id=1 + wg, number_of_threads=WARPGROUP)

        token0 = unit * shape.unit_tokens
        for i in cutlass.range_constexpr(self.items):
            item = i * WARPGROUP + tid
            block, slot = item % self.blocks, item // self.blocks
            # Threads past the last token do its work again.
            slot = cutlass.min(slot, shape.unit_tokens - 1)
            rCarry[i] = self._weight(
                sums, sBlocks, mOut, width, rCarry[i], block, slot, unit, token0, tile
            )

    def _sum_over_heads(self, acc, rLse, scale_log2: Float32) -> list[list[Float32]]:
        """Sums over the group of the probabilities of two compressed tokens, for each token.

        Sums of even and odd heads, of all tokens in turn, so that none waits for its last addend.
        """
        tokens = self.shape.tokens
        parts = [[[None, None] for _ in range(2)] for _ in range(tokens)]
        for head in range(self.group):
            for u in range(tokens):
                column = u * self.group + head
                for half in range(2):
                    value = acc[column % 2 + 2 * half + 4 * (column // 2)]
                    probability = cute.math.exp2(value * scale_log2 + rLse[column], fastmath=True)
                    before = parts[u][half][head % 2]
                    total = probability if before is None else before + probability
                    parts[u][half][head % 2] = total
        return [[even if odd is None else even + odd for even, odd in halves] for halves in parts]

    @cute.jit
    def _weight(
        self,
        sums: cute.Tensor,
        sBlocks: cute.Tensor,
        mOut: cute.Tensor,
        width: Int32,
        carry: Float32,
        block: Int32,
        slot: Int32,
        unit: Int32,
        token0: Int32,
        tile: Int32,
    ) -> Float32:
        """Write the score of a block of the tile, and return what the tile adds to it in the next.

        All blocks add in the same order, so that equal sums give equal scores.
        """
        rule = self.rule
        first = block * rule.per_select - rule.carried
        score = carry
        for o in cutlass.range_constexpr(len(self.weights)):
            place = first + o
            if const_expr(o < rule.carried):
                inside = place >= 0
                place = cutlass.max(place, 0)
                value = sums[slot, place + place // 32]
                value = value if inside else Float32(0.0)
            else:
                value = sums[slot, place + place // 32]
            score += self.weights[o] * value
        index = tile * self.blocks + block
        if index < sBlocks[slot, unit]:
            mOut[Int64(token0 + slot) * width + index] = score
        carry = Float32(0.0)
        for o in cutlass.range_constexpr(rule.carried):
            place = rule.rows + first + o
            inside = place < rule.rows
            place = cutlass.min(place, rule.rows - 1)
            value = sums[slot, place + place // 32]
            carry += self.weights[o] * (value if inside else Float32(0.0))
        return carry


@kept
def compile_importance_scores(
    dtype: torch.dtype, head_dim: int, group: int, rule: Rule
) -> Callable:
    """The compiled kernel of a dtype, head size, group and rule."""
    dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        ImportanceScores(dtype, head_dim, group, rule),
        fake_flat(dtype),
        _Tensors(
            fake_flat(dtype),
            fake_flat(Float32, alignment=4),
            *(fake_flat(Int32, alignment=4) for _ in range(2)),
            fake_flat(Float32, alignment=4),
        ),
        _Sizes(*(Int32(1) for _ in range(9))),
        *(Int32(1), Int64(1), Float32(1.0)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    paper = Rule.of(NSAConfig.paper())
    for dtype in (torch.bfloat16, torch.float16):
        for dim, group in ((64, 3), (96, 4), (128, 1), (128, 16), (192, 16), (256, 32)):
            name = f"importance-{str(dtype).removeprefix('torch.')}-{dim}-{group}"
            yield name, functools.partial(compile_importance_scores, dtype, dim, group, paper)


def importance_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    tiles: TokenTiles,
    chunk: int,
    scores: Tensor,
    scale: float,
    rule: Rule,
) -> None:
    """See :func:`nsa.fused.kernel_calls.importance_scores`."""
    batch, length, num_heads, head_dim = q.shape
    compressed, kv_heads = k_cmp.shape[1:3]
    group = num_heads // kv_heads
    if not 1 <= group <= MAX_GROUP:
        raise ValueError(f"{group} query heads share a KV head; they must be 1 to {MAX_GROUP}")
    if head_dim % 32 or not 32 <= head_dim <= 256:
        raise ValueError(f"D is {head_dim}; it must be a multiple of 32 up to 256")
    if rule.per_select > WGMMA_ROWS or rule.carried > rule.rows:
        raise ValueError(
            f"a selection block has {rule.per_select} strides and overlaps {rule.carried} "
            f"compressed tokens before it; they must be at most {WGMMA_ROWS} and {rule.rows}"
        )
    start = chunk * tiles.chunk
    stop = min(start + tiles.chunk, length)
    width = scores.shape[-1]
    check_tensor("k_cmp", k_cmp, (batch, compressed, kv_heads, head_dim), q.dtype, q.device)
    check_tensor("lse", lse, (batch, num_heads, length), torch.float32, q.device)
    wanted = (batch, kv_heads, stop - start, width)
    check_tensor("scores", scores, wanted, torch.float32, q.device)
    if scores.numel() == 0:
        return
    if compressed == 0:
        scores.zero_()
        return
    queries, q_stride = flat_rows(q)
    tensors = (flat(k_cmp), lse.contiguous().view(-1), tiles.fields.view(-1), tiles.first)
    sizes = (batch, length, kv_heads, tiles.fields.shape[0], tiles.grid, chunk, start, stop, width)
    compile_importance_scores(q.dtype, head_dim, group, rule)(
        queries,
        _Tensors(*tensors, scores.view(-1)),
        _Sizes(*sizes),
        *(compressed, q_stride, scale * LOG2_E),
    )
