"""Selected branch of token mode, forward: each block's keys meet the queries that selected it.

A CTA is one warpgroup and takes one work item of the inverted index: a block's K and V stay in
shared memory while query rows of the item's pairs stream past, 64 at a time. Row r of an item is
query head ``r % G`` of pair ``r // G``, so any group size fills the tiles. Each pair gives a
partial output (normalised, rounded to the dtype of q) and the log-sum-exp of its scores, stored in
the order of the list; a second kernel adds up the pairs of each token. Where most tokens select
the blocks that they have in common with their neighbours, the second kernel is that of
:mod:`nsa.fused.kernels.selected_band`, which computes these blocks itself.

Rows are gathered by TMA, or by cp.async where they are no whole swizzle atoms
(:mod:`nsa.fused.kernels.pair_copies`), two tiles ahead, one where shared memory has room for one
stage alone.
The scores of the next tile are computed while this one's output is stored. At head dimension 128
three CTAs share an SM, two with blocks of 128 keys, and hide each other's latencies; there is no
warp specialisation. Most of the time goes to the partial results, which are written to memory and
read again. With blocks of 128 keys there are half as many for the same work.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from cutlass.tensor_utils import LayoutEnum
from torch import Tensor

from nsa.fused.hardware import LOG2_E, QUAD, SHARED_BYTES, WARPGROUP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.forward_tiles import (
    GROUP_COLUMNS,
    load_values,
    make_mmas,
    row_words,
    softmax,
    store_values,
    weigh,
)
from nsa.fused.kernels.gated_sum import gating_form, gating_forward
from nsa.fused.kernels.hopper import (
    cvt_f16,
    gemm_w_idx,
    gemm_zero_init,
    make_smem_layout,
    mlir_namedtuple,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    reshape_acc_to_mn,
    transpose_view,
)
from nsa.fused.kernels.inverted_index import (
    ITEM_FIELDS,
    invert_index,
    item_tokens,
    load_slots,
)
from nsa.fused.kernels.pair_copies import PairCopies
from nsa.fused.kernels.partial_rows import PartialRows
from nsa.fused.kernels.row_gates import SumTensors
from nsa.fused.kernels.rows import (
    TILE_ROWS,
    block_rows,
    load_rows,
    load_tokens,
    pair_and_head,
    pair_rows,
)
from nsa.fused.kernels.selected_band import (
    BandResults,
    BandTensors,
    Strides,
    WaveSizes,
    band_fits,
    compile_band,
    fake_results,
    is_packed,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_output,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    store_vector,
)
from nsa.fused.token_inputs import TokenBlocks
from nsa.fused.waves import (
    choose_chunk_tokens,
    partial_words,
    units_of_wave,
)

_COMBINE_THREADS = 128
# Places of 16 bytes that a thread of the combination loads together.
_VECTORS = 48


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs, the inverted index, and the workspace of partial results."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    tokens: cute.Tensor
    items: cute.Tensor
    num_items: cute.Tensor
    partial: cute.Tensor
    partial_lse: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the inverted index; a wave's places in the list start at ``wave_start``."""

    wave: Int32
    wave_items: Int32
    wave_start: Int32
    unit_pairs: Int32
    kv_heads: Int32
    num_tokens: Int32


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
        packed: bool,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.group = group
        self.block_size = block_size
        self.causal = causal
        self.rows = PartialRows(dtype, head_dim_v, packed)
        # Registers allow 3 CTAs; with wide values, whose output takes up to 128 registers, 2.
        most = 3 if head_dim_v <= 128 else 2
        # With room for two CTAs at least, queries have two stages.
        for self.stages in (2, 1):
            elements = self.stages * TILE_ROWS * head_dim + block_size * (head_dim + head_dim_v)
            self.ctas = min(most, SHARED_BYTES // (2 * elements + 4 * item_tokens(group) + 3072))
            if self.ctas > 1:
                break
        # None where cp.async copies queries.
        self.copies = None
        if self.stages == 2 and PairCopies.fit(group, head_dim):
            self.copies = PairCopies(dtype, group, head_dim, WARPGROUP)

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: Strides,
        sizes: _Sizes,
        scale_log2: Float32,
        stream,
    ):
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        copy = None
        if const_expr(self.copies is None):
            q_smem = make_layout((TILE_ROWS, self.head_dim), stage=self.stages)
        else:
            q_smem = self.copies.layout(TILE_ROWS, self.stages)
            copy = self.copies.make(tensors.q, strides.q, sizes.kv_heads, sizes.num_tokens)
        k_smem, v_smem = (
            make_layout((self.block_size, dim)) for dim in (self.head_dim, self.head_dim_v)
        )
        mma_qk, mma_pv = make_mmas(self.dtype, self.block_size, self.head_dim_v)
        mmas, layouts = (mma_qk, mma_pv), (q_smem, k_smem, v_smem)
        self.kernel(tensors, strides, sizes, scale_log2, mmas, layouts, copy).launch(
            grid=[sizes.wave_items, 1, 1],
            block=[WARPGROUP, 1, 1],
            stream=stream,
            min_blocks_per_mp=self.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        strides: Strides,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
        copy: tuple | None,
    ):
        (mma_qk, mma_pv), (q_smem, k_smem, v_smem) = mmas, layouts
        mItems = tensors.items
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        if bidx < tensors.num_items[sizes.wave]:
            field = (Int64(sizes.wave) * sizes.wave_items + bidx) * ITEM_FIELDS
            begin, count = mItems[field], mItems[field + 1]
            first, keys, first_row = mItems[field + 2], mItems[field + 3], mItems[field + 4]
            kv_head = begin // sizes.unit_pairs % sizes.kv_heads

            smem = cutlass.memory.SmemAllocator()
            sQ, sK, sV = (
                smem.allocate_tensor(self.dtype, x.outer, 1024, swizzle=x.inner)
                for x in (q_smem, k_smem, v_smem)
            )
            rows = count * self.group
            tokens = const_expr(item_tokens(self.group) + TILE_ROWS)
            sTokens = smem.allocate_tensor(Int32, cute.make_layout(tokens), 16)
            # With TMA, the queries of a stage are there.
            filled = smem.allocate_array(Int64, self.stages)
            if const_expr(self.copies is not None):
                self.copies.init_barriers(filled, self.stages, tidx)
            values = load_values(
                tensors.v, sV, strides.v, block_rows(first, keys, kv_head * self.head_dim_v), tidx
            )
            load_rows(
                *(tensors.k, sK, strides.k, block_rows(first, keys, kv_head * self.head_dim)),
                *(tidx, WARPGROUP),
            )
            load_tokens(tensors.tokens, sTokens, begin, count, tidx, WARPGROUP)
            cute.arch.barrier()
            load_queries = functools.partial(
                self._load_queries, tensors.q, copy, sQ, sTokens, filled, strides.q, kv_head, tidx
            )
            tiles = cute.ceil_div(rows, TILE_ROWS)
            for tile in cutlass.range_constexpr(self.stages):
                if tile == 0 or tile < tiles:
                    load_queries(Int32(tile))
                cute.arch.cp_async_commit_group()
            store_values(values, sV, tidx)

            _, tSrQ, tSrK = partition_fragment_ABC(
                mma_qk.get_slice(0), (TILE_ROWS, self.block_size, self.head_dim), sQ, sK
            )
            _, tOrP, tOrVt = partition_fragment_ABC(
                mma_pv.get_slice(0),
                (TILE_ROWS, self.head_dim_v, self.block_size),
                None,
                transpose_view(sV),
            )
            tScS = reshape_acc_to_mn(
                mma_qk.get_slice(tidx).partition_C(
                    cute.make_identity_tensor((TILE_ROWS, self.block_size))
                )
            )
            first_tile_row = (begin - sizes.wave_start) * self.group + tScS[0, 0][0]
            place = self.rows.place(first_tile_row, tidx % QUAD)

            acc_S = cute.make_rmem_tensor(
                mma_qk.partition_shape_C((TILE_ROWS, self.block_size)), Float32
            )
            acc_S_mn = reshape_acc_to_mn(acc_S)
            compute_scores = functools.partial(self._scores, mma_qk, acc_S, tSrQ, tSrK)
            # With TMA the keys are in the first group, beside the first queries.
            cute.arch.cp_async_wait_group(self.stages - 1)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier()
            if const_expr(self.copies is not None):
                cute.arch.mbarrier_wait(filled, 0)
            compute_scores(Int32(0))

            for tile in cutlass.range(tiles, unroll=1):
                # A thread has two rows, this one and the 8th after it.
                row = tile * TILE_ROWS + tScS[0, 0][0]
                tile_row = first_tile_row + tile * TILE_ROWS
                limits = cute.make_rmem_tensor(2, Int32)
                for r in cutlass.range_constexpr(2):
                    limits[r] = keys
                    if const_expr(self.causal):
                        pair, _ = pair_and_head(tile, tScS[0, 0][0] + 8 * r, 0, self.group)
                        limits[r] = cutlass.min(keys, sTokens[pair] - first_row + 1)
                warpgroup.wait_group(0)
                if const_expr(self.stages == 1):
                    # All warps have read the queries.
                    cute.arch.barrier()
                    if tile + 1 < tiles:
                        load_queries(tile + 1)
                    cute.arch.cp_async_commit_group()
                if cutlass.min(limits[0], limits[1]) < self.block_size:
                    for r in cutlass.range_constexpr(2):
                        for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                            visible = tScS[r, c][1] < limits[r]
                            acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

                lse = cute.make_rmem_tensor(2, Float32)
                for r in cutlass.range_constexpr(2):
                    inverse_sum, lse[r] = softmax(acc_S_mn[r, None], scale_log2)
                    acc_S_mn[r, None].store(acc_S_mn[r, None].load() * inverse_sum)
                cvt_f16(reshape_acc_to_frgA(acc_S), tOrP)
                for r in cutlass.range_constexpr(2):
                    if tidx % QUAD == 0 and row + 8 * r < rows:
                        tensors.partial_lse[tile_row + 8 * r] = lse[r]
                # All warps have read these queries, and the next ones are there.
                if const_expr(self.copies is None):
                    cute.arch.cp_async_wait_group(0)
                    cute.arch.fence_view_async_shared()
                cute.arch.barrier()
                acc_O = gemm_zero_init(
                    mma_pv, (TILE_ROWS, self.head_dim_v), tOrP, tOrVt, wg_wait=-1
                )
                if const_expr(self.copies is not None):  # noqa: SIM102 (one at compile time)
                    if tile + 1 < tiles:
                        stage, times = (tile + 1) % self.stages, (tile + 1) // self.stages
                        cute.arch.mbarrier_wait(filled + stage, times % 2)
                # The next tile's scores are computed while this one's output is stored. Past the
                # last tile they are not used.
                compute_scores(tile + 1)
                if const_expr(self.stages == 2):
                    if tile + 2 < tiles:
                        load_queries(tile + 2)
                    cute.arch.cp_async_commit_group()
                warpgroup.wait_group(1)
                for r in cutlass.range_constexpr(2):
                    if row + 8 * r < rows:
                        more = tile * TILE_ROWS + 8 * r
                        words = self.rows.of_accumulator(acc_O, r)
                        self.rows.store(words, tensors.partial, place, more)
            warpgroup.wait_group(0)
            cute.arch.cp_async_wait_group(0)

    def _scores(self, mma_qk, acc_S, tSrQ, tSrK, tile: Int32):
        """Start to compute the scores of the tile's stage."""
        stage = tile % self.stages
        gemm_w_idx(mma_qk, acc_S, tSrQ, tSrK, True, A_idx=stage, wg_wait=-1)

    @cute.jit
    def _load_queries(
        self,
        mQ: cute.Tensor,
        copy: tuple | None,
        sQ: cute.Tensor,
        sTokens: cute.Tensor,
        filled: cute.Pointer,
        stride: Int64,
        kv_head: Int32,
        tidx: Int32,
        tile: Int32,
    ):
        if const_expr(self.copies is None):
            place = pair_rows(sTokens, tile, kv_head, self.group, self.head_dim)
            load_rows(mQ, sQ, stride, place, tidx, WARPGROUP, tile % self.stages)
        else:
            first = tile * self.copies.pairs

            def token_of(i: Int32) -> Int32:
                return sTokens[first + i]

            stage = tile % self.stages
            self.copies.load(copy, sQ, filled + stage, token_of, kv_head, tidx, stage)


