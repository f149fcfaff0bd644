"""Selected branch of token mode, backward: each block's keys meet the queries that selected it.

A CTA takes one work item of the inverted index. A block's K and V stay in shared memory, dK and dV
in registers, while query rows and output gradients of the item's pairs stream past, 64 at a time
(row r is query head ``r % G`` of pair ``r // G``, as in the forward). Scores are computed
transposed, keys by rows, so that P and dS are in registers what dV and dK multiply; dS goes through
shared memory for dQ alone. Each pair's dQ goes to a workspace, and a second kernel adds up those of
a token, see :mod:`nsa.fused.kernels.query_partials`.

The next tile is loaded while S and dP are computed, and dQ is scaled and stored while dK is.

dK and dV are added in float32 to buffers in global memory, 16 bytes at a time. So the order of the
sums, and the last bits of the result, vary from run to run, unless items of a block take turns.

One warpgroup computes a tile of 64 keys. Where dK and dV do not fit its registers there are two:
both compute P and dS, and each half the columns of dK, dV and dQ. Blocks of 128 keys have two as
well, with 64 keys each: dQ, of which each has half the columns, is then of all keys of a block.
Only where that and wide rows meet, two CTAs share a block.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from torch import Tensor

from nsa.fused.fixed_order import order_pairs
from nsa.fused.hardware import LOG2_E, QUAD, SHARED_BYTES, WARP, WARP_ROWS, WARPGROUP
from nsa.fused.kernel_inputs import OtherGradients, Pair, RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.float_sums import add_row, round_sums
from nsa.fused.kernels.hopper import (
    arrive_inc,
    cvt_f16,
    gemm,
    gemm_zero_init,
    get_smem_store_C,
    load_s2r,
    make_smem_layout,
    mlir_namedtuple,
    mma_partition_C_vec,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    reshape_acc_to_mn,
    transpose_view,
    wait_eq,
)
from nsa.fused.kernels.inverted_index import ITEM_FIELDS, invert_index, item_tokens
from nsa.fused.kernels.query_partials import (
    AddSizes,
    PartialFormat,
    Partials,
    compile_add,
)
from nsa.fused.kernels.query_sums import check_others, other_arguments
from nsa.fused.kernels.query_tiles import QueryRows, QueryTiles, SharedRows
from nsa.fused.kernels.rows import (
    TILE_KEYS,
    TILE_ROWS,
    block_rows,
    load_rows,
    load_tokens,
    pair_and_head,
)
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat, flat_rows
from nsa.fused.token_inputs import TokenBlocks
from nsa.fused.waves import (
    choose_chunk_tokens,
    has_wide_rows,
    key_tiles,
    partial_gradient_bytes,
    units_of_gradient_wave,
)


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs, the inverted index, partial dQ, float32 sums that are added to, whose turn it is."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    dout: cute.Tensor
    lse_log2: cute.Tensor
    delta: cute.Tensor
    tokens: cute.Tensor
    items: cute.Tensor
    num_items: cute.Tensor
    partials: Partials
    dk: cute.Tensor
    dv: cute.Tensor
    turns: cute.Tensor | None


@mlir_namedtuple
class _Strides(NamedTuple):
    """Elements from token to token."""

    q: Int32
    k: Int32
    v: Int32
    dout: Int32


@mlir_namedtuple
class _Sizes(NamedTuple):
    """``unit_items`` and ``unit_pairs`` are the places of a unit among the items and in the list,
    ``wave_pairs`` those of the partial dQ of a tile of keys; see the inverted index for the rest.
    """

    kv_heads: Int32
    first_unit: Int32
    unit_items: Int32
    unit_pairs: Int32
    chunk_tokens: Int32
    wave_pairs: Int32
    num_tokens: Int32


class SelectedBackward:
    """Writes each pair's dQ, adds to dK and dV; scores are not scaled in dQ and dK.

    With ``ordered``, the items of a block add in their order. A CTA then waits for those before it,
    which were launched before it. No launch may have two units of one KV head.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        head_dim_v: int,
        group: int,
        block_size: int,
        causal: bool,
        ordered: bool,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.ordered = ordered
        self.group = group
        self.block_size = block_size
        self.causal = causal
        # dK and dV take (D + Dv) / 2 registers of a warpgroup's threads.
        self.column_parts = 2 if has_wide_rows(head_dim, head_dim_v) else 1
        # With more than 128 registers for them, S and dP are not computed at once, nor dQ and dK.
        self.overlap = (head_dim + head_dim_v) // self.column_parts <= 256
        self.key_parts = 2 if block_size > TILE_KEYS and self.column_parts == 1 else 1
        self.keys = self.key_parts * TILE_KEYS
        self.key_tiles = key_tiles(head_dim, head_dim_v, block_size)
        self.warpgroups = self.column_parts * self.key_parts
        self.threads = WARPGROUP * self.warpgroups
        columns = head_dim // self.warpgroups
        # Of a product, and of a part of a partial dQ, which is scaled at once.
        self.dq_columns = 64 if columns % 64 == 0 else columns
        self.dq_parts = columns // self.dq_columns
        part_columns = columns if self.overlap else self.dq_columns
        self.format = PartialFormat(dtype, head_dim, part_columns)
        dims, parts = (head_dim, head_dim_v), self.column_parts
        widths = (head_dim // parts, head_dim_v // parts)
        self.query_tiles = QueryTiles(dtype, group, dims, widths, self.threads)
        row_bytes = 2 * (head_dim + head_dim_v)
        fixed = self.keys * row_bytes + TILE_ROWS * self.keys * 2 + item_tokens(group) * 4 + 4096
        stage = TILE_ROWS * row_bytes
        self.ctas = 2 if self.warpgroups == 1 else 1
        self.stages = 2 if fixed + 2 * stage <= SHARED_BYTES // self.ctas else 1

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: _Strides,
        sizes: _Sizes,
        units: Int32,
        scale_log2: Float32,
        stream,
    ):
        # Row-major; a warpgroup's columns are whole swizzle atoms.
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        q_smem, do_smem = self.query_tiles.layouts(TILE_ROWS, self.stages)
        k_smem = make_layout((self.keys, self.head_dim), major_mode_size=self.dq_columns)
        v_smem = make_layout(
            (self.keys, self.head_dim_v), major_mode_size=self.head_dim_v // self.column_parts
        )
        ds_smem = make_layout((TILE_ROWS, self.keys))
        make_mma = functools.partial(
            hopper_helpers.make_trivial_tiled_mma,
            self.dtype,
            self.dtype,
            OperandMajorMode.K,
            acc_dtype=Float32,
            atom_layout_mnk=(1, 1, 1),
        )
        mma_s = make_mma(b_leading_mode=OperandMajorMode.K, tiler_mn=(TILE_KEYS, TILE_ROWS))
        mma_dk, mma_dv = (
            make_mma(
                b_leading_mode=OperandMajorMode.MN,
                tiler_mn=(TILE_KEYS, width // self.column_parts),
                a_source=warpgroup.OperandSource.RMEM,
            )
            for width in (self.head_dim, self.head_dim_v)
        )
        mma_dq = make_mma(b_leading_mode=OperandMajorMode.MN, tiler_mn=(TILE_ROWS, self.dq_columns))
        mmas = (mma_s, mma_dk, mma_dv, mma_dq)
        layouts = (q_smem, do_smem, k_smem, v_smem, ds_smem)
        copies = self.query_tiles.copies(
            self._query_rows(tensors, strides), sizes.kv_heads, sizes.num_tokens
        )
        self.kernel(tensors, strides, sizes, scale_log2, mmas, layouts, copies).launch(
            grid=[sizes.unit_items, units, self.key_tiles],
            block=[self.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas,
            preferred_smem_carveout=100,
        )

    def _query_rows(self, tensors: _Tensors, strides: _Strides) -> QueryRows:
        rows = (tensors.q, tensors.dout, tensors.lse_log2, tensors.delta)
        return QueryRows(*rows, strides.q, strides.dout)

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        strides: _Strides,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
        copies: tuple | None,
    ):
        mma_s, mma_dk, mma_dv, mma_dq = mmas
        q_smem, do_smem, k_smem, v_smem, ds_smem = layouts
        tidx, _, _ = cute.arch.thread_idx()
        bidx, unit, part = cute.arch.block_idx()
        unit += sizes.first_unit
        num_items = tensors.num_items[unit]
        if bidx < num_items:
            item = bidx
            if const_expr(not self.ordered):
                # Items of the first block and of the last ones are long, and should not end last.
                item += num_items // 2
                item -= num_items if item >= num_items else 0
            field = (Int64(unit) * sizes.unit_items + item) * ITEM_FIELDS
            begin, count = tensors.items[field], tensors.items[field + 1]
            first = tensors.items[field + 2] + part * self.keys
            # A part of a block may have no keys, and then partial dQ of 0.
            keys = cutlass.min(tensors.items[field + 3] - part * self.keys, self.keys)
            first_row = tensors.items[field + 4] + part * self.keys
            before = tensors.items[field + 5]
            kv_head = unit % sizes.kv_heads
            chunk_start = unit // sizes.kv_heads * sizes.chunk_tokens
            warp_in_cta = cute.arch.make_warp_uniform(tidx // WARP)
            warp = warp_in_cta % 4
            wg = const_expr(0) if const_expr(self.warpgroups == 1) else warp_in_cta // 4
            lane = tidx % WARP
            # The warpgroup's part of the columns of dK and dV, and its first key.
            column_part, own = wg, Int32(0)
            if const_expr(self.key_parts > 1):
                column_part, own = Int32(0), wg * TILE_KEYS

            smem = cutlass.memory.SmemAllocator()
            sK, sV, sQ, sdO, sdS = (
                smem.allocate_tensor(self.dtype, x.outer, 1024, swizzle=x.inner)
                for x in (k_smem, v_smem, q_smem, do_smem, ds_smem)
            )
            tokens = const_expr(item_tokens(self.group) + TILE_ROWS)
            sTokens = smem.allocate_tensor(Int32, cute.make_layout(tokens), 16)
            # The rows of a stage have their log-sum-exp first, then delta.
            statistics_layout = cute.make_layout((TILE_ROWS, 2, self.stages))
            sStatistics = smem.allocate_tensor(Float32, statistics_layout, 128)
            # The rows of a stage are there.
            filled = smem.allocate_array(Int64, self.stages)
            self.query_tiles.init_barriers(filled, self.stages, tidx)
            for mX, sX, stride, width in (
                (tensors.k, sK, strides.k, self.head_dim),
                (tensors.v, sV, strides.v, self.head_dim_v),
            ):
                place = block_rows(first, keys, kv_head * width)
                load_rows(mX, sX, stride, place, tidx, self.threads)
            load_tokens(tensors.tokens, sTokens, begin, count, tidx, self.threads)
            cute.arch.barrier()
            load_tile = functools.partial(
                *(self.query_tiles.load, self._query_rows(tensors, strides)),
                *(SharedRows(sQ, sdO, sStatistics, sTokens, filled), copies),
                *(sizes.kv_heads, kv_head, tidx),
            )
            load_tile(Int32(0), Int32(0))
            if const_expr(self.query_tiles.bulk):
                # For the block.
                self.query_tiles.wait_for_own_copies()

            thr_s, thr_dk, thr_dv, thr_dq = (
                mma.get_slice(0) for mma in (mma_s, mma_dk, mma_dv, mma_dq)
            )
            columns = const_expr(self.head_dim // self.column_parts)
            columns_v = const_expr(self.head_dim_v // self.column_parts)
            partition = partition_fragment_ABC
            sK_own, sV_own = self._keys_of(sK, wg), self._keys_of(sV, wg)
            _, tSrK, tSrQ = partition(thr_s, (TILE_KEYS, TILE_ROWS, self.head_dim), sK_own, sQ)
            _, tPrV, tPrdO = partition(thr_s, (TILE_KEYS, TILE_ROWS, self.head_dim_v), sV_own, sdO)
            sQt = self._columns_of(transpose_view(sQ), columns, column_part)
            sdOt = self._columns_of(transpose_view(sdO), columns_v, column_part)
            acc_dK, _, tdKrQt = partition(thr_dk, (TILE_KEYS, columns, TILE_ROWS), None, sQt)
            acc_dV, _, tdVrdOt = partition(thr_dv, (TILE_KEYS, columns_v, TILE_ROWS), None, sdOt)
            sKt = transpose_view(sK)
            tdQrKt = []
            for i in cutlass.range_constexpr(self.dq_parts):
                slice_of_K = cute.local_tile(
                    sKt, (self.dq_columns, self.keys), (wg * self.dq_parts + i, 0)
                )
                _, tdQrdS, fragment = partition(
                    thr_dq, (TILE_ROWS, self.dq_columns, self.keys), sdS, slice_of_K
                )
                tdQrKt.append(fragment)
            acc_dK.fill(0.0)
            acc_dV.fill(0.0)

            thr_mma = mma_s.get_slice(tidx % WARPGROUP)
            sdS_own = sdS
            if const_expr(self.key_parts > 1):
                sdS_own = cute.local_tile(sdS, (TILE_ROWS, TILE_KEYS), (0, wg))
            store_ds, _, _ = get_smem_store_C(
                mma_s,
                transpose_view(sdS_own),
                tidx % WARPGROUP,
                transpose=True,
                position_independent=True,
            )
            tScS = reshape_acc_to_mn(
                thr_mma.partition_C(cute.make_identity_tensor((TILE_KEYS, TILE_ROWS)))
            )
            tLse, tDelta = (
                mma_partition_C_vec(
                    sStatistics[None, i, None], thr_mma, expand_shape=TILE_KEYS, is_colvec=False
                )
                for i in range(2)
            )

            rows = count * self.group
            first_pair = begin - sizes.first_unit * sizes.unit_pairs + part * sizes.wave_pairs
            thread_row = warp * WARP_ROWS + lane // QUAD
            place = self.format.place(first_pair * self.group + thread_row, lane)
            hidden = keys < self.keys
            if const_expr(self.causal):
                # Tokens of the item do not come before its chunk.
                hidden = keys < self.keys or first_row + (self.keys - 1) > chunk_start
            tiles = cute.ceil_div(rows, TILE_ROWS)
            for tile in cutlass.range(tiles, unroll=1):
                stage = tile % self.stages
                if const_expr(self.stages == 1):  # noqa: SIM102 (one is decided at compile time)
                    if tile > 0:
                        cute.arch.barrier()
                        load_tile(tile, Int32(0))
                # Without TMA, also orders what was done in the other stage before it is loaded.
                self.query_tiles.wait(filled, tile, self.stages)

                lse = load_s2r(tLse[None, stage])
                scores = functools.partial(
                    gemm_zero_init, mma_s, (TILE_KEYS, TILE_ROWS), B_idx=stage
                )
                acc_S = scores(tSrK, tSrQ, wg_wait=-1)
                if const_expr(self.overlap):
                    acc_dP = scores(tPrV, tPrdO, wg_wait=-1)
                # Meanwhile, the next rows are loaded. All warps are done with the tile before.
                if const_expr(self.query_tiles.bulk):
                    cute.arch.barrier()
                if const_expr(self.stages == 2):  # noqa: SIM102
                    if tile + 1 < tiles:
                        load_tile(tile + 1, 1 - stage)
                warpgroup.wait_group(1 if self.overlap else 0)
                if hidden or (tile + 1) * TILE_ROWS > rows:
                    self._mask(acc_S, tScS, sTokens, tile, first_row + own, keys - own, count)
                acc_S_mn = reshape_acc_to_mn(acc_S)
                for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                    for r in cutlass.range_constexpr(2):
                        acc_S_mn[r, c] = cute.math.exp2(
                            acc_S_mn[r, c] * scale_log2 - lse[c], fastmath=True
                        )
                delta = load_s2r(tDelta[None, stage])
                rP = cvt_f16(reshape_acc_to_frgA(acc_S), self.dtype)
                tdVrdOt_stage = tdVrdOt[None, None, None, stage]
                if const_expr(self.overlap):
                    gemm(mma_dv, acc_dV, rP, tdVrdOt_stage, wg_wait=1)
                else:
                    gemm(mma_dv, acc_dV, rP, tdVrdOt_stage, wg_wait=0)
                    acc_dP = scores(tPrV, tPrdO, wg_wait=0)

                acc_dP_mn = reshape_acc_to_mn(acc_dP)
                for c in cutlass.range_constexpr(cute.size(acc_dP_mn, mode=[1])):
                    for r in cutlass.range_constexpr(2):
                        acc_dP_mn[r, c] = acc_S_mn[r, c] * (acc_dP_mn[r, c] - delta[c])
                rdS = cvt_f16(reshape_acc_to_frgA(acc_dP), self.dtype)
                if const_expr(self.column_parts == 1):
                    store_ds(rdS)
                else:
                    if wg == 0:
                        store_ds(rdS)
                cute.arch.fence_view_async_shared()
                cute.arch.barrier()

                tdKrQt_stage = tdKrQt[None, None, None, stage]
                multiply_dq = functools.partial(
                    gemm_zero_init, mma_dq, (TILE_ROWS, self.dq_columns), tdQrdS, wg_wait=-1
                )
                acc_dQ = []
                if const_expr(self.overlap):
                    acc_dQ = [multiply_dq(fragment) for fragment in tdQrKt]
                gemm(mma_dk, acc_dK, rdS, tdKrQt_stage, wg_wait=-1)
                store_dq = functools.partial(
                    self._store_dq, tensors.partials, place, rows - thread_row, wg, tile
                )
                if const_expr(self.overlap):
                    # While dK is computed.
                    store_dq(acc_dQ, 0)
                else:
                    for i in cutlass.range_constexpr(self.dq_parts):
                        warpgroup.wait_group(0)
                        store_dq([multiply_dq(tdQrKt[i])], i)
                warpgroup.wait_group(0)

            if const_expr(self.ordered):
                first_item = Int64(unit) * sizes.unit_items + (item - before)
                turn = tensors.turns.iterator + (first_item * self.key_tiles + part)
                wait_eq(turn, tidx, 0, before)
                cute.arch.barrier()
            for acc, mX, width in ((acc_dK, tensors.dk, columns), (acc_dV, tensors.dv, columns_v)):
                for r in cutlass.range_constexpr(2):
                    key = own + warp * WARP_ROWS + lane // QUAD + 8 * r
                    if key < keys:
                        row = Int64(first + key) * sizes.kv_heads + kv_head
                        offset = (row * self.column_parts + column_part) * width
                        add_row(acc, r, mX, offset, lane)
            if const_expr(self.ordered):
                # Releases what all threads added.
                cute.arch.barrier()
                arrive_inc(turn, tidx, 0, 1)

    @cute.jit
    def _store_dq(
        self,
        partials: Partials,
        place: tuple,
        rows: Int32,
        wg: Int32 | int,
        tile: Int32,
        accs: list[cute.Tensor],
        i: cutlass.Constexpr[int],
    ):
        """Round and store part ``i`` of a warpgroup's columns of a tile's partial dQ."""

        def wait(j: int):
            # With overlap, the product for dK is under way as well.
            warpgroup.wait_group(len(accs) - 1 - j + self.overlap)

        part = wg * (self.format.parts // self.warpgroups) + i
        self.format.store(accs, wait, partials, place, tile, rows - tile * TILE_ROWS, part)

    @cute.jit
    def _columns_of(
        self, x: cute.Tensor, width: cutlass.Constexpr[int], part: Int32
    ) -> cute.Tensor:
        """A warpgroup's rows of ``x``, of shape (width * column_parts, 64, stages)."""
        if const_expr(self.column_parts == 1):
            return x
        return cute.local_tile(x, (width, TILE_ROWS, self.stages), (part, 0, 0))

    @cute.jit
    def _keys_of(self, x: cute.Tensor, wg: Int32) -> cute.Tensor:
        """The rows of ``x (keys, channels)`` whose scores the warpgroup computes."""
        if const_expr(self.key_parts == 1):
            return x
        return cute.local_tile(x, (TILE_KEYS, cute.size(x, mode=[1])), (wg, 0))

    @cute.jit
    def _mask(
        self,
        acc_S: cute.Tensor,
        tScS: cute.Tensor,
        sTokens: cute.Tensor,
        tile: Int32,
        first_row: Int32,
        keys: Int32,
        count: Int32,
    ):
        """-inf for keys past the block or after the token, and for rows past the item's pairs."""
        acc_S_mn = reshape_acc_to_mn(acc_S)
        for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
            pair, _ = pair_and_head(tile, tScS[0, c][1], 0, self.group)
            limit = keys
            if const_expr(self.causal):
                limit = cutlass.min(keys, sTokens[pair] - first_row + 1)
            limit = limit if pair < count else 0
            for r in cutlass.range_constexpr(2):
                visible = tScS[r, c][0] < limit
                acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf


@kept
def compile_backward(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
    ordered: bool,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    kernel = SelectedBackward(cute_dtype, head_dim, head_dim_v, group, block_size, causal, ordered)
    return compile_kernel(
        kernel,
        _Tensors(
            *(fake_flat(cute_dtype) for _ in range(4)),
            *(fake_flat(Float32) for _ in range(2)),
            *(fake_flat(Int32, alignment=4) for _ in range(3)),
            kernel.format.fakes(),
            *(fake_flat(Float32) for _ in range(2)),
            fake_flat(Int32 if ordered else None, alignment=4),
        ),
        _Strides(*(Int32(1) for _ in range(4))),
        _Sizes(*(Int32(1) for _ in range(7))),
        *(Int32(1), Float32(1.0)),
    )


# Head dimension, query heads of a KV head and block size that are compiled as a test.
_SHAPES = (
    *((64, 1, 64), (96, 3, 32), (128, 16, 64), (256, 6, 64)),
    *((64, 4, 128), (96, 3, 128), (128, 16, 128), (256, 6, 128)),
    *((64, 8, 64), (256, 32, 64)),
)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, group, size in _SHAPES:
            for causal in (True, False) if dim == 128 else (True,):
                ordered = dim == 256 or not causal
                arguments = (dtype, dim, dim, group, size, causal, ordered)
                form = f"{name}-{dim}-{group}-{size}{'' if causal else '-all'}"
                form += "-ordered" if ordered else ""
                yield f"selected-backward-{form}", functools.partial(compile_backward, *arguments)


def selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    deterministic: bool = False,
    sums: Pair | None = None,
    others: OtherGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nsa.fused.kernel_calls.selected_backward`."""
    total, heads, head_dim = q.shape
    kv_heads, head_dim_v = v.shape[1:]
    group, slots = heads // kv_heads, block_indices.shape[2]
    # The q and dout of a chunk take 32 MiB of L2. Half as many would make twice as many items,
    # each of which loads keys and adds to their gradients.
    chunk = choose_chunk_tokens(total, group, len(blocks.first), slots, head_dim + head_dim_v)
    # Each unit has a list of items of its own.
    index = invert_index(block_indices, blocks, block_size, causal, chunk, 1, item_tokens(group))
    tiles = key_tiles(head_dim, head_dim_v, block_size)
    unit_bytes = chunk * partial_gradient_bytes(slots, group, head_dim, tiles)
    wave_units = min(index.units, units_of_gradient_wave(unit_bytes, q.nbytes))
    turns = None
    if deterministic:
        wave_units = min(wave_units, kv_heads)
        tokens, position = order_pairs(block_indices, blocks, chunk)
        index = replace(index, tokens=tokens, position=position)
        items = index.num_items.numel() * index.items.shape[1]
        turns = torch.zeros(items * tiles, dtype=torch.int32, device=q.device)
    dq, form = None, None
    if others is not None:
        form = "plain" if others.weight is None else "weight"
        check_others(others, q)
        dq = None if others.out is None else others.out.view(q.shape)
    if dq is None:
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shapes = (k.shape, v.shape)
    sizes = [math.prod(shape) for shape in shapes]
    totals = sums or torch.zeros(sum(sizes), dtype=torch.float32, device=q.device).split(sizes)
    totals = [x.view(-1) for x in totals]
    rows = [flat_rows(x) for x in (q, k, v, dout)]
    (q, q_stride), (k, k_stride), (v, v_stride), (dout, do_stride) = rows
    lse_log2, delta = (flat(x) for x in statistics)
    key = (head_dim, head_dim_v, group, block_size, causal, deterministic)
    backward = compile_backward(q.dtype, *key)
    partial_format = SelectedBackward(CUTE_DTYPES[q.dtype], *key).format
    part = partial_format.columns
    add = compile_add(q.dtype, head_dim, part, group, slots, tiles, form)
    added, length, row_blocks = other_arguments(others, total, head_dim)
    flat_dq, dq_stride = flat_rows(dq)
    unit_pairs = chunk * slots
    wave_pairs = wave_units * unit_pairs
    partials = partial_format.new(wave_pairs * tiles * group, q.device)
    listed = (index.tokens, index.items.view(-1), index.num_items)
    tensors = _Tensors(q, k, v, dout, lse_log2, delta, *listed, partials, *totals, turns)
    strides = _Strides(q_stride, k_stride, v_stride, do_stride)
    for first in range(0, index.units, wave_units):
        units = min(wave_units, index.units - first)
        unit_sizes = _Sizes(
            *(kv_heads, first, index.items.shape[1], unit_pairs, chunk, wave_pairs, total)
        )
        backward(tensors, strides, unit_sizes, units, scale * LOG2_E)
        add_sizes = AddSizes(
            *(first * unit_pairs, wave_pairs, first, units, chunk, total, kv_heads),
            *(dq_stride, length, row_blocks),
        )
        add(partials, index.position.view(-1), flat_dq, added, add_sizes, scale)
    if sums:
        return dq, *sums
    grads = [torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes]
    round_sums(totals, grads, (scale, 1.0))
    return dq, *grads
