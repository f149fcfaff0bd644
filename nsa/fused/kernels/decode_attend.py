"""Selected blocks in pages, for few queries: each list by itself, split over its keys.

A list is of a token and KV head. ``splits`` CTAs take an equal share of its tiles each. Steps of
decoding attend their lists in :mod:`nsa.fused.kernels.decode_finish`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.decode_inputs import (
    MAX_LISTED,
    NO_REFERENCE,
    TILE_KEYS,
    DecodeShape,
    Parts,
    Pool,
    Schedule,
)
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_lists import load_list
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments
from nsa.fused.kernels.decode_parts import WarpOutputs
from nsa.fused.kernels.decode_places import MOST_TILES, KeyRange, ListTiles
from nsa.fused.kernels.decode_schedule import PDL, wait_for_previous
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention, make_attention
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
    """Sizes of the call; lists have ``slots`` blocks and serve ``group`` query heads."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    group: Int32
    slots: Int32
    splits: Int32
    q_stride: Int64


class DecodeAttend:
    """Parts of lists of blocks of ``select_size`` tokens."""

    def __init__(self, attention: TileAttention, select_size: int):
        self.attention = attention
        self.outputs = WarpOutputs(attention)
        self.select_size = select_size
        self.tiles = ListTiles(attention, select_size, rings=False)

    @cute.jit
    def __call__(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale_log2: Float32, stream
    ):
        attention = self.attention
        layouts, mmas = attention.layouts(), attention.make_mmas()
        units = sizes.batch * sizes.tokens * sizes.kv_heads
        self.kernel(tensors, pages, sizes, scale_log2, mmas, layouts).launch(
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
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        wait_for_previous()
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        split, unit = bidx % sizes.splits, bidx // sizes.splits
        kv_head, token = unit % sizes.kv_heads, unit // sizes.kv_heads
        sequence, token = token // sizes.tokens, token % sizes.tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.memory.SmemAllocator()
        memory = self.attention.allocate(smem, layouts)
        listed = smem.allocate_tensor(Int32, cute.make_layout(MAX_LISTED), 16)
        sTiles = tuple(
            smem.allocate_tensor(Int32, cute.make_layout(MOST_TILES), 16) for _ in range(2)
        )
        if token < new:
            position = tensors.starts[sequence] + token
            position = cutlass.min(position, tensors.ends[sequence] - 1)
            row = Int64(row0 + token)
            self.attention.load_queries(
                tensors.q, memory[0],
                functools.partial(self._query_offset, sizes, row, kv_head),
                functools.partial(self._has_query, sizes),
                tidx,
            )  # fmt: skip
            list_row = row * sizes.kv_heads + kv_head
            valid = load_list(
                tensors.blocks, sizes.slots, self.select_size, listed, position, list_row
            )
            cute.arch.barrier()
            tiles = cute.ceil_div(valid * self.select_size, TILE_KEYS)
            share = cute.ceil_div(tiles, sizes.splits)
            first = cutlass.min(split * share, tiles)
            self._attend(
                tensors, pages, sizes, scale_log2, mmas, memory, listed, sTiles,
                KeyRange(sequence, kv_head, Int32(0), position), valid, first,
                cutlass.min(first + share, tiles) - first, list_row * sizes.splits + split,
            )  # fmt: skip

    @cute.jit
    def _attend(
        self,
        tensors: _Tensors,
        pages: PagedTensors,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        memory,
        listed: cute.Tensor,
        sTiles,
        keys: KeyRange,
        valid: Int32,
        first_tile: Int32,
        count: Int32,
        slot: Int64,
    ):
        """A part: ``count`` tiles. A part without tiles has the reference of none."""
        sQ, sK, sV, ring, *warp_sums = memory
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        row_group = warp % self.attention.row_groups
        key_group = warp // self.attention.row_groups
        if count > 0:
            key_position = functools.partial(
                self.tiles.key_position, listed, Int32(1), Int32(0), valid
            )
            self.tiles.find(
                pages, None, sTiles, keys, Int32(1), key_position, tidx, first_tile, count
            )
            load_tile = functools.partial(
                self.tiles.load, pages, None, sK, sV, sTiles, keys, Int32(1), key_position, tidx,
                first_tile,
            )  # fmt: skip
            # The queries alone, which registers get.
            cute.arch.cp_async_commit_group()
            self.attention.start_tiles(load_tile, count)
            cute.arch.cp_async_wait_group(self.attention.stages - 1)
            cute.arch.barrier()
            queries = self.attention.make_rows(sQ, mmas[0], lane)
            self.attention.read_rows(queries, sQ, mmas[0], row_group, lane)
            acc_O = self.attention.make_output(mmas, lane)
            acc_O.fill(0.0)
            reference = cute.make_rmem_tensor(2, Int32)
            reference.fill(NO_REFERENCE)
            total = cute.make_rmem_tensor(2, Float32)
            total.fill(0.0)
            for i in cutlass.range(count, unroll=1):
                self.attention.wait_for_tile(Int32(0))
                stage = self.attention.load_ahead(load_tile, i, count)
                self.attention.attend_tile(
                    mmas, queries, sK[None, None, stage], sV[None, None, stage], acc_O, reference,
                    total, key_position, (first_tile + i) * TILE_KEYS, Int32(0), keys.last,
                    key_group, warp, lane, scale_log2,
                )  # fmt: skip
            cute.arch.cp_async_wait_group(0)
            self.outputs.store_part(
                acc_O, reference, total, ring, warp_sums,
                (tensors.out, tensors.reference, tensors.total),
                slot, sizes.group, tidx,
            )  # fmt: skip
        elif tidx < sizes.group:
            tensors.reference[slot * sizes.group + tidx] = Int32(NO_REFERENCE)
            tensors.total[slot * sizes.group + tidx] = Float32(0.0)

    def _query_offset(self, sizes, token_row, kv_head, row) -> Int64:
        return token_row * sizes.q_stride + (kv_head * sizes.group + row) * self.attention.head_dim

    def _has_query(self, sizes, row) -> Boolean:
        return row < sizes.group


@kept
def compile_decode_attend(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    row_groups: int,
    select_size: int,
    packed: bool,
) -> Callable:
    """The compiled kernel of these forms."""
    attention = make_attention(
        dtype, head_dim, head_dim_v, row_groups, 4 * (MAX_LISTED + 2 * MOST_TILES)
    )

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    return compile_kernel(
        DecodeAttend(attention, select_size),
        _Tensors(
            fake_flat(CUTE_DTYPES[dtype]),
            *(integers(packed), integers(), integers(), integers()),
            *(fake_flat(Float32), integers(), fake_flat(Float32, alignment=4)),
        ),
        fake_pages(CUTE_DTYPES[dtype]),
        _Sizes(*(Int32(1) for _ in range(6)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [
        (torch.bfloat16, 128, 128, 1, 64, False),
        (torch.float16, 64, 64, 2, 32, True),
        (torch.bfloat16, 128, 128, 1, 128, True),
        (torch.bfloat16, 192, 128, 1, 64, False),
        (torch.bfloat16, 256, 256, 2, 64, False),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-attend-{name}", functools.partial(compile_decode_attend, *form)


def decode_attend(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    block_indices: Tensor,
    shape: DecodeShape,
    select_size: int,
    scale: float,
    splits: int,
) -> Parts:
    """See :func:`nsa.fused.decode_calls.decode_attend`."""
    head_dim, head_dim_v = q.shape[-1], pool.v.shape[-1]
    slots = q.shape[0] * shape.kv_heads * splits
    parts = Parts(
        torch.empty(slots, shape.group, head_dim_v, dtype=torch.float32, device=q.device),
        torch.empty(slots, shape.group, dtype=torch.int32, device=q.device),
        torch.empty(slots, shape.group, dtype=torch.float32, device=q.device),
    )
    flat_q, q_stride = flat_rows(q)
    row_groups = -(-shape.group // MMA_ROWS)
    compile_decode_attend(
        q.dtype, head_dim, head_dim_v, row_groups, select_size, cu_seqlens is not None
    )(
        _Tensors(
            *(flat_q, cu_seqlens, schedule.starts, schedule.ends),
            block_indices.contiguous().view(-1),
            *(x.view(-1) for x in parts),
        ),
        page_arguments(pool, table),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.group, block_indices.shape[-1]),
            *(splits, q_stride),
        ),
        scale * LOG2_E,
    )
    return parts