class CombinePartials:
    """Outputs of the tokens of a wave: partial results weighted by their share of the sum.

    A CTA takes a tile of consecutive rows (query heads of tokens), four threads a row. All that a
    thread loads but the positions is under way together, so that few threads keep the memory busy.
    """

    def __init__(self, dtype: type[cutlass.Numeric], head_dim_v: int, group: int, slots: int):
        self.head_dim_v = head_dim_v
        self.group = group
        self.slots = slots
        self.rows = PartialRows(dtype, head_dim_v, packed=False)
        self.loads = min(_VECTORS // self.rows.vectors, slots)

    @cute.jit
    def __call__(
        self,
        results: BandResults,
        sizes: WaveSizes,
        stream,
    ):
        self.kernel(results, sizes).launch(
            grid=[self._tiles_of_unit(sizes.chunk_tokens) * sizes.units, 1, 1],
            block=[_COMBINE_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        results: BandResults,
        sizes: WaveSizes,
    ):
        chunk_tokens, num_tokens = sizes.chunk_tokens, sizes.num_tokens
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        tiles = self._tiles_of_unit(chunk_tokens)
        unit = sizes.first_unit + bidx // tiles
        thread = bidx % tiles * _COMBINE_THREADS + tidx
        row, lane = thread // QUAD, thread % QUAD
        local, head = row // self.group, row % self.group
        kv_head = unit % sizes.kv_heads
        token = unit // sizes.kv_heads * chunk_tokens + local
        # All threads of a warp take the same branches, also those with nothing to do.
        wanted = local < chunk_tokens and token < num_tokens
        if unit < sizes.first_unit + sizes.units:
            token_row = Int64(cutlass.min(token, num_tokens - 1)) * sizes.kv_heads + kv_head
            position = load_slots(results.position, token_row, self.slots)
            for i in cutlass.range_constexpr(self.slots):
                present = wanted and position[i] >= 0
                position[i] = position[i] - sizes.wave_start if present else Int32(-1)
            out_row = token_row * self.group + head
            # Partial results pass through shared memory, and warps synchronise. Otherwise the
            # compiler delays loads until their results are needed, to save registers.
            shape = (self.loads, self.rows.vectors, _COMBINE_THREADS, 4)
            layout = cute.make_ordered_layout(shape, order=(3, 2, 1, 0))
            smem = cutlass.memory.SmemAllocator()
            sPartial = smem.allocate_tensor(Int32, layout, 128)[None, None, tidx, None]
            load_partials = functools.partial(
                self._load_partials, results.partial, sPartial, position, head, lane
            )
            load_partials(0)
            cute.arch.sync_warp()
            weight = cute.make_rmem_tensor(self.slots, Float32)
            for i in cutlass.range_constexpr(self.slots):
                # Without a pair, the first one of the workspace is loaded: a condition would hold
                # up the next load.
                source = cutlass.max(position[i], 0)
                weight[i] = results.partial_lse[Int64(source) * self.group + head]
            cute.arch.sync_warp()
            for i in cutlass.range_constexpr(self.slots):
                weight[i] = weight[i] if position[i] >= 0 else -Float32.inf
            reference, total, _ = weigh(weight)
            inverse = Float32(0.0) if total == 0.0 else cute.arch.rcp_approx(total)

            # As the two rows of a thread in an accumulator, of which it has one.
            sums = cute.make_rmem_tensor(2 * VECTOR * self.rows.groups, Float32)
            sums.fill(0.0)
            bias, one = self.rows.new_bias(num_tokens)
            for start in cutlass.range_constexpr(0, self.slots, self.loads):
                if const_expr(start > 0):
                    load_partials(start)
                cute.arch.cp_async_wait_group(0)
                for i in cutlass.range_constexpr(start, min(start + self.loads, self.slots)):
                    sWords = sPartial[i - start, None, None]
                    self.rows.add(sums, bias, one, 0, sWords, weight[i] * inverse)
            self.rows.subtract(sums, bias)
            if wanted:
                for group in cutlass.range_constexpr(self.rows.groups):
                    vector = cute.make_rmem_tensor(VECTOR, Float32)
                    for j, word in enumerate(row_words(0, group)):
                        for e in cutlass.range_constexpr(2):
                            vector[2 * j + e] = sums[2 * word + e]
                    column = lane * VECTOR + group * GROUP_COLUMNS
                    store_vector(vector.load(), results.out, out_row * self.head_dim_v + column)
                if lane == 0:
                    # log2 of 0 is -inf.
                    log2_sum = reference + cute.math.log2(total, fastmath=True)
                    results.lse[out_row] = log2_sum * math.log(2.0)

    def _tiles_of_unit(self, chunk_tokens: Int32) -> Int32:
        return cute.ceil_div(chunk_tokens * (self.group * QUAD), _COMBINE_THREADS)

    @cute.jit
    def _load_partials(
        self,
        mPartial: cute.Tensor,
        sPartial: cute.Tensor,
        position: cute.Tensor,
        head: Int32,
        lane: Int32,
        start: cutlass.Constexpr[int],
    ):
        """Start to load the slots from ``start`` on, 0 for no pair; a thread reads its own."""
        for i in cutlass.range_constexpr(start, min(start + self.loads, self.slots)):
            place = self.rows.place(cutlass.max(position[i], 0) * self.group + head, lane)
            self.rows.load(mPartial, place, sPartial[i - start, None, None], position[i] >= 0)
        cute.arch.cp_async_commit_group()


@kept
def compile_forward(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    block_size: int,
    causal: bool,
    packed: bool,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    return compile_kernel(
        SelectedForward(cute_dtype, head_dim, head_dim_v, group, block_size, causal, packed),
        _Tensors(
            *(fake_flat(cute_dtype) for _ in range(3)),
            *(fake_flat(Int32, alignment=4) for _ in range(3)),
            *(fake_flat(Int32), fake_flat(Float32, alignment=4)),
        ),
        Strides(*(Int64(1) for _ in range(3))),
        _Sizes(*(Int32(1) for _ in range(6))),
        Float32(1.0),
    )


@kept
def compile_combine(dtype: torch.dtype, head_dim_v: int, group: int, slots: int) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]
    combine = CombinePartials(cute_dtype, head_dim_v, group, slots)
    return compile_kernel(combine, *fake_results(cute_dtype))


# Head dimensions of queries and values, and query heads of a KV head, that are compiled as a test.
_SHAPES = (
    *((64, 64, 1), (96, 96, 3), (128, 128, 16)),
    *((256, 256, 6), (256, 128, 16), (64, 128, 3)),
)
# And of blocks of 128 keys.
_LONG_SHAPES = ((64, 64, 4), (96, 96, 3), (128, 128, 16), (256, 256, 6))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, dim_v, group in _SHAPES:
            size, slots = (32, 3) if group == 3 else (64, 16)
            for causal in (True, False) if group == 16 else (True,):
                # Without a band rows are not packed.
                packed = causal and is_packed(CUTE_DTYPES[dtype])
                arguments = (dtype, dim, dim_v, group, size, causal, packed)
                form = f"{name}-{dim}-{dim_v}-{group}-{size}{'' if causal else '-all'}"
                yield f"selected-forward-{form}", functools.partial(compile_forward, *arguments)
            combine = functools.partial(compile_combine, dtype, dim_v, group, slots)
            yield f"combine-partials-{name}-{dim_v}-{group}-{slots}", combine
        for dim, dim_v, group in _LONG_SHAPES:
            arguments = (dtype, dim, dim_v, group, 128, True, False)
            form = f"{name}-{dim}-{dim_v}-{group}-128"
            yield f"selected-forward-{form}", functools.partial(compile_forward, *arguments)


class _Lists(NamedTuple):
    """Arguments of :func:`selected_forward` after q, k and v."""

    block_indices: Tensor
    blocks: TokenBlocks
    block_size: int
    scale: float
    causal: bool


class _Sum(NamedTuple):
    """The branches that the kernel of the band adds up. ``form`` is that of the gates.

    Without ``keep`` only the sum is wanted.
    """

    form: str
    branches: SumTensors
    keep: bool


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    band: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.fused.kernel_calls.selected_forward`."""
    lists = _Lists(block_indices, blocks, block_size, scale, causal)
    band = band and band_fits(*_band_form(q, v, lists))
    out, lse = _forward(q, k, v, lists, band, None)
    assert out is not None  # without a sum
    return out, lse


def closing_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    o_cmp: Tensor,
    o_win: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See :func:`nsa.fused.kernel_calls.closing_forward`."""
    lists = _Lists(block_indices, blocks, block_size, scale, causal)
    form, shape = gating_form((o_cmp, o_win, o_win), q, gates, weight), _band_form(q, v, lists)
    if not band_fits(*shape, form):
        o_slc, lse = _forward(q, k, v, lists, band_fits(*shape), None)
        assert o_slc is not None  # without a sum
        out = gating_forward(o_cmp, o_slc, o_win, q, gates, weight, out)
        return out, o_slc if keep else None, lse
    if out is None:
        out = torch.empty_like(o_win, memory_format=torch.contiguous_format)
    check_tensor("out", out, o_win.shape, o_win.dtype, o_win.device)
    check_output("out", out)
    tensors = (flat(o_cmp), flat(o_win), flat(gates), flat(weight), *flat_rows(out))
    o_slc, lse = _forward(q, k, v, lists, True, _Sum(form, SumTensors(*tensors), keep))
    return out, o_slc, lse


def _band_form(q: Tensor, v: Tensor, lists: _Lists) -> tuple:
    """What :func:`band_fits` goes by."""
    (heads, head_dim), (kv_heads, head_dim_v) = q.shape[1:], v.shape[1:]
    slots = lists.block_indices.shape[2]
    return q.dtype, head_dim, head_dim_v, heads // kv_heads, lists.block_size, slots


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lists: _Lists, band: bool, total: _Sum | None
) -> tuple[Tensor | None, Tensor]:
    """The output, if it is wanted, and the log-sum-exp."""
    tokens, heads, head_dim = q.shape
    kv_heads, head_dim_v = v.shape[1:]
    block_indices, blocks, block_size, scale, causal = lists
    group, slots = heads // kv_heads, block_indices.shape[2]
    form = (q.dtype, head_dim, head_dim_v, group, block_size, causal)
    chunk = choose_chunk_tokens(tokens, group, blocks.first.shape[0], slots, 2 * head_dim)
    packed = band and is_packed(CUTE_DTYPES[q.dtype])
    words = partial_words(head_dim_v, packed)
    wave = units_of_wave(chunk, slots, group, words)
    index = invert_index(
        block_indices, blocks, block_size, causal, chunk, wave, item_tokens(group), band
    )
    out = None
    if total is None or total.keep:
        out = torch.empty(tokens, heads, head_dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    (q, q_stride), (k, k_stride), (v, v_stride) = flat_rows(q), flat_rows(k), flat_rows(v)
    strides, scale_log2 = Strides(q_stride, k_stride, v_stride), scale * LOG2_E
    forward = compile_forward(*form, packed)
    if band:
        tables = (blocks.base, blocks.first, blocks.keys, blocks.row)
        runs = (blocks.run_base, blocks.run_first)
        chunk_runs = blocks.most_runs(chunk, block_size)
        ending = () if total is None else (total.form, total.keep)
        combine = functools.partial(
            compile_band(*form, slots, *ending),
            *(BandTensors(q, k, v, block_indices.reshape(-1), *tables, *runs), strides),
            *(scale_log2, blocks.first.shape[0], blocks.run_first.shape[0], chunk_runs),
            None if total is None else total.branches,
        )
    else:
        combine = compile_combine(q.dtype, head_dim_v, group, slots)
    unit_pairs = index.chunk_tokens * slots
    waves, wave_items, _ = index.items.shape
    partial_rows = min(index.wave_units, index.units) * unit_pairs * group
    partial = torch.empty(partial_rows * words, dtype=torch.int32, device=q.device)
    partial_lse = torch.empty(partial_rows, dtype=torch.float32, device=q.device)
    items, position = index.items.view(-1), index.position.view(-1)
    tensors = _Tensors(q, k, v, index.tokens, items, index.num_items, partial, partial_lse)
    flat_out = None if out is None else out.view(-1)
    results = BandResults(partial, partial_lse, position, flat_out, lse.view(-1))
    for wave in range(waves):
        first_unit = wave * index.wave_units
        wave_start = first_unit * unit_pairs
        sizes = _Sizes(wave, wave_items, wave_start, unit_pairs, kv_heads, tokens)
        forward(tensors, strides, sizes, scale_log2)
        units = min(index.wave_units, index.units - first_unit)
        places = (wave_start, first_unit, units, index.chunk_tokens)
        combine(results, WaveSizes(*places, tokens, kv_heads))
    return out, lse
