"""Decoding's selected and window branch: each list by itself, split over its keys.

A list is of a token and KV head, in tile mode of a token and query head. Its tiles are those of the
window, then those of the selected blocks. ``splits`` CTAs take an equal share each; one that has
tiles of both branches attends one after the other. Parts are summed and gated by
:mod:`nsa.fused.kernels.decode_combine`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from torch import Tensor

from nsa.fused.decode_inputs import (
    MAX_LISTED,
    NO_REFERENCE,
    TILE_KEYS,
    DecodeShape,
    Parts,
    Pool,
    Schedule,
    TileLists,
)
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_tiles import (
    MMA_ROWS,
    PDL,
    PagedTensors,
    TileAttention,
    fake_pages,
    make_attention,
    page_arguments,
    wait_for_previous,
)
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat_rows


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs and parts."""

    q: cute.Tensor
    cu_seqlens: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    blocks: cute.Tensor
    out: cute.Tensor
    reference: cute.Tensor
    total: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call; lists have ``slots`` blocks and serve ``group`` query heads.

    ``kv_share`` lists of a token share a KV head. The last two are of tile mode.
    """

    batch: Int32
    tokens: Int32
    lists: Int32
    group: Int32
    slots: Int32
    window: Int32
    splits: Int32
    kv_share: Int32
    tile_size: Int32
    tile_slots: Int32
    q_stride: Int64


class DecodeAttend:
    """Parts of the selected and window branch."""

    def __init__(self, attention: TileAttention, select_size: int, tile_mode: bool, rings: bool):
        self.rings = rings
        self.attention = attention
        self.tile_mode = tile_mode
        self.select_size = select_size

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        pages: PagedTensors,
        rings: PagedTensors | None,
        sizes: _Sizes,
        scale_log2: Float32,
        stream,
    ):
        attention = self.attention
        layouts, mma = attention.layouts(), attention.make_mma()
        units = sizes.batch * sizes.tokens * sizes.lists
        self.kernel(tensors, pages, rings, sizes, scale_log2, mma, layouts).launch(
            grid=[units * sizes.splits, 1, 1],
            block=[attention.threads, 1, 1],
            stream=stream,
            use_pdl=PDL,
            min_blocks_per_mp=attention.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        pages: PagedTensors,
        rings: PagedTensors | None,
        sizes: _Sizes,
        scale_log2: Float32,
        mma: cute.TiledMma,
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        split, unit = bidx % sizes.splits, bidx // sizes.splits
        index, token = unit % sizes.lists, unit // sizes.lists
        sequence, token = token // sizes.tokens, token % sizes.tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.utils.SmemAllocator()
        memory = self.attention.allocate(smem, layouts)
        # Of each listed block: its index, its page, and its first row there.
        listed = tuple(
            smem.allocate_tensor(Int32, cute.make_layout(MAX_LISTED), 16) for _ in range(3)
        )
        if token < new:
            position = tensors.starts[sequence] + token
            position = cutlass.min(position, tensors.ends[sequence] - 1)
            row = Int64(row0 + token)
            unit_row, kv_head = row * sizes.lists + index, index // sizes.kv_share
            list_row = unit_row
            if const_expr(self.tile_mode):
                slot = position // sizes.tile_size % sizes.tile_slots
                list_row = Int64(sequence * sizes.tile_slots + slot) * sizes.lists + index
            self.attention.load_queries(
                tensors.q, memory[0],
                functools.partial(self._query_offset, sizes, row, index),
                functools.partial(self._has_query, sizes),
                tidx,
            )  # fmt: skip
            # The window is first: it needs no list, so nothing of the kernel before this one.
            window = cutlass.min(sizes.window, position + 1)
            window_tiles = cute.ceil_div(window, TILE_KEYS)
            tiles = window_tiles + cute.ceil_div(sizes.slots * self.select_size, TILE_KEYS)
            share = cute.ceil_div(tiles, sizes.splits)
            first = split * share
            last = first + share
            begin, end = cutlass.min(first, window_tiles), cutlass.min(last, window_tiles)
            slot = (unit_row * sizes.splits + split) * 2
            # The window's pages, or its rings: one for each sequence, of which no table is needed.
            window_pages = pages if const_expr(rings is None) else rings
            arguments = sizes, scale_log2, mma, memory, listed
            self._attend(
                1, tensors, window_pages, *arguments, sequence, kv_head, position,
                position + 1 - window, Int32(0), begin, end - begin, slot + 1,
            )  # fmt: skip
            valid = self._load_list(tensors, pages, sizes, listed, sequence, position, list_row)
            cute.arch.barrier()
            tiles = cute.ceil_div(valid * self.select_size, TILE_KEYS)
            begin = cutlass.min(cutlass.max(first - window_tiles, 0), tiles)
            end = cutlass.min(cutlass.max(last - window_tiles, 0), tiles)
            self._attend(
                0, tensors, pages, *arguments, sequence, kv_head, position,
                Int32(0), valid, begin, end - begin, slot,
            )  # fmt: skip

    @cute.jit
    def _load_list(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, listed, sequence: Int32,
        position: Int32, list_row: Int64,
    ) -> Int32:  # fmt: skip
        """Load the list of a token; returns how many blocks it has."""
        tidx, _, _ = cute.arch.thread_idx()
        lane = tidx % WARP
        sBlock, sPage, sRow = listed
        valid = Int32(0)
        for i in cutlass.range_constexpr(MAX_LISTED // WARP):
            slot = i * WARP + lane
            block = Int32(-1)
            if slot < sizes.slots:
                block = tensors.blocks[list_row * sizes.slots + slot]
            first = block * self.select_size
            # A list may name a block that starts past the token. It has no page perhaps.
            real = block >= 0 and first <= position
            valid += cute.arch.popc(cute.arch.vote_ballot_sync(real))
            # All warps find the same; one writes.
            if tidx < WARP:
                page = Int32(0)
                if real:
                    index = first // pages.page_rows
                    page = pages.table[Int64(sequence) * pages.max_pages + index]
                sBlock[slot] = block
                sPage[slot] = page
                sRow[slot] = first % pages.page_rows
        return valid

    @cute.jit
    def _attend(
        self,
        branch: cutlass.Constexpr[int],
        tensors: _Tensors,
        pages: PagedTensors,
        sizes: _Sizes,
        scale_log2: Float32,
        mma: cute.TiledMma,
        memory,
        listed,
        sequence: Int32,
        kv_head: Int32,
        position: Int32,
        start: Int32,
        valid: Int32,
        first_tile: Int32,
        count: Int32,
        slot: Int64,
    ):
        """A part: ``count`` tiles of a branch. A part without tiles has the reference of none.

        The window's is attended before the kernel before this one has ended, and stored after.
        """
        sQ, sK, sV, sO, sM, sL = memory
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        row_group = warp % self.attention.row_groups
        key_group = warp // self.attention.row_groups
        if count > 0:
            load_tile = functools.partial(
                self._load_tile, branch, pages, sK, sV, listed, sequence, kv_head, position,
                start, valid, tidx,
            )  # fmt: skip
            # All warps are done with what the branch before left in shared memory.
            cute.arch.barrier()
            for s in cutlass.range_constexpr(self.attention.stages - 1):
                if s < count:
                    load_tile(first_tile + s, Int32(s))
                cute.arch.cp_async_commit_group()
            acc_O = self.attention.make_output(mma, lane)
            acc_O.fill(0.0)
            reference = cute.make_rmem_tensor(2, Int32)
            reference.fill(NO_REFERENCE)
            total = cute.make_rmem_tensor(2, Float32)
            total.fill(0.0)
            for i in cutlass.range(count, unroll=1):
                cute.arch.cp_async_wait_group(self.attention.stages - 2)
                cute.arch.barrier()
                ahead = i + (self.attention.stages - 1)
                if ahead < count:
                    load_tile(first_tile + ahead, ahead % self.attention.stages)
                cute.arch.cp_async_commit_group()
                stage = i % self.attention.stages
                accs = self.attention.compute_scores(
                    mma, sQ, sK[None, None, stage], row_group, key_group, lane
                )
                low, high = [], []
                for u in cutlass.range_constexpr(self.attention.units):
                    key = (first_tile + i) * TILE_KEYS + (
                        (key_group + u * self.attention.key_groups) * MMA_ROWS
                    )
                    key_position, real = self._position(branch, listed, start, valid, key)
                    low.append(Int32(0))
                    high.append(position + 1 - key_position if real else Int32(0))
                self.attention.softmax(
                    accs, acc_O, reference, total, low, [high, high], lane, scale_log2
                )
                self.attention.add_values(mma, acc_O, accs, sV[None, None, stage], key_group, lane)
            cute.arch.cp_async_wait_group(0)
            if const_expr(branch == 1):
                wait_for_previous()
            self.attention.store_part(
                acc_O, reference, total, sO, sM, sL,
                (tensors.out, tensors.reference, tensors.total),
                slot, sizes.group, row_group, key_group, tidx,
            )  # fmt: skip
        else:
            if const_expr(branch == 1):
                wait_for_previous()
            if tidx < sizes.group:
                tensors.reference[slot * sizes.group + tidx] = Int32(NO_REFERENCE)
                tensors.total[slot * sizes.group + tidx] = Float32(0.0)

    @cute.jit
    def _position(
        self, branch: cutlass.Constexpr[int], listed, start: Int32, valid: Int32, key: Int32
    ) -> tuple[Int32, Boolean]:
        """The position of a key among those of the branch, and whether there is such a key."""
        position, real = start + key, Boolean(True)
        if const_expr(branch == 0):
            entry = key // self.select_size
            block = listed[0][cutlass.min(entry, MAX_LISTED - 1)]
            position = block * self.select_size + key % self.select_size
            real = entry < valid
        return position, real

    def _query_offset(self, sizes, token_row, index, row) -> Int64:
        return token_row * sizes.q_stride + (index * sizes.group + row) * self.attention.head_dim

    def _has_query(self, sizes, row) -> Boolean:
        return row < sizes.group

    @cute.jit
    def _load_tile(
        self, branch: cutlass.Constexpr[int], pages: PagedTensors, sK: cute.Tensor,
        sV: cute.Tensor, listed, sequence: Int32, kv_head: Int32, position: Int32, start: Int32,
        valid: Int32, tidx: Int32, tile: Int32, stage: Int32,
    ):  # fmt: skip
        place = functools.partial(
            self._place, branch, pages, listed, sequence, position, start, valid, tile * TILE_KEYS
        )
        self.attention.load_tile(pages, sK, sV, place, kv_head, tidx, stage)

    @cute.jit
    def _place(
        self, branch: cutlass.Constexpr[int], pages: PagedTensors, listed, sequence: Int32,
        position: Int32, start: Int32, valid: Int32, key0: Int32, key: Int32,
    ):  # fmt: skip
        key_position, real = self._position(branch, listed, start, valid, key0 + key)
        real = real and key_position <= position
        if const_expr(branch == 0):
            entry = cutlass.min((key0 + key) // self.select_size, MAX_LISTED - 1)
            page, row = listed[1][entry], listed[2][entry] + (key0 + key) % self.select_size
        else:
            seen = Uint32(cutlass.min(key_position, position))
            index = Int32(seen // Uint32(pages.page_rows))
            row = Int32(seen % Uint32(pages.page_rows))
            page = sequence
            if const_expr(not self.rings):
                page = pages.table[Int64(sequence) * pages.max_pages + index]
        return page, row, real


@kept
def compile_decode_attend(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    row_groups: int,
    select_size: int,
    packed: bool,
    tile_mode: bool,
    rings: bool,
) -> Callable:
    """The compiled kernel of these forms."""
    attention = make_attention(dtype, head_dim, head_dim_v, row_groups)

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    return compile_kernel(
        DecodeAttend(attention, select_size, tile_mode, rings),
        _Tensors(
            fake_flat(CUTE_DTYPES[dtype]),
            *(integers(packed), integers(), integers(), integers()),
            *(fake_flat(Float32, alignment=4), integers(), fake_flat(Float32, alignment=4)),
        ),
        fake_pages(CUTE_DTYPES[dtype]),
        fake_pages(CUTE_DTYPES[dtype]) if rings else None,
        _Sizes(*(Int32(1) for _ in range(10)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [
        (torch.bfloat16, 128, 128, 1, 64, False, False, False),
        (torch.float16, 64, 64, 2, 32, True, False, True),
        (torch.bfloat16, 128, 128, 1, 128, True, False, False),
        (torch.bfloat16, 96, 96, 1, 64, False, True, False),
        (torch.bfloat16, 192, 128, 1, 64, False, False, False),
        (torch.bfloat16, 256, 256, 2, 64, False, False, False),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-attend-{name}", functools.partial(compile_decode_attend, *form)


def decode_attend(
    q: Tensor,
    pool: Pool,
    rings: Pool | None,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    block_indices: Tensor | TileLists,
    shape: DecodeShape,
    select_size: int,
    window: int,
    scale: float,
    splits: int,
) -> Parts:
    """See :func:`nsa.fused.decode_calls.decode_attend`."""
    head_dim, head_dim_v = q.shape[-1], pool.v.shape[-1]
    tile_mode, tile_size, tile_slots = isinstance(block_indices, TileLists), 1, 1
    lists, kv_share, group = shape.kv_heads, 1, shape.group
    if isinstance(block_indices, TileLists):
        block_indices, tile_size = block_indices
        tile_slots = block_indices.shape[1]
        lists, kv_share, group = lists * group, group, 1
    slots = q.shape[0] * lists * splits * 2
    parts = Parts(
        torch.empty(slots, group, head_dim_v, dtype=torch.float32, device=q.device),
        torch.empty(slots, group, dtype=torch.int32, device=q.device),
        torch.empty(slots, group, dtype=torch.float32, device=q.device),
    )
    flat_q, q_stride = flat_rows(q)
    row_groups = -(-group // MMA_ROWS)
    packed = cu_seqlens is not None
    compile_decode_attend(
        q.dtype, head_dim, head_dim_v, row_groups, select_size, packed, tile_mode, rings is not None
    )(
        _Tensors(
            *(flat_q, cu_seqlens, schedule.starts, schedule.ends),
            block_indices.contiguous().view(-1),
            *(x.view(-1) for x in parts),
        ),
        page_arguments(pool, table),
        None if rings is None else page_arguments(rings, table),
        _Sizes(
            *(shape.batch, shape.tokens, lists, group, block_indices.shape[-1], window, splits),
            *(kv_share, tile_size, tile_slots, q_stride),
        ),
        scale * LOG2_E,
    )
    return parts
