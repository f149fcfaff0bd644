"""Selected branch of token mode, forward: attention over the band. A part of ``selected_forward``.

This file has no launcher: :func:`nsa.fused.kernels.selected_forward.selected_forward` launches the
kernel in place of its second one, the combination of partial results.

The paper's configuration has each token select the first block of its sequence, its own block and
the one before. The tokens of a block have these three in common; they are its *band*. The tokens of
a segment that are in one block are a *run*. A CTA keeps K and V of all three in shared memory,
while the query rows of some of a run's tokens stream
past, 64 at a time and warpgroup: row r is query head ``r % G`` of token ``r // G``. The band then
needs neither an index nor partial results. A token sees those of the three blocks that its list
names, whatever the configuration.

The kernel adds the partial results of the tokens' other blocks to a tile's output while that is in
registers. It stores partial results in a ring in the rest of shared memory, which cp.async fills
while scores and outputs are computed. Memory sets the pace. Where the caller gives the outputs of
the other branches, it also adds these, with gates (:mod:`nsa.fused.kernels.row_gates`).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum

from nsa.fused.hardware import QUAD, SHARED_BYTES, WARP, WARPGROUP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.forward_tiles import (
    load_values,
    make_mmas,
    softmax,
    store_row,
    store_values,
    weigh,
)
from nsa.fused.kernels.hopper import (
    cvt_f16,
    gemm_zero_init,
    make_smem_layout,
    mlir_namedtuple,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    reshape_acc_to_mn,
    transpose_view,
)
from nsa.fused.kernels.partial_rows import PartialRows
from nsa.fused.kernels.row_gates import RowGates, SumTensors, fake_sum_tensors
from nsa.fused.kernels.rows import TILE_ROWS, load_rows, pair_and_head
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    fake_flat,
)

# In this order: the first block, the one before the tokens' own, their own.
_PARTS = 3
# A shuffle takes the size of its segments and the last lane of a segment.
_WITHIN_QUAD = (WARP - QUAD) << 8 | (WARP - 1)
# Partial results of a row that are under way. A second warpgroup must leave room for so many; more
# than the maximum are of no use.
_ENOUGH_STAGES = 3
_MAX_STAGES = 8
# With more tiles, some CTAs end long after the others.
_CTA_TILES = 8
# A thread keeps four numbers for four of them.
_MAX_SLOTS = 32


def is_packed(dtype: type[cutlass.Numeric]) -> bool:
    """Whether partial results beside a band are packed, see :class:`PartialRows`."""
    return dtype is BFloat16


def choose_ring(
    dtype: type[cutlass.Numeric],
    head_dim: int,
    head_dim_v: int,
    block_size: int,
    slots: int,
    others: int = 0,
) -> tuple[int, int]:
    """How many warpgroups, and how many stages of the ring, fit beside three blocks.

    There are ``others`` more elements.
    """
    row_bytes = 16 * QUAD * PartialRows(dtype, head_dim_v, is_packed(dtype)).vectors
    for warpgroups in (2, 1):
        rows = warpgroups * TILE_ROWS
        elements = rows * head_dim + _PARTS * block_size * (head_dim + head_dim_v) + others
        left = SHARED_BYTES - 2 * elements - 4 * _PARTS * block_size
        stages = left // (rows * row_bytes)
        if stages >= _ENOUGH_STAGES:
            break
    return warpgroups, min(stages, QUAD * _lane_slots(slots), _MAX_STAGES)


def _lane_slots(slots: int) -> int:
    """How many of a row's slots a thread of the quad keeps the positions and weights of."""
    return -(-slots // QUAD)


def band_fits(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    slots: int,
    form: str | None = None,
) -> bool:
    """Whether shared memory has room for a ring: not with blocks of 64 tokens and 256 channels.

    ``form`` is that of the gates, if the kernel adds up the branches.
    """
    others = 0 if form is None else RowGates(form, head_dim, group).shared_elements
    shape = (head_dim, head_dim_v, block_size, slots, others)
    return slots <= _MAX_SLOTS and choose_ring(CUTE_DTYPES[dtype], *shape)[1] >= 2


@mlir_namedtuple
class Strides(NamedTuple):
    """Elements from token to token."""

    q: Int64
    k: Int64
    v: Int64


@mlir_namedtuple
class BandResults(NamedTuple):
    """Partial results, where each token's pairs stand among them, and the results of the tokens.

    Without ``out`` only the sum of the branches is wanted.
    """

    partial: cute.Tensor
    partial_lse: cute.Tensor
    position: cute.Tensor
    out: cute.Tensor | None
    lse: cute.Tensor


@mlir_namedtuple
class WaveSizes(NamedTuple):
    """A wave of the inverted index: its places in the list start at ``wave_start``."""

    wave_start: Int32
    first_unit: Int32
    units: Int32 | None
    chunk_tokens: Int32
    num_tokens: Int32
    kv_heads: Int32


@mlir_namedtuple
class BandTensors(NamedTuple):
    """The inputs, the block indices, and what the band needs of the token blocks."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    indices: cute.Tensor
    base: cute.Tensor
    first: cute.Tensor
    keys: cute.Tensor
    row: cute.Tensor
    run_base: cute.Tensor
    run_first: cute.Tensor


class BandForward:
    """Outputs and log-sum-exp of the tokens of a wave, 0 and -inf for a token with no block.

    With a ``form`` of gates, also the gated sum with the outputs of the other branches.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        head_dim_v: int,
        group: int,
        block_size: int,
        causal: bool,
        slots: int,
        form: str | None,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.block_size = block_size
        self.causal = causal
        self.slots = slots
        self.lane_slots = _lane_slots(slots)
        self.rows = PartialRows(dtype, head_dim_v, is_packed(dtype))
        self.gates = None if form is None else RowGates(form, head_dim, group)
        others = 0 if self.gates is None else self.gates.shared_elements
        self.warpgroups, self.stages = choose_ring(
            dtype, head_dim, head_dim_v, block_size, slots, others
        )
        self.keys = _PARTS * block_size
        # How many CTAs share a block's tokens.
        self.shares = max(1, block_size * group // (_CTA_TILES * TILE_ROWS))
        self.share_tokens = -(-block_size // self.shares)
        # Values pass through registers, which hold 192 rows of 128 channels at once.
        self.value_passes = _PARTS if head_dim_v > 128 else 1

    @cute.jit
    def __call__(
        self,
        tensors: BandTensors,
        strides: Strides,
        scale_log2: Float32,
        num_blocks: Int32,
        num_runs: Int32,
        chunk_runs: Int32,
        branches: SumTensors | None,
        results: BandResults,
        sizes: WaveSizes,
        stream,
    ):
        q_smem, k_smem, v_smem = (
            make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, shape, stage=stage)
            for shape, stage in (
                ((TILE_ROWS, self.head_dim), self.warpgroups),
                ((self.keys, self.head_dim), None),
                ((self.keys, self.head_dim_v), None),
            )
        )
        mma_qk, mma_pv = make_mmas(self.dtype, self.keys, self.head_dim_v)
        mmas, layouts = (mma_qk, mma_pv), (q_smem, k_smem, v_smem)
        # The grid has the units.
        kernel_sizes = sizes._replace(units=None)
        counts = (num_blocks, num_runs)
        self.kernel(
            *(tensors, branches, results, strides),
            *(scale_log2, counts, kernel_sizes, mmas, layouts),
        ).launch(
            grid=[chunk_runs * self.shares, sizes.units, 1],
            block=[self.warpgroups * WARPGROUP, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: BandTensors,
        branches: SumTensors | None,
        results: BandResults,
        strides: Strides,
        scale_log2: Float32,
        counts: tuple[Int32, Int32],
        sizes: WaveSizes,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        (mma_qk, mma_pv), (q_smem, k_smem, v_smem) = mmas, layouts
        num_blocks, num_runs = counts
        mBase, mFirst, mRow = tensors.base, tensors.first, tensors.row
        mRunFirst, kv_heads = tensors.run_first, sizes.kv_heads
        cta_tidx, _, _ = cute.arch.thread_idx()
        warpgroup_idx = cute.arch.make_warp_uniform(cta_tidx // WARPGROUP)
        tidx = cta_tidx % WARPGROUP
        share, unit, _ = cute.arch.block_idx()
        unit += sizes.first_unit
        kv_head = unit % kv_heads
        start = unit // kv_heads * sizes.chunk_tokens
        end = cutlass.min(start + sizes.chunk_tokens, sizes.num_tokens)
        # Runs are numbered as tokens are: from the one of the chunk's first token on. A graph's
        # sequences, which nothing checks, may end before it; it then has none.
        start_base = cutlass.min(mBase[start], num_blocks - 1)
        own = (start - mRow[start_base]) // self.block_size
        run = tensors.run_base[start] + own + share // self.shares
        begin, run_end = end, end
        if run < num_runs:
            begin = cutlass.max(mRunFirst[run], start)
        if run + 1 < num_runs:
            run_end = cutlass.min(mRunFirst[run + 1], end)
        base, block, first, keys, first_row = (Int32(0) for _ in range(5))
        if begin < end:
            base = cutlass.min(mBase[begin], num_blocks - 1)
            own = (begin - mRow[base]) // self.block_size
            block = cutlass.min(base + own, num_blocks - 1)
            first, keys, first_row = mFirst[block], tensors.keys[block], mRow[block]
        share_first = first_row + share % self.shares * self.share_tokens
        begin = cutlass.max(share_first, begin)
        run_end = cutlass.min(
            cutlass.min(first_row + keys, share_first + self.share_tokens), run_end
        )
        count = run_end - begin
        if keys > 0 and count > 0:
            skipped = begin - first_row

            smem = cutlass.memory.SmemAllocator()
            sQ, sK, sV = (
                smem.allocate_tensor(self.dtype, x.outer, 1024, swizzle=x.inner)
                for x in (q_smem, k_smem, v_smem)
            )
            ring_shape = (self.stages, 2, self.rows.vectors, self.warpgroups * WARPGROUP, 4)
            ring_layout = cute.make_ordered_layout(ring_shape, order=(4, 3, 2, 1, 0))
            sRing = smem.allocate_tensor(Int32, ring_layout, 128)
            # A thread reads what it loaded itself.
            sRing = sRing[None, None, None, cta_tidx, None]
            # How many keys of each part a token sees.
            limits_layout = cute.make_layout((_PARTS, self.block_size))
            sLimits = smem.allocate_tensor(Int32, limits_layout, 16)
            sWeight = None
            if const_expr(self.gates is not None and self.gates.shared_elements > 0):
                pitch = self.gates.pitch
                weight_layout = cute.make_layout((self.group, pitch), stride=(pitch, 1))
                sWeight = smem.allocate_tensor(self.dtype, weight_layout, 16)
                self.gates.load_weight(
                    *(branches.weight, sWeight, kv_head, cta_tidx),
                    self.warpgroups * WARPGROUP,
                )

            tScS = reshape_acc_to_mn(
                mma_qk.get_slice(tidx).partition_C(
                    cute.make_identity_tensor((TILE_ROWS, self.keys))
                )
            )
            # A thread has two rows, this one and the 8th after it.
            tile_row = tScS[0, 0][0]
            load_positions = functools.partial(
                *(self._load_positions, results.position, sizes.wave_start, begin, count),
                *(kv_heads, kv_head, tile_row, tidx),
            )
            load_partial = functools.partial(
                self._load_partial, results.partial, sRing, tile_row, tidx
            )
            positions = load_positions(warpgroup_idx)
            key_place = functools.partial(self._key_place, mFirst[base], first, own, keys)
            place = functools.partial(key_place, kv_head * self.head_dim, 0)
            if warpgroup_idx == 0:
                load_rows(tensors.k, sK, strides.k, place, tidx, WARPGROUP)
            load_queries = functools.partial(
                *(self._load_queries, tensors.q, sQ, strides.q),
                *(begin, kv_head, count, tidx, warpgroup_idx),
            )
            load_queries(warpgroup_idx)
            for slot in cutlass.range_constexpr(self.stages):
                lane, i = const_expr(slot // self.lane_slots), const_expr(slot % self.lane_slots)
                load_partial(warpgroup_idx, Int32(slot), positions, i, Int32(lane))
                cute.arch.cp_async_commit_group()
            if cta_tidx < self.block_size:
                # Others of the block may be none of the CTA's, or no tokens.
                token = cutlass.min(cutlass.max(tidx, skipped), skipped + count - 1)
                row = Int64(first_row + token) * kv_heads + kv_head
                limits = self._limits(tensors.indices, row * self.slots, own, token, keys)
                for part in cutlass.range_constexpr(_PARTS):
                    sLimits[part, tidx] = limits[part]
            pass_rows = const_expr(self.keys // self.value_passes)
            if warpgroup_idx == self.warpgroups - 1:
                for i in cutlass.range_constexpr(self.value_passes):
                    sV_pass = cute.local_tile(sV, (pass_rows, self.head_dim_v), (i, 0))
                    v_place = functools.partial(key_place, kv_head * self.head_dim_v, i * pass_rows)
                    values = load_values(tensors.v, sV_pass, strides.v, v_place, tidx)
                    store_values(values, sV_pass, tidx)

            _, tSrQ, tSrK = partition_fragment_ABC(
                mma_qk.get_slice(0), (TILE_ROWS, self.keys, self.head_dim), sQ, sK
            )
            _, tOrP, tOrVt = partition_fragment_ABC(
                mma_pv.get_slice(0),
                (TILE_ROWS, self.head_dim_v, self.keys),
                None,
                transpose_view(sV),
            )
            tiles = cute.ceil_div(count * self.group, TILE_ROWS)
            place_of = functools.partial(self._place, begin, count)
            heads, first_head = kv_heads * self.group, kv_head * self.group
            stage = Int32(0)
            cute.arch.cp_async_wait_group(self.stages - 1)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier()
            for tile in cutlass.range(warpgroup_idx, tiles, self.warpgroups, unroll=1):
                # The queries came with a slot that is not one of the last ``stages - 1``.
                cute.arch.cp_async_wait_group(self.stages - 1)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier(barrier_id=warpgroup_idx + 1, number_of_threads=WARPGROUP)
                acc_S = gemm_zero_init(
                    mma_qk, (TILE_ROWS, self.keys), tSrQ, tSrK, A_idx=warpgroup_idx, wg_wait=-1
                )
                weights = self._load_partial_lse(results.partial_lse, positions, tile, tile_row)
                next_positions = load_positions(tile + self.warpgroups)
                limits = cute.make_rmem_tensor((_PARTS, 2), Int32)
                for r in cutlass.range_constexpr(2):
                    pair, _ = pair_and_head(tile, tile_row + 8 * r, 0, self.group)
                    token = skipped + cutlass.min(pair, count - 1)
                    for part in cutlass.range_constexpr(_PARTS):
                        limits[part, r] = sLimits[part, token]
                gates = cute.make_rmem_tensor((2, 3), Float32)
                if const_expr(self.gates is not None):
                    for r in cutlass.range_constexpr(2):
                        i = tile_row + 8 * r
                        token, head, _ = place_of(tile, i)
                        row_gates = self.gates.load(
                            *(branches, sQ[None, None, warpgroup_idx], sWeight, i),
                            *(head, Int64(token) * heads + first_head + head, tidx % QUAD),
                        )
                        for j in cutlass.range_constexpr(3):
                            gates[r, j] = row_gates[j]
                warpgroup.wait_group(0)
                # All warps have read the queries.
                cute.arch.barrier(barrier_id=warpgroup_idx + 1, number_of_threads=WARPGROUP)
                if tile + self.warpgroups < tiles:
                    load_queries(tile + self.warpgroups)
                acc_S_mn = reshape_acc_to_mn(acc_S)
                self._mask(acc_S_mn, tScS, limits)
                inverse_sum, lse = (cute.make_rmem_tensor(2, Float32) for _ in range(2))
                for r in cutlass.range_constexpr(2):
                    inverse_sum[r], lse[r] = softmax(acc_S_mn[r, None], scale_log2, empty=True)
                cvt_f16(reshape_acc_to_frgA(acc_S), tOrP)
                acc_O = gemm_zero_init(
                    mma_pv, (TILE_ROWS, self.head_dim_v), tOrP, tOrVt, wg_wait=-1
                )
                for r in cutlass.range_constexpr(2):
                    band_share, lse[r] = self._share(weights[r, None], lse[r])
                    inverse_sum[r] *= band_share
                warpgroup.wait_group(0)
                acc_O_mn = reshape_acc_to_mn(acc_O)
                for r in cutlass.range_constexpr(2):
                    acc_O_mn[r, None].store(acc_O_mn[r, None].load() * inverse_sum[r])
                sums = cute.make_tensor(acc_O.iterator, cute.size(acc_O))
                bias, one = self.rows.new_bias(kv_heads)

                for lane in cutlass.range(QUAD, unroll=1):
                    for i in cutlass.range_constexpr(self.lane_slots):
                        cute.arch.cp_async_wait_group(self.stages - 1)
                        for r in cutlass.range_constexpr(2):
                            weight = of_quad(weights[r, i], lane)
                            self.rows.add(sums, bias, one, r, sRing[stage, r, None, None], weight)
                        # The slot that is ``stages`` further on, perhaps of the next tile.
                        further = const_expr(i + self.stages)
                        from_lane = lane + further // self.lane_slots
                        ahead = from_lane >= QUAD
                        column = const_expr(further % self.lane_slots)
                        chosen = cute.make_rmem_tensor((2, self.lane_slots), Int32)
                        for r in cutlass.range_constexpr(2):
                            here, there = positions[r, column], next_positions[r, column]
                            chosen[r, column] = there if ahead else here
                        load_partial(
                            *(tile + self.warpgroups if ahead else tile, stage, chosen, column),
                            from_lane % QUAD,
                        )
                        cute.arch.cp_async_commit_group()
                        stage = stage + 1 if stage + 1 < self.stages else Int32(0)
                positions.store(next_positions.load())
                self.rows.subtract(sums, bias)

                column = tidx % QUAD * VECTOR
                others = []
                if const_expr(self.gates is not None):
                    for r in cutlass.range_constexpr(2):
                        token, head, _ = place_of(tile, tile_row + 8 * r)
                        offset = (Int64(token) * heads + first_head + head) * self.head_dim_v
                        others.append(
                            self.gates.load_branches(branches, offset + column, self.rows.groups)
                        )
                rO = cvt_f16(acc_O, self.dtype)
                for r in cutlass.range_constexpr(2):
                    token, head, present = place_of(tile, tile_row + 8 * r)
                    if present:
                        out_row = Int64(token) * heads + first_head + head
                        if const_expr(results.out is not None):
                            store_row(rO, r, results.out, out_row * self.head_dim_v)
                        if const_expr(self.gates is not None):
                            in_token = (first_head + head) * self.head_dim_v + column
                            offset = Int64(token) * branches.out_stride + in_token
                            self.gates.store(
                                *(sums, r, gates[r, None], others[r], branches.out, offset)
                            )
                        if tidx % QUAD == 0:
                            results.lse[out_row] = lse[r] * math.log(2.0)
            cute.arch.cp_async_wait_group(0)

    def _place(
        self, begin: Int32, count: Int32, tile: Int32, i: Int32
    ) -> tuple[Int32, Int32, Boolean]:
        """The token and the head, of those of the KV head, of row ``i`` of a tile.

        And whether the token is one of the CTA's; else it is the last one.
        """
        pair, head = pair_and_head(tile, i, 0, self.group)
        return begin + cutlass.min(pair, count - 1), head, pair < count

    @cute.jit
    def _key_place(
        self,
        sequence_first: Int32,
        first: Int32,
        own: Int32,
        count: Int32,
        column: Int32,
        rows_before: int,
        i: Int32,
        more: int,
    ) -> tuple[Int32, Int32]:
        """The token and the first column of a row of the parts.

        Where there is no key, the place is another key's: masked values must still be finite.
        """
        part_row = rows_before + i + more
        part, row = part_row // self.block_size, part_row % self.block_size
        start = first
        if part == 0:
            start = sequence_first
        if part == 1 and own > 0:
            start = first - self.block_size
        return cutlass.min(start + row, first + count - 1), column

    @cute.jit
    def _load_queries(
        self,
        mQ: cute.Tensor,
        sQ: cute.Tensor,
        stride: Int64,
        first: Int32,
        kv_head: Int32,
        count: Int32,
        tidx: Int32,
        warpgroup_idx: Int32,
        tile: Int32,
    ):
        """Rows past the tokens repeat heads of the last one; they are not stored."""

        def place(i: Int32, more: int) -> tuple[Int32, Int32]:
            pair, head = pair_and_head(tile, i, more, self.group)
            column = (kv_head * self.group + head) * self.head_dim
            return first + cutlass.min(pair, count - 1), column

        load_rows(mQ, sQ, stride, place, tidx, WARPGROUP, warpgroup_idx)

    @cute.jit
    def _limits(
        self,
        mIndices: cute.Tensor,
        start: Int64,
        own: Int32,
        token: Int32,
        count: Int32,
    ) -> tuple[Int32, Int32, Int32]:
        """How many keys of each part a token of the block sees; no block counts twice.

        The token's list is at ``start``.
        """
        sees_first, sees_before, sees_own = Int32(0), Int32(0), Int32(0)
        for i in cutlass.range(self.slots, unroll=4):
            listed = mIndices[start + i]
            sees_first = self.block_size if listed == 0 and own > 1 else sees_first
            sees_before = self.block_size if listed >= 0 and listed == own - 1 else sees_before
            sees_own = count if listed == own else sees_own
        if const_expr(self.causal):
            sees_own = cutlass.min(sees_own, token + 1)
        return sees_first, sees_before, sees_own

    @cute.jit
    def _mask(self, acc_S_mn: cute.Tensor, tScS: cute.Tensor, limits: cute.Tensor):
        """-inf for keys that a row does not see."""
        columns = const_expr(cute.size(acc_S_mn, mode=[1]) // _PARTS)
        for part in cutlass.range_constexpr(_PARTS):
            if cutlass.min(limits[part, 0], limits[part, 1]) < self.block_size:
                for r in cutlass.range_constexpr(2):
                    end = limits[part, r] + part * self.block_size
                    for c in cutlass.range_constexpr(part * columns, (part + 1) * columns):
                        visible = tScS[r, c][1] < end
                        acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

    @cute.jit
    def _load_positions(
        self,
        mPosition: cute.Tensor,
        wave_start: Int32,
        begin: Int32,
        count: Int32,
        kv_heads: Int32,
        kv_head: Int32,
        tile_row: Int32,
        tidx: Int32,
        tile: Int32,
    ) -> cute.Tensor:
        """Places in the workspace of this thread's slots of its two rows; -1 for no pair."""
        positions = cute.make_rmem_tensor((2, self.lane_slots), Int32)
        for r in cutlass.range_constexpr(2):
            pair, _ = pair_and_head(tile, tile_row + 8 * r, 0, self.group)
            row = Int64(begin + cutlass.min(pair, count - 1)) * kv_heads + kv_head
            for i in cutlass.range_constexpr(self.lane_slots):
                slot = tidx % QUAD * self.lane_slots + i
                position = mPosition[row * self.slots + cutlass.min(slot, self.slots - 1)]
                real = pair < count and slot < self.slots and position >= 0
                positions[r, i] = position - wave_start if real else Int32(-1)
        return positions

    @cute.jit
    def _load_partial_lse(
        self, mPartialLse: cute.Tensor, positions: cute.Tensor, tile: Int32, tile_row: Int32
    ) -> cute.Tensor:
        """log2 of the sums at ``positions``, -inf for no pair."""
        lse = cute.make_rmem_tensor((2, self.lane_slots), Float32)
        for r in cutlass.range_constexpr(2):
            _, head = pair_and_head(tile, tile_row + 8 * r, 0, self.group)
            for i in cutlass.range_constexpr(self.lane_slots):
                # Without a pair, the first one of the workspace is loaded: a condition would hold
                # up the next load.
                source = cutlass.max(positions[r, i], 0)
                value = mPartialLse[Int64(source) * self.group + head]
                lse[r, i] = value if positions[r, i] >= 0 else -Float32.inf
        return lse

    @cute.jit
    def _load_partial(
        self,
        mPartial: cute.Tensor,
        sRing: cute.Tensor,
        tile_row: Int32,
        tidx: Int32,
        tile: Int32,
        stage: Int32,
        positions: cute.Tensor,
        i: cutlass.Constexpr[int],
        lane: Int32,
    ):
        """Start to copy this thread's part of slot ``i`` of ``lane`` of its quad, 0 for no pair."""
        for r in cutlass.range_constexpr(2):
            _, head = pair_and_head(tile, tile_row + 8 * r, 0, self.group)
            position = of_quad(positions[r, i], lane)
            place = self.rows.place(cutlass.max(position, 0) * self.group + head, tidx % QUAD)
            self.rows.load(mPartial, place, sRing[stage, r, None, None], position >= 0)

    @cute.jit
    def _share(self, weights: cute.Tensor, band_lse: Float32) -> tuple[Float32, Float32]:
        """Turn a row's log-sum-exps into shares of the sum; return the band's, and log2(sum)."""
        reference, total, band = weigh(weights, QUAD, band_lse)
        inverse = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)
        for i in cutlass.range_constexpr(self.lane_slots):
            weights[i] *= inverse
        # log2 of 0 is -inf.
        return band * inverse, reference + cute.math.log2(total, fastmath=True)


@cute.jit
def of_quad(value: Int32 | Float32, lane: Int32) -> Int32 | Float32:
    """The ``value`` of thread ``lane`` of the quad."""
    return cute.arch.shuffle_sync(value, lane, mask_and_clamp=_WITHIN_QUAD)


@kept
def compile_band(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
    slots: int,
    form: str | None = None,
    keep: bool = True,
) -> Callable:
    """The compiled kernel; ``form`` is as in :class:`BandForward`, and without ``keep`` only the
    sum is written."""
    element, shape = CUTE_DTYPES[dtype], (head_dim, head_dim_v, group, block_size, causal, slots)
    results, sizes = fake_results(element)
    return compile_kernel(
        BandForward(element, *shape, form),
        BandTensors(
            *(fake_flat(element) for _ in range(3)),
            *(fake_flat(Int32, alignment=4) for _ in range(7)),
        ),
        Strides(*(Int64(1) for _ in range(3))),
        *(Float32(1.0), Int32(1), Int32(1), Int32(1)),
        None if form is None else fake_sum_tensors(element, form),
        *(results if keep else results._replace(out=None), sizes),
    )


def fake_results(dtype: type[cutlass.Numeric]) -> tuple[BandResults, WaveSizes]:
    """Stand-ins, to compile with."""
    results = BandResults(
        *(fake_flat(Int32), fake_flat(Float32, alignment=4), fake_flat(Int32)),
        *(fake_flat(dtype), fake_flat(Float32, alignment=4)),
    )
    return results, WaveSizes(*(Int32(1) for _ in range(6)))


# Head dimensions of queries and values, and query heads of a KV head, that are compiled as a test.
_SHAPES = (
    *((64, 64, 1), (96, 96, 3), (128, 128, 16)),
    *((256, 128, 16), (64, 128, 3), (128, 256, 6)),
)

# The gates, and whether the selected branch's output is kept, by the query heads of a KV head.
_SUMS = {1: ("mean", True), 3: ("gates", False), 16: ("weight", False)}


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        for dim, dim_v, group in _SHAPES:
            size, slots = (32, 3) if group == 3 else (64, _MAX_SLOTS if group == 6 else 16)
            for causal in (True, False) if group == 16 else (True,):
                arguments = (dtype, dim, dim_v, group, size, causal, slots)
                form = f"{dim}-{dim_v}-{group}-{size}-{slots}{'' if causal else '-all'}"
                name = f"band-forward-{str(dtype).removeprefix('torch.')}-{form}"
                yield name, functools.partial(compile_band, *arguments)
                if causal and dim == dim_v:
                    gates, keep = _SUMS[group]
                    ending = functools.partial(compile_band, *arguments, gates, keep)
                    yield f"{name}-{gates}-{keep}", ending
