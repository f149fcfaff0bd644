"""Which tokens selected each block: the inverse of the block indices, cut into work items.

A *pair* is a token and one of its selected blocks, for one KV head. Tokens are cut into *chunks*,
small enough that the queries of one KV head and chunk stay in L2. The pairs of a KV head and chunk
lie together in the *list*, sorted by block: pair at ``position`` p is token ``tokens[p]``. A *work
item* is a run of pairs of one block, at most :func:`item_tokens` of them. (KV head, chunk) are
numbered ``unit = chunk * kv_heads + kv_head``; consecutive units form a *wave*, whose partial
results fit a workspace.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple, warp_prefix_sum
from nsa.fused.kernels.vectors import fake_flat, is_aligned
from nsa.fused.token_inputs import TokenBlocks

ITEM_FIELDS = 6
"""A work item has six numbers: first position, pairs, first key, keys, the row of q at the first
key, and how many items of the same block precede it in its unit. A token sees as many keys of the
block as its row is past that row, and one more."""

_THREADS = 256
_SCAN_THREADS = 1024


def item_tokens(group: int) -> int:
    """The most pairs of a work item: 32 tiles of rows, because a CTA with more would end long after
    the others; fewer where their tokens would take much shared memory."""
    return max(16, min(512, 2048 // group))


def slots_of(mX: cute.Tensor, row: Int32 | Int64, slots: int) -> cute.Tensor:
    """The row of a token and KV head of ``(T * H_kv, slots)``, which is flat, 16-byte aligned."""
    aligned = 4 if slots % 4 == 0 else 1
    pointer = mX.iterator + cute.assume(row * slots, divby=aligned)
    return cute.make_tensor(pointer, cute.make_layout(slots))


@cute.jit
def load_slots(mX: cute.Tensor, row: Int32 | Int64, slots: cutlass.Constexpr[int]) -> cute.Tensor:
    values = cute.make_rmem_tensor(slots, Int32)
    cute.autovec_copy(slots_of(mX, row, slots), values)
    return values


@mlir_namedtuple
class IndexStrides(NamedTuple):
    """Elements from one entry of the block indices to the next."""

    token: Int64
    kv_head: Int64
    slot: Int64


@cute.jit
def load_indices(
    mIndices: cute.Tensor,
    strides: IndexStrides,
    row: Int32 | Int64,
    kv_heads: Int32,
    slots: cutlass.Constexpr[int],
    adjacent: cutlass.Constexpr[bool],
) -> cute.Tensor:
    """The block indices of a row, which is a (token, KV head) pair."""
    values = cute.make_rmem_tensor(slots, Int32)
    offset = row // kv_heads * strides.token + row % kv_heads * strides.kv_head
    if const_expr(adjacent):
        aligned = const_expr(4 if slots % 4 == 0 else 1)
        pointer = mIndices.iterator + cute.assume(offset, divby=aligned)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(slots)), values)
    else:
        for i in cutlass.range_constexpr(slots):
            values[i] = mIndices[offset + i * strides.slot]
    return values


@mlir_namedtuple
class _Tensors(NamedTuple):
    """The block indices, the token blocks, and the index. A kernel has those that it uses."""

    indices: cute.Tensor | None
    base: cute.Tensor | None
    limit: cute.Tensor | None
    first: cute.Tensor | None
    keys: cute.Tensor | None
    row: cute.Tensor | None
    pair_count: cute.Tensor
    position: cute.Tensor | None
    tokens: cute.Tensor | None
    items: cute.Tensor | None
    num_items: cute.Tensor | None

    def only(self, *names: str) -> "_Tensors":
        return self._replace(**{x: None for x in self._fields if x not in names})


@mlir_namedtuple
class _Sizes(NamedTuple):
    """``rows`` are (token, KV head) pairs."""

    rows: Int32
    kv_heads: Int32
    blocks: Int32
    chunks: Int32
    chunk_tokens: Int32


class InvertIndex:
    """Three kernels: count the pairs of each block, add up, write the list.

    In the first and the last a thread has the ``slots`` pairs of a token and KV head. With
    ``band``, pairs of :mod:`nsa.fused.kernels.selected_band` are left out. With ``adjacent``, the
    block indices of a token and KV head are neighbours, and loaded in vectors.
    """

    def __init__(self, slots: int, band: bool, adjacent: bool):
        self.slots = slots
        self.band = band
        self.adjacent = adjacent

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: IndexStrides,
        sizes: _Sizes,
        wave_units: Int32,
        wave_items: Int32,
        block_size: Int32,
        item_tokens: Int32,
        stream,
    ):
        grid = [cute.ceil_div(sizes.rows, _THREADS), 1, 1]
        count = tensors.only("indices", "base", "limit", "row", "pair_count", "position")
        self.count(count, strides, sizes, block_size).launch(
            grid=grid, block=[_THREADS, 1, 1], stream=stream
        )
        capacity = sizes.chunk_tokens * self.slots
        add_up = tensors.only("first", "keys", "row", "pair_count", "items", "num_items")
        self.add_up(add_up, sizes.blocks, capacity, wave_units, wave_items, item_tokens).launch(
            grid=[sizes.kv_heads * sizes.chunks, 1, 1], block=[_SCAN_THREADS, 1, 1], stream=stream
        )
        write = tensors.only("indices", "base", "pair_count", "position", "tokens")
        self.write(write, strides, sizes).launch(grid=grid, block=[_THREADS, 1, 1], stream=stream)

    @cute.kernel
    def count(self, tensors: _Tensors, strides: IndexStrides, sizes: _Sizes, block_size: Int32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        row = bidx * _THREADS + tidx
        if row < sizes.rows:
            token, unit = self._unit(row, sizes)
            selected = load_indices(
                *(tensors.indices, strides, row, sizes.kv_heads, self.slots, self.adjacent)
            )
            base, limit = tensors.base[token], tensors.limit[token]
            own = Int32(0)
            if const_expr(self.band):
                # A token of no segment may have no block.
                own = (token - tensors.row[cutlass.min(base, sizes.blocks - 1)]) // block_size
            ranks = cute.make_rmem_tensor(self.slots, Int32)
            for i in cutlass.range_constexpr(self.slots):
                block = selected[i]
                listed = block >= 0 and block < limit
                if const_expr(self.band):
                    listed = listed and block > 0 and (block < own - 1 or block > own)
                rank = Int32(-1)
                if listed:
                    counter = Int64(unit) * sizes.blocks + (base + block)
                    pointer = tensors.pair_count.iterator + counter
                    rank = cute.arch.atomic_add(pointer.llvm_ptr, Int32(1))
                ranks[i] = rank
            cute.autovec_copy(ranks, slots_of(tensors.position, row, self.slots))

    @cute.kernel
    def add_up(
        self,
        tensors: _Tensors,
        blocks: Int32,
        capacity: Int32,
        wave_units: Int32,
        wave_items: Int32,
        item_tokens: Int32,
    ):
        """Turn counts into where each block's pairs start in the unit; write the work items."""
        tidx, _, _ = cute.arch.thread_idx()
        unit, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        warps = _SCAN_THREADS // WARP
        smem = cutlass.memory.SmemAllocator()
        sTotals = smem.allocate_tensor(Int32, cute.make_layout((2, warps)), byte_alignment=16)
        sSlot = smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=16)

        wave = unit // wave_units
        start = Int32(0)
        for i in cutlass.range(cute.ceil_div(blocks, _SCAN_THREADS), unroll=1):
            block = i * _SCAN_THREADS + tidx
            counter = Int64(unit) * blocks + block
            count = Int32(0)
            if block < blocks:
                count = tensors.pair_count[counter]
            items = cute.ceil_div(count, item_tokens)
            pairs_through = warp_prefix_sum(count, lane)
            items_through = warp_prefix_sum(items, lane)
            if lane == WARP - 1:
                sTotals[0, warp] = pairs_through
                sTotals[1, warp] = items_through
            cute.arch.barrier()
            pairs_before, pairs_total = Int32(0), Int32(0)
            items_before, items_total = Int32(0), Int32(0)
            for w in cutlass.range_constexpr(warps):
                pairs_before += sTotals[0, w] if w < warp else Int32(0)
                items_before += sTotals[1, w] if w < warp else Int32(0)
                pairs_total += sTotals[0, w]
                items_total += sTotals[1, w]
            if tidx == 0:
                pointer = tensors.num_items.iterator + wave
                sSlot[0] = cute.arch.atomic_add(pointer.llvm_ptr, items_total)
            cute.arch.barrier()
            offset = start + pairs_before + pairs_through - count
            slot = wave * wave_items + sSlot[0] + items_before + items_through - items
            if block < blocks:
                tensors.pair_count[counter] = offset
            first, keys, first_row = Int32(0), Int32(0), Int32(0)
            if items > 0:
                first, keys, first_row = (
                    tensors.first[block],
                    tensors.keys[block],
                    tensors.row[block],
                )
            for item in cutlass.range(items, unroll=1):
                done = item * item_tokens
                field = Int64(slot + item) * ITEM_FIELDS
                tensors.items[field] = unit * capacity + offset + done
                tensors.items[field + 1] = cutlass.min(count - done, item_tokens)
                tensors.items[field + 2] = first
                tensors.items[field + 3] = keys
                tensors.items[field + 4] = first_row
                tensors.items[field + 5] = item
            start += pairs_total

    @cute.kernel
    def write(self, tensors: _Tensors, strides: IndexStrides, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        row = bidx * _THREADS + tidx
        if row < sizes.rows:
            token, unit = self._unit(row, sizes)
            selected = load_indices(
                *(tensors.indices, strides, row, sizes.kv_heads, self.slots, self.adjacent)
            )
            positions = load_slots(tensors.position, row, self.slots)
            first_counter = Int64(unit) * sizes.blocks + tensors.base[token]
            first = unit * (sizes.chunk_tokens * self.slots)
            for i in cutlass.range_constexpr(self.slots):
                if positions[i] >= 0:
                    positions[i] += first + tensors.pair_count[first_counter + selected[i]]
                    tensors.tokens[positions[i]] = token
            cute.autovec_copy(positions, slots_of(tensors.position, row, self.slots))

    @cute.jit
    def _unit(self, row: Int32, sizes: _Sizes) -> tuple[Int32, Int32]:
        token = row // sizes.kv_heads
        return token, token // sizes.chunk_tokens * sizes.kv_heads + row % sizes.kv_heads


@kept
def compile_invert_index(slots: int, band: bool, adjacent: bool) -> Callable:
    tensors = [fake_flat(Int32, alignment=16 if adjacent else 4)]
    tensors += [fake_flat(Int32, alignment=4) for _ in range(6)]
    tensors += [fake_flat(Int32)] + [fake_flat(Int32, alignment=4) for _ in range(3)]
    return compile_kernel(
        InvertIndex(slots, band, adjacent),
        *(_Tensors(*tensors), IndexStrides(*(Int64(1) for _ in range(3)))),
        _Sizes(*(Int32(1) for _ in range(5))),
        *(Int32(1) for _ in range(4)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for slots in (3, 16):
        for band, adjacent in ((False, True), (True, True), (False, False)):
            name = f"invert-index-{slots}{'-band' if band else ''}{'' if adjacent else '-strided'}"
            yield name, functools.partial(compile_invert_index, slots, band, adjacent)


def strided_indices(x: Tensor) -> tuple[Tensor, IndexStrides, bool]:
    """The memory of ``x (T, H_kv, slots)`` as one dimension, its strides, and whether rows of slots
    are adjacent and 16-byte aligned. Nothing is copied."""
    # Strides of a dimension of size 1 may be anything.
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    length = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
    token, kv_head, slot = strides
    whole = x.shape[2] % 4 != 0 or (token % 4 == 0 and kv_head % 4 == 0)
    adjacent = whole and is_aligned(x) and (slot == 1 or x.shape[2] == 1)
    return x.as_strided((length,), (1,)), IndexStrides(*strides), adjacent


@dataclass(frozen=True, eq=False)
class InvertedIndex:
    """The pairs of every block.

    Attributes:
        tokens: int32 ``(units * chunk_tokens * slots,)``, the list; entries of no item are
            undefined.
        position: int32 ``(T, H_kv, slots)``, where each pair stands in the list, -1 for no pair or
            one of the band.
        items: int32 ``(waves, wave_items, 6)``, see ``ITEM_FIELDS``.
        num_items: int32 ``(waves,)``, the items of each wave, at most ``wave_items``.
        chunks: chunks of the tokens.
        chunk_tokens: tokens of a chunk.
        wave_units: units of a wave, the last may have fewer.
    """

    tokens: Tensor
    position: Tensor
    items: Tensor
    num_items: Tensor
    chunks: int
    chunk_tokens: int
    wave_units: int

    @property
    def slots(self) -> int:
        return self.position.shape[2]

    @property
    def units(self) -> int:
        return self.position.shape[1] * self.chunks


def invert_index(
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    causal: bool,
    chunk_tokens: int,
    wave_units: int,
    tokens: int,
    band: bool = False,
) -> InvertedIndex:
    """Invert int32 ``block_indices (T, H_kv, slots)``; -1, and what a token cannot see, drop out.

    Args:
        block_indices: of any strides, not empty.
        blocks: those of the ``T`` tokens.
        block_size: tokens of a block.
        causal: whether a token sees only blocks that start at or before it.
        chunk_tokens: tokens of a chunk.
        wave_units: units of a wave, at most.
        tokens: pairs of a work item, at most.
        band: whether to leave out each token's pairs with the first block of its sequence, its own
            block and the one before.
    """
    total, kv_heads, slots = block_indices.shape
    chunks = -(-total // chunk_tokens)
    units = kv_heads * chunks
    wave_units = min(wave_units, units)
    waves = -(-units // wave_units)
    if units * chunk_tokens * slots >= 1 << 31:
        raise ValueError(f"{total} tokens x {kv_heads} KV heads x {slots} blocks exceed 2^31 pairs")
    num_blocks = blocks.first.shape[0]
    sizes = (block_size, causal, chunk_tokens, slots, tokens)
    bounds = item_bounds(total, blocks, *sizes)
    by_unit = [bound for bound in bounds for _ in range(kv_heads)]
    wave_items = max(sum(by_unit[w : w + wave_units]) for w in range(0, units, wave_units))

    empty = functools.partial(torch.empty, dtype=torch.int32, device=block_indices.device)
    zeros = torch.zeros(units * num_blocks + waves, dtype=torch.int32, device=block_indices.device)
    count, num_items = zeros[: units * num_blocks], zeros[units * num_blocks :]
    position, listed = empty(total * kv_heads * slots), empty(units * chunk_tokens * slots)
    items = empty(waves * wave_items * ITEM_FIELDS)
    given = (blocks.base, blocks.limit, blocks.first, blocks.keys, blocks.row)
    indices, strides, adjacent = strided_indices(block_indices)
    compile_invert_index(slots, band, adjacent)(
        _Tensors(indices, *given, count, position, listed, items, num_items),
        strides,
        _Sizes(total * kv_heads, kv_heads, num_blocks, chunks, chunk_tokens),
        *(wave_units, wave_items, block_size, tokens),
    )
    return InvertedIndex(
        listed,
        position.view(total, kv_heads, slots),
        items.view(waves, wave_items, ITEM_FIELDS),
        num_items,
        chunks,
        chunk_tokens,
        wave_units,
    )


def item_bounds(
    total: int,
    blocks: TokenBlocks,
    block_size: int,
    causal: bool,
    chunk_tokens: int,
    slots: int,
    tokens: int,
) -> list[int]:
    """An upper bound of the work items of each chunk of a KV head."""
    bounds, num_blocks = [], blocks.first.shape[0]
    for start in range(0, total, chunk_tokens):
        end = min(start + chunk_tokens, total)
        pairs = (end - start) * slots
        visible = num_blocks
        if causal:
            # A segment has at most one block that is not full before the chunk ends.
            visible = min(num_blocks, (end + blocks.earlier) // block_size + blocks.segments)
        bounds.append(min(visible, pairs) + pairs // tokens)
    return bounds
