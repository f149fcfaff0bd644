"""Attention of query tiles to listed 64-key blocks, backward: a tile's queries meet its blocks.

A CTA has up to 256 query rows of one head: their Q and dO stay in shared memory, their dQ in
registers, while the K and V of the listed blocks stream past. dK and dV of a block are added in
float32 to buffers in global memory. So their last bits vary from run to run, unless CTAs take turns
(:mod:`nsa.fused.fixed_order`). A block costs 64 KiB of such additions, whatever the rows; going by
key block, as FlashAttention-4 does, costs Q, dO and twice a float32 dQ of each tile instead, and
needs the lists transposed.

Each warpgroup has one or two units of 64 rows. For each it computes S, P, dP and dS, adds dS K to
its dQ, and leaves P and dS in shared memory. With two warpgroups one then computes dV of the block
from all rows, the other dK.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers
from torch import Tensor

from nsa.fused.fixed_order import Turns, has_own_sums, heads_together, take_turns
from nsa.fused.hardware import LOG2_E, WARP, WARP_ROWS, WARPGROUP
from nsa.fused.kernel_inputs import BlockLists, Pair, RowStatistics
from nsa.fused.kernels.block_sums import add_block, round_listed_sums
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import (
    arrive_inc,
    cvt_f16,
    gemm,
    gemm_zero_init,
    get_smem_store_C,
    make_smem_layout,
    mlir_namedtuple,
    partition_fragment_ABC,
    reshape_acc_to_frgA,
    reshape_acc_to_mn,
    transpose_view,
    wait_eq,
)
from nsa.fused.kernels.key_block_lists import rank_query_tiles
from nsa.fused.kernels.rows import TILE_KEYS, TILE_ROWS, load_rows, row_copy, row_lanes
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    fake_flat,
    flat_rows,
)


@mlir_namedtuple
class _Turns(NamedTuple):
    """Of each entry, which sums it is added to, after how many others; and how many have been."""

    partial_slot: cute.Tensor
    partial_turn: cute.Tensor
    full_slot: cute.Tensor | None
    full_turn: cute.Tensor | None
    added: cute.Tensor


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs, the lists, dQ, the float32 sums that are added to, and in what order."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    dout: cute.Tensor
    lse_log2: cute.Tensor
    delta: cute.Tensor
    limit: cute.Tensor | None
    partial_count: cute.Tensor
    partial_index: cute.Tensor
    full_count: cute.Tensor | None
    full_index: cute.Tensor | None
    dq: cute.Tensor
    dk: cute.Tensor
    dv: cute.Tensor
    turns: _Turns | None


@mlir_namedtuple
class _Strides(NamedTuple):
    """Elements from token to token."""

    q: Int64
    k: Int64
    v: Int64
    dout: Int64


@mlir_namedtuple
class _Sizes(NamedTuple):
    """``parts`` CTAs share a list; ``width`` and ``full_width`` are the entries of a list.

    There are ``earlier`` more keys than rows. CTAs that take turns are launched for ``together``
    heads, tile after tile, before those of the next heads.
    """

    num_rows: Int32
    kv_heads: Int32
    together: Int32
    parts: Int32
    width: Int32
    full_width: Int32
    earlier: Int32


class ListedBackward:
    """Writes dQ, adds to dV and dK; scores are not scaled in dK.

    ``rows`` of a CTA are 64, 128 or 256; with ``limited`` a row sees keys before a limit of its own
    instead of those up to its own key. The last row's key is then the last one.

    With ``ordered``, a CTA waits until it is its turn to add. It waits for CTAs that were launched
    before it alone. Sums are of slots then, else of the KV heads of one key block after another.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        group: int,
        rows: int,
        limited: bool,
        ordered: bool,
    ):
        self.ordered = ordered
        self.dtype = dtype
        self.head_dim = head_dim
        self.group = group
        self.rows = rows
        self.limited = limited
        self.stages = rows // TILE_ROWS
        self.warpgroups = min(2, self.stages)
        self.units = self.stages // self.warpgroups
        self.threads = WARPGROUP * self.warpgroups

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: _Strides,
        sizes: _Sizes,
        scale: Float32,
        stream,
    ):
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        # dO, then Q; and P, then dS.
        rows_smem = make_layout((TILE_ROWS, self.head_dim), stage=2 * self.stages)
        ds_smem = make_layout((TILE_ROWS, TILE_KEYS), stage=2 * self.stages)
        keys_smem = make_layout((TILE_KEYS, self.head_dim))
        make_mma = functools.partial(
            hopper_helpers.make_trivial_tiled_mma,
            self.dtype,
            self.dtype,
            acc_dtype=Float32,
            atom_layout_mnk=(1, 1, 1),
        )
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        mma_s = make_mma(k_major, k_major, tiler_mn=(TILE_ROWS, TILE_KEYS))
        mma_dq = make_mma(
            k_major,
            mn_major,
            tiler_mn=(TILE_ROWS, self.head_dim),
            a_source=warpgroup.OperandSource.RMEM,
        )
        mma_dkv = make_mma(mn_major, mn_major, tiler_mn=(TILE_KEYS, self.head_dim))
        mmas = (mma_s, mma_dq, mma_dkv)
        layouts = (rows_smem, keys_smem, ds_smem)
        tiles, heads = sizes.num_rows // self.rows, sizes.kv_heads * self.group
        grid = [tiles, heads, 1]
        if const_expr(self.ordered):
            grid = [sizes.together * sizes.parts, tiles // sizes.parts, heads // sizes.together]
        self.kernel(tensors, strides, sizes, scale, mmas, layouts).launch(
            grid=grid,
            block=[self.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        strides: _Strides,
        sizes: _Sizes,
        scale: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        mma_s, mma_dq, mma_dkv = mmas
        rows_smem, keys_smem, ds_smem = layouts
        kv_heads = sizes.kv_heads
        tidx, _, _ = cute.arch.thread_idx()
        bidx, head, heads_before = cute.arch.block_idx()
        if const_expr(self.ordered):
            part, tile = bidx % sizes.parts, head
            head = heads_before * sizes.together + bidx // sizes.parts
            bidx = tile * sizes.parts + part
        first_row = bidx * self.rows
        kv_head = head // self.group
        warp_in_cta = cute.arch.make_warp_uniform(tidx // WARP)
        wg, warp = warp_in_cta // 4, warp_in_cta % 4
        lane, thread = tidx % WARP, tidx % WARPGROUP

        smem = cutlass.memory.SmemAllocator()
        sRows, sdS, sK, sV = (
            smem.allocate_tensor(self.dtype, x.outer, 1024, swizzle=x.inner)
            for x in (rows_smem, ds_smem, keys_smem, keys_smem)
        )
        sLse, sDelta = (
            smem.allocate_tensor(Float32, cute.make_layout(self.rows), 16) for _ in range(2)
        )

        # `parts` CTAs share a list.
        tiles = sizes.num_rows // (self.rows * sizes.parts)
        listed = Int64(head) * tiles + bidx // sizes.parts
        entries = tensors.partial_count[listed]
        partial = entries
        if const_expr(tensors.full_count is not None):
            entries += tensors.full_count[listed]
        block_of = functools.partial(
            *(self._block, tensors.partial_index, tensors.full_index),
            *(listed * sizes.width, listed * sizes.full_width, partial),
        )
        load = functools.partial(self._load, tidx)
        k_column = kv_head * self.head_dim
        slot_of = turn_of = None
        if const_expr(self.ordered):
            places = (listed * sizes.width, listed * sizes.full_width, partial)
            turns = tensors.turns
            slot_of = functools.partial(self._block, turns.partial_slot, turns.full_slot, *places)
            turn_of = functools.partial(self._block, turns.partial_turn, turns.full_turn, *places)
        block = Int32(0)
        if entries > 0:
            block = block_of(Int32(0))
            load(tensors.k, sK, strides.k, k_column, block * TILE_KEYS)
            load(tensors.v, sV, strides.v, k_column, block * TILE_KEYS)
        q_column = head * self.head_dim
        for i in cutlass.range_constexpr(self.stages):
            row = first_row + i * TILE_ROWS
            load(tensors.dout, sRows[None, None, i], strides.dout, q_column, row)
            load(tensors.q, sRows[None, None, self.stages + i], strides.q, q_column, row)
        cute.arch.cp_async_commit_group()
        if tidx < self.rows:
            statistic = Int64(head) * sizes.num_rows + (first_row + tidx)
            sLse[tidx], sDelta[tidx] = tensors.lse_log2[statistic], tensors.delta[statistic]

        thr_s, thr_dq, thr_dkv = (mma.get_slice(0) for mma in (mma_s, mma_dq, mma_dkv))
        partition = partition_fragment_ABC
        _, tSrRows, tSrK = partition(thr_s, (TILE_ROWS, TILE_KEYS, self.head_dim), sRows, sK)
        _, _, tPrV = partition(thr_s, (TILE_ROWS, TILE_KEYS, self.head_dim), sRows, sV)
        shape = (TILE_ROWS, self.head_dim, TILE_KEYS)
        _, _, tdQrKt = partition(thr_dq, shape, None, transpose_view(sK))
        _, tdKVrdSt, tdKVrRowst = partition(
            thr_dkv,
            (TILE_KEYS, self.head_dim, TILE_ROWS),
            transpose_view(sdS),
            transpose_view(sRows),
        )
        acc_dQ = [
            cute.make_rmem_tensor(thr_dq.partition_shape_C((TILE_ROWS, self.head_dim)), Float32)
            for _ in range(self.units)
        ]
        for acc in acc_dQ:
            acc.fill(0.0)
        store_ds, _, _ = get_smem_store_C(mma_s, sdS, thread, position_independent=True)
        tScS = reshape_acc_to_mn(
            mma_s.get_slice(thread).partition_C(cute.make_identity_tensor((TILE_ROWS, TILE_KEYS)))
        )

        scale_log2 = scale * LOG2_E
        for entry in cutlass.range(entries, unroll=1):
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_view_async_shared()
            # Also, all reads of the last block's P and dS are done, and its dK and dV are added.
            cute.arch.barrier()
            slot, turn = block * kv_heads + kv_head, Int32(0)
            if const_expr(self.ordered):
                if entry > 0:
                    arrive_inc(tensors.turns.added.iterator + slot_of(entry - 1), tidx, 0, 1)
                slot = slot_of(entry)
                turn = turn_of(entry) * sizes.parts + part
            sums = Int64(slot) * (TILE_KEYS * self.head_dim)
            first_key = block * TILE_KEYS
            if entry + 1 < entries:
                block = block_of(entry + 1)
            for u in cutlass.range_constexpr(self.units):
                unit = wg * self.units + u
                scores = functools.partial(gemm_zero_init, mma_s, (TILE_ROWS, TILE_KEYS), tSrRows)
                acc_S = scores(tSrK, A_idx=self.stages + unit, wg_wait=-1)
                acc_dP = scores(tPrV, A_idx=unit, wg_wait=1)
                acc_S_mn = reshape_acc_to_mn(acc_S)
                row = unit * TILE_ROWS + tScS[0, 0][0]
                self._mask(
                    acc_S_mn, tScS, tensors.limit, first_row + row, first_key - sizes.earlier
                )
                for r in cutlass.range_constexpr(2):
                    lse = sLse[row + 8 * r]
                    for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                        acc_S_mn[r, c] = cute.math.exp2(
                            acc_S_mn[r, c] * scale_log2 - lse, fastmath=True
                        )
                rP = cvt_f16(reshape_acc_to_frgA(acc_S), self.dtype)
                store_ds(rP, dst_idx=unit)

                warpgroup.wait_group(0)
                acc_dP_mn = reshape_acc_to_mn(acc_dP)
                for r in cutlass.range_constexpr(2):
                    delta = sDelta[row + 8 * r]
                    for c in cutlass.range_constexpr(cute.size(acc_dP_mn, mode=[1])):
                        acc_dP_mn[r, c] = acc_S_mn[r, c] * (acc_dP_mn[r, c] - delta)
                rdS = cvt_f16(reshape_acc_to_frgA(acc_dP), self.dtype)
                store_ds(rdS, dst_idx=self.stages + unit)
                gemm(mma_dq, acc_dQ[u], rdS, tdQrKt, wg_wait=-1)
            warpgroup.wait_group(0)
            cute.arch.fence_view_async_shared()
            if const_expr(self.ordered):
                wait_eq(tensors.turns.added.iterator + slot, tidx, 0, turn)
            cute.arch.barrier()

            # The first warpgroup has dV, from P and dO; the second dK, from dS and Q.
            for i in cutlass.range_constexpr(2 // self.warpgroups):
                which = wg + i
                acc = cute.make_rmem_tensor(
                    thr_dkv.partition_shape_C((TILE_KEYS, self.head_dim)), Float32
                )
                for stage in cutlass.range_constexpr(self.stages):
                    at = which * self.stages + stage
                    gemm(
                        mma_dkv,
                        acc,
                        tdKVrdSt[None, None, None, at],
                        tdKVrRowst[None, None, None, at],
                        zero_init=stage == 0,
                        wg_wait=-1,
                    )
                if const_expr(i == 0):
                    if entry + 1 < entries:
                        load(tensors.k, sK, strides.k, k_column, block * TILE_KEYS)
                        load(tensors.v, sV, strides.v, k_column, block * TILE_KEYS)
                    cute.arch.cp_async_commit_group()
                warpgroup.wait_group(0)
                if which == 0:
                    add_block(acc, tensors.dv, sums, warp, lane)
                else:
                    add_block(acc, tensors.dk, sums, warp, lane)

        # All have read Q; its place takes dQ.
        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()
        if const_expr(self.ordered):  # noqa: SIM102 (one is decided at compile time)
            if entries > 0:
                arrive_inc(tensors.turns.added.iterator + slot_of(entries - 1), tidx, 0, 1)
        store_dq, _, _ = get_smem_store_C(mma_dq, sRows, thread, position_independent=True)
        for u in cutlass.range_constexpr(self.units):
            unit = wg * self.units + u
            acc_dQ[u].store(acc_dQ[u].load() * scale)
            store_dq(cvt_f16(acc_dQ[u], self.dtype), dst_idx=self.stages + unit)
            cute.arch.sync_warp()
            row = Int64(first_row + unit * TILE_ROWS + warp * WARP_ROWS)
            heads = kv_heads * self.group
            self._store_rows(
                sRows[None, None, self.stages + unit],
                tensors.dq,
                (row * heads + head) * self.head_dim,
                Int64(heads) * self.head_dim,
                warp,
                lane,
            )

    @cute.jit
    def _block(
        self,
        mIndex: cute.Tensor,
        mFullIndex: cute.Tensor | None,
        start: Int64,
        full_start: Int64,
        partial: Int32,
        entry: Int32,
    ) -> Int32:
        """What an index has of an entry: those of the full list come after the partial ones."""
        block = Int32(0)
        if const_expr(mFullIndex is None):
            block = mIndex[start + entry]
        else:
            if entry < partial:
                block = mIndex[start + entry]
            else:
                block = mFullIndex[full_start + (entry - partial)]
        return block

    @cute.jit
    def _load(
        self,
        tidx: Int32,
        mX: cute.Tensor,
        sX: cute.Tensor,
        stride: Int64,
        column: Int32,
        first: Int32,
    ):
        """Start to load 64 rows from ``first`` on."""
        load_rows(mX, sX, stride, lambda i, more: (first + i + more, column), tidx, self.threads)

    @cute.jit
    def _mask(
        self,
        acc_S_mn: cute.Tensor,
        tScS: cute.Tensor,
        mLimit: cute.Tensor | None,
        row: Int32,
        first_key: Int32,
    ):
        """Set scores to -inf for keys that the thread's rows, ``row`` and 8 after, do not see.

        ``first_key`` counts from key 0 with limits, otherwise from the key of row 0.
        """
        limits = cute.make_rmem_tensor(2, Int32)
        for r in cutlass.range_constexpr(2):
            limit = row + 8 * r + 1
            if const_expr(self.limited):
                limit = mLimit[row + 8 * r]
            limits[r] = limit - first_key
        if cutlass.min(limits[0], limits[1]) < TILE_KEYS:
            for r in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(cute.size(acc_S_mn, mode=[1])):
                    visible = tScS[r, c][1] < limits[r]
                    acc_S_mn[r, c] = acc_S_mn[r, c] if visible else -Float32.inf

    @cute.jit
    def _store_rows(
        self,
        sX: cute.Tensor,
        mX: cute.Tensor,
        start: Int64,
        stride: Int64,
        warp: Int32,
        lane: Int32,
    ):
        """Store the warp's 16 rows of a unit, in whole lines."""
        lanes = const_expr(row_lanes(self.head_dim))
        thr_copy = row_copy(self.dtype, lanes, WARP, cute.nvgpu.CopyUniversalOp()).get_slice(lane)
        tile = cute.local_tile(sX, (WARP_ROWS, self.head_dim), (warp, 0))
        tXsX = thr_copy.partition_S(tile)
        for m in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
            row = lane // lanes + m * (WARP // lanes)
            offset = start + row * stride + lane % lanes * VECTOR
            for k in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
                rX = cute.make_rmem_tensor(((VECTOR, 1),), self.dtype)
                cute.autovec_copy(tXsX[None, m, k], rX)
                pointer = mX.iterator + cute.assume(offset + k * lanes * VECTOR, divby=VECTOR)
                cute.autovec_copy(rX, cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),))))


@kept
def compile_backward(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    rows: int,
    limited: bool,
    has_full: bool,
    ordered: bool,
) -> Callable:
    cute_dtype = CUTE_DTYPES[dtype]

    def ints(wanted: bool = True):
        return fake_flat(Int32 if wanted else None, alignment=4)

    return compile_kernel(
        ListedBackward(cute_dtype, head_dim, group, rows, limited, ordered),
        _Tensors(
            *(fake_flat(cute_dtype) for _ in range(4)),
            *(fake_flat(Float32, alignment=4) for _ in range(2)),
            ints(limited),
            *(ints(), ints(), ints(has_full), ints(has_full)),
            fake_flat(cute_dtype),
            *(fake_flat(Float32) for _ in range(2)),
            _Turns(ints(), ints(), ints(has_full), ints(has_full), ints()) if ordered else None,
        ),
        _Strides(*(Int64(1) for _ in range(4))),
        _Sizes(*(Int32(1) for _ in range(7))),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim, group, rows in ((64, 1, 256), (96, 3, 128), (128, 4, 64), (128, 4, 256)):
            for limited, has_full in ((False, False), (True, True)):
                form = f"{name}-{dim}-{group}-{rows}{'-limit' if limited else ''}"
                form += "-ordered" if (rows == 256) != limited else ""
                ordered = (rows == 256) != limited
                arguments = (dtype, dim, group, rows, limited, has_full, ordered)
                yield f"listed-backward-{form}", functools.partial(compile_backward, *arguments)


def listed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    lists: BlockLists,
    scale: float,
    key_limit: Tensor | None,
    deterministic: bool = False,
    sums: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`nsa.fused.kernel_calls.listed_backward`."""
    (_, num_rows, heads, head_dim), kv_heads = q.shape, k.shape[2]
    _check(q, k, v, lists, key_limit)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if dq.numel() == 0:
        return (dq, *sums) if sums else (dq, torch.zeros_like(k), torch.zeros_like(v))
    group, num_blocks = heads // kv_heads, k.shape[1] // TILE_KEYS
    together, slots, turns = heads, num_blocks * kv_heads, None
    if deterministic:
        own_sums = has_own_sums(num_blocks, heads, head_dim)
        order = _turns_of_own_sums(lists, num_blocks) if own_sums else None
        if order is None:
            order = take_turns(lists, num_blocks, kv_heads, own_sums=own_sums)
        together = heads if own_sums else heads_together(heads, group)
        slots = num_blocks * heads if own_sums else slots + order.popular.numel() * group
        added = torch.zeros(slots, dtype=torch.int32, device=q.device)
        turns = _Turns(*(None if x is None else x.view(-1) for x in order[:4]), added)
    size = slots * TILE_KEYS * head_dim
    dk, dv = sums or torch.zeros(2, size, dtype=torch.float32, device=q.device)
    rows = next(x for x in (256, 128, 64) if lists.query_block % x == 0)
    has_full = lists.full_count is not None
    kernel = compile_backward(
        q.dtype, head_dim, group, rows, key_limit is not None, has_full, deterministic
    )
    flattened, strides = zip(*map(flat_rows, (q, k, v, dout)), strict=True)
    entries = [None if x is None else x.contiguous().view(-1) for x in lists[:4]]
    # Limits are absolute.
    earlier = k.shape[1] - num_rows if key_limit is None else 0
    widths = [0 if x is None else x.shape[-1] for x in (lists.partial_index, lists.full_index)]
    numbers = [x.contiguous().view(-1) for x in statistics]
    totals = dq.view(-1), dk.view(-1), dv.view(-1)
    kernel(
        _Tensors(*flattened, *numbers, key_limit, *entries, *totals, turns),
        _Strides(*strides),
        _Sizes(num_rows, kv_heads, together, lists.query_block // rows, *widths, earlier),
        scale,
    )
    if sums:
        return dq, *sums
    if deterministic:
        if own_sums:
            dk, dv = (_of_kv_heads(x, num_blocks, k) for x in (dk, dv))
        else:
            dk, dv = (_of_key_blocks(x, order.popular, num_blocks, k) for x in (dk, dv))
    grads = [torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (k, v)]
    round_listed_sums((dk, dv), grads, (scale, 1.0))
    return dq, *grads


def _turns_of_own_sums(lists: BlockLists, num_blocks: int) -> Turns | None:
    """:func:`take_turns` of query heads that have sums of their own; None if there are full blocks.

    The order of a head's entries is that of its tiles.
    """
    if lists.full_count is not None:
        return None
    index, heads = lists.partial_index, lists.partial_count.shape[1]
    turn = rank_query_tiles(lists.partial_count, index, num_blocks)
    first = torch.arange(0, heads * num_blocks, num_blocks, dtype=torch.int32, device=index.device)
    slot = index + first[:, None, None]
    return Turns(slot, turn, None, None, index.new_empty(0))


def _of_kv_heads(sums: Tensor, num_blocks: int, k: Tensor) -> Tensor:
    """The sums of key blocks, in their order, from those of each query head."""
    kv_heads, head_dim = k.shape[2:]
    of_heads = sums.view(kv_heads, -1, num_blocks, TILE_KEYS * head_dim)
    total = sums.new_empty(num_blocks, kv_heads, TILE_KEYS * head_dim)
    torch.sum(of_heads, 1, out=total.transpose(0, 1))
    return total.flatten()


def _of_key_blocks(sums: Tensor, popular: Tensor, num_blocks: int, k: Tensor) -> Tensor:
    """The sums of key blocks, in their order, from those of slots.

    See :class:`nsa.fused.fixed_order.Turns`.
    """
    kv_heads, head_dim = k.shape[2:]
    of_heads, of_query_heads = sums.view(-1, TILE_KEYS * head_dim).tensor_split(
        [kv_heads * num_blocks]
    )
    of_heads = of_heads.view(kv_heads, num_blocks, -1)
    if popular.numel():
        of_query_heads = of_query_heads.view(*popular.shape, -1, of_heads.shape[-1])
        kv_head = torch.arange(kv_heads, device=sums.device)[:, None]
        of_heads[kv_head, popular] += of_query_heads.sum(2)
    return of_heads.transpose(0, 1).flatten()


def _check(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, key_limit: Tensor | None) -> None:
    """Raise on what the kernel cannot take."""
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[3] not in (64, 96, 128):
        raise ValueError(
            f"q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; they must "
            "have the same 64, 96 or 128 channels"
        )
    if key_limit is None and k.shape[1] < q.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} rows and k {k.shape[1]}; without key_limit a row has its own key"
        )
    if lists.key_block != TILE_KEYS:
        raise ValueError(f"lists are of {lists.key_block}-key blocks; they must be of {TILE_KEYS}")
    for name, x, multiple in (("q", q, lists.query_block), ("k", k, TILE_KEYS)):
        if x.shape[1] % multiple:
            raise ValueError(f"{name} has {x.shape[1]} rows; it must have a multiple of {multiple}")
