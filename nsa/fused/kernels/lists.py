"""Block lists by query tile, and their transpose: query tiles by key block.

``ListKeyBlocks`` has a warp for each tile and head. ``ListQueryTiles`` is a counting sort of a
head's entries: a CTA keeps to a range of key blocks, whose counters fit in shared memory, and
passes over all of the head's lists twice. Its warps split the tiles into consecutive runs: the
first pass counts the entries of each block in each run, and with that every warp knows where its
tiles go in the second pass. A warp takes a list at a time, whose entries are distinct, so that no
two lanes meet at a counter and tiles ascend in each list, the same each time.
"""

import functools
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.vectors import check_tensor, fake_flat

_WARPS = 8
_THREADS = _WARPS * WARP
# Key blocks of a CTA of the transpose: 32 KB of counters, of which six CTAs share an SM.
_RANGE = 1024
# Lists whose loads a warp issues together, before it uses the first.
_LISTS_IN_FLIGHT = 8


class ListKeyBlocks:
    """``parts`` key blocks for each listed block; with ``has_full`` full ones in their own list."""

    def __init__(self, parts: int, has_full: bool):
        self.parts = parts
        self.has_full = has_full

    @cute.jit
    def __call__(
        self,
        mIndices: cute.Tensor,
        mFirst: cute.Tensor,
        mNumBlocks: cute.Tensor,
        mNumFull: cute.Tensor | None,
        mPartialCount: cute.Tensor,
        mPartialIndex: cute.Tensor,
        mFullCount: cute.Tensor | None,
        mFullIndex: cute.Tensor | None,
        batch: Int32,
        tiles: Int32,
        heads: Int32,
        listed: Int32,
        width: Int32,
        entry_blocks: Int32,
        stream,
    ):
        inputs = (mIndices, mFirst, mNumBlocks, mNumFull)
        outputs = (mPartialCount, mPartialIndex, mFullCount, mFullIndex)
        sizes = (batch, tiles, heads, listed, width, entry_blocks)
        self.kernel(*inputs, *outputs, *sizes).launch(
            grid=[cute.ceil_div(batch * tiles * heads, _WARPS), 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mIndices: cute.Tensor,
        mFirst: cute.Tensor,
        mNumBlocks: cute.Tensor,
        mNumFull: cute.Tensor | None,
        mPartialCount: cute.Tensor,
        mPartialIndex: cute.Tensor,
        mFullCount: cute.Tensor | None,
        mFullIndex: cute.Tensor | None,
        batch: Int32,
        tiles: Int32,
        heads: Int32,
        listed: Int32,
        width: Int32,
        entry_blocks: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        lane = tidx % WARP
        # Neighbouring warps take neighbouring heads, whose indices are neighbours in memory.
        source = bidx * _WARPS + tidx // WARP
        if source < batch * tiles * heads:
            row, head = source // heads, source % heads
            tile = row % tiles
            first = mFirst[tile] + row // tiles * entry_blocks
            num_blocks = mNumBlocks[tile]
            num_full = Int32(0)
            if const_expr(self.has_full):
                num_full = mNumFull[tile]
            target = head * (batch * tiles) + row
            num_partial, num_whole = Int32(0), Int32(0)
            for step in cutlass.range(cute.ceil_div(width, WARP), unroll=1):
                entry = step * WARP + lane
                block = Int32(-1)
                if entry < width:
                    index = mIndices[Int64(source) * listed + entry // self.parts]
                    if index >= 0:
                        block = index * self.parts + entry % self.parts
                real = block >= 0 and block < num_blocks
                whole = real and block < num_full
                partial = real and block >= num_full
                place, added = self._place(partial, lane)
                if partial:
                    mPartialIndex[Int64(target) * width + num_partial + place] = first + block
                num_partial = num_partial + added
                if const_expr(self.has_full):
                    place, added = self._place(whole, lane)
                    if whole:
                        mFullIndex[Int64(target) * width + num_whole + place] = first + block
                    num_whole = num_whole + added
            if lane == 0:
                mPartialCount[target] = num_partial
                if const_expr(self.has_full):
                    mFullCount[target] = num_whole

    @cute.jit
    def _place(self, chosen: Boolean, lane: Int32) -> tuple[Int32, Int32]:
        """How many lanes before this one chose, and how many of the warp did."""
        votes = cute.arch.vote_ballot_sync(chosen)
        return cute.arch.popc(votes & ((Int32(1) << lane) - 1)), cute.arch.popc(votes)


class ListQueryTiles:
    """Counts each key block's query tiles, and with ``fill`` lists them."""

    def __init__(self, fill: bool):
        self.fill = fill

    @cute.jit
    def __call__(
        self,
        mCount: cute.Tensor,
        mIndex: cute.Tensor,
        mTileCount: cute.Tensor,
        mTileIndex: cute.Tensor | None,
        heads: Int32,
        tiles: Int32,
        width: Int32,
        blocks: Int32,
        tile_width: Int32,
        stream,
    ):
        ranges = cute.ceil_div(blocks, _RANGE)
        sizes = (tiles, width, blocks, tile_width, ranges)
        self.kernel(mCount, mIndex, mTileCount, mTileIndex, *sizes).launch(
            grid=[ranges * heads, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mCount: cute.Tensor,
        mIndex: cute.Tensor,
        mTileCount: cute.Tensor,
        mTileIndex: cute.Tensor | None,
        tiles: Int32,
        width: Int32,
        blocks: Int32,
        tile_width: Int32,
        ranges: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        head = bidx // ranges
        low = bidx % ranges * _RANGE
        high = cutlass.min(low + _RANGE, blocks)

        smem = cutlass.memory.SmemAllocator()
        layout = cute.make_layout((_WARPS, _RANGE), stride=(_RANGE, 1))
        sNext = smem.allocate_tensor(Int32, layout, byte_alignment=16)
        for local in cutlass.range(tidx, _RANGE, _THREADS):
            for run in cutlass.range_constexpr(_WARPS):
                sNext[run, local] = Int32(0)
        cute.arch.barrier()
        sizes = (head, tiles, width, low, high)
        self._pass(mCount, mIndex, None, sNext, *sizes, blocks, tile_width)
        cute.arch.barrier()
        # From the entries of each run to where they start in the list.
        for block in cutlass.range(low + tidx, high, _THREADS):
            total = Int32(0)
            for run in cutlass.range_constexpr(_WARPS):
                added = sNext[run, block - low]
                sNext[run, block - low] = total
                total = total + added
            if const_expr(self.fill):
                # Longer lists come only of a caller's blocks that repeat, which nothing checks
                # while a CUDA graph is captured: they must not lead out of the index.
                total = cutlass.min(total, tile_width)
            mTileCount[head * blocks + block] = total
        if const_expr(self.fill):
            cute.arch.barrier()
            self._pass(mCount, mIndex, mTileIndex, sNext, *sizes, blocks, tile_width)

    @cute.jit
    def _pass(
        self,
        mCount: cute.Tensor,
        mIndex: cute.Tensor,
        mTileIndex: cute.Tensor | None,
        sNext: cute.Tensor,
        head: Int32,
        tiles: Int32,
        width: Int32,
        low: Int32,
        high: Int32,
        blocks: Int32,
        tile_width: Int32,
    ):
        """This warp's run of tiles in order; lists its tiles unless ``mTileIndex`` is None."""
        tidx, _, _ = cute.arch.thread_idx()
        run, lane = tidx // WARP, tidx % WARP
        tiles_per_run = cute.ceil_div(tiles, _WARPS)
        first = run * tiles_per_run
        tiles_of_run = cutlass.max(cutlass.min(tiles_per_run, tiles - first), 0)
        # A list of more than 32 entries takes several steps of the warp.
        chunks = cute.ceil_div(width, WARP)
        steps = tiles_of_run * chunks
        for group in cutlass.range(cute.ceil_div(steps, _LISTS_IN_FLIGHT), unroll=1):
            loaded = []
            for u in cutlass.range_constexpr(_LISTS_IN_FLIGHT):
                step = group * _LISTS_IN_FLIGHT + u
                tile = first + step // chunks
                entry = step % chunks * WARP + lane
                # What is past the end is read inside it and left out: a load under a condition
                # would wait.
                source = Int64(head) * tiles + cutlass.min(tile, tiles - 1)
                count = mCount[source]
                block = mIndex[source * width + cutlass.min(entry, width - 1)]
                listed = step < steps and entry < count
                wanted = listed and block >= low and block < high
                loaded.append((tile, block, wanted))
            for u in cutlass.range_constexpr(_LISTS_IN_FLIGHT):
                tile, block, wanted = loaded[u]
                if wanted:
                    place = sNext[run, block - low]
                    sNext[run, block - low] = place + 1
                    if const_expr(mTileIndex is not None):
                        fits = place < tile_width
                        if fits:
                            target = (Int64(head) * blocks + block) * tile_width + place
                            mTileIndex[target] = tile
                # Another lane may go on from this counter.
                cute.arch.sync_warp()


@kept
def compile_list_key_blocks(parts: int, has_full: bool) -> Callable:
    """The compiled kernel for blocks of ``parts`` key blocks."""
    wanted = (True, True, True, has_full, True, True, has_full, has_full)
    return compile_kernel(
        ListKeyBlocks(parts, has_full),
        *map(_fake_int32, wanted),
        *(Int32(1) for _ in range(6)),
    )


@kept
def compile_list_query_tiles(fill: bool) -> Callable:
    """The compiled kernel that counts query tiles, and with ``fill`` lists them."""
    return compile_kernel(
        ListQueryTiles(fill),
        *map(_fake_int32, (True, True, True, fill)),
        *(Int32(1) for _ in range(5)),
    )


def _fake_int32(wanted: bool = True):
    return fake_flat(Int32 if wanted else None, alignment=4)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for parts in (1, 2, 3):
        for has_full in (False, True):
            name = f"list-key-blocks-{parts}{'-full' if has_full else ''}"
            yield name, functools.partial(compile_list_key_blocks, parts, has_full)
    for fill in (False, True):
        name = "list-query-tiles" if fill else "count-query-tiles"
        yield name, functools.partial(compile_list_query_tiles, fill)


def list_key_blocks(
    indices: Tensor,
    first: Tensor,
    num_blocks: Tensor,
    num_full: Tensor | None,
    parts: int,
    entry_blocks: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cut each listed block into key blocks of the row, and drop those past its sequence.

    Args:
        indices: int32 ``(B, tiles, H, n)``, blocks in the tile's sequence; negative ones are
            dropped. Copied if it is not contiguous.
        first: int32 ``(tiles,)``, where the key blocks of the tile's sequence start in the row of
            an entry of the batch.
        num_blocks: int32 ``(tiles,)``, how many there are; 0 for a tile of no sequence.
        num_full: int32 ``(tiles,)`` or None, how many of them, from the first, are full.
        parts: key blocks in a block.
        entry_blocks: key blocks in the row of an entry of the batch.

    Returns:
        partial_count: int32 ``(1, H, B * tiles)``; full blocks are in the other list.
        partial_index: int32 ``(1, H, B * tiles, width)``, in the order of ``indices``, with ``width
            = min(n * parts, B * entry_blocks)``: the most that can be listed. What is past the
            count is not written.
        full_count: like ``partial_count``; None without ``num_full``.
        full_index: like ``partial_index``; None without ``num_full``.
    """
    _check_lists("indices", indices)
    batch, num_tiles, num_heads, listed = indices.shape
    for name, x in (("first", first), ("num_blocks", num_blocks), ("num_full", num_full)):
        if x is not None:
            check_tensor(name, x, (num_tiles,), torch.int32, indices.device)
    if parts < 1:
        raise ValueError(f"parts is {parts}; it must be at least 1")
    width = min(listed * parts, batch * entry_blocks)
    shape = (1, num_heads, batch * num_tiles)
    has_full = num_full is not None
    lists = [indices.new_empty(x) for x in (shape, (*shape, width)) * (1 + has_full)]
    if lists[1].numel() == 0:
        lists = [x.zero_() for x in lists]
    else:
        vectors = (first, num_blocks, num_full)
        optional = lists if has_full else (*lists, None, None)
        compile_list_key_blocks(parts, has_full)(
            *map(_flat, (indices, *vectors, *optional)),
            *(batch, num_tiles, num_heads, listed, width, entry_blocks),
        )
    return tuple(lists) if has_full else (*lists, None, None)


def count_query_tiles(count: Tensor, index: Tensor, num_blocks: int) -> Tensor:
    """The counts of :func:`list_query_tiles` alone: int32 ``(1, H, num_blocks)``."""
    return _list_query_tiles(count, index, num_blocks, None)[0]


def list_query_tiles(
    count: Tensor, index: Tensor, num_blocks: int, width: int
) -> tuple[Tensor, Tensor]:
    """Transpose lists of key blocks into lists of query tiles; the same bits each time.

    Args:
        count: int32 ``(1, H, tiles)``.
        index: int32 ``(1, H, tiles, W)``, key blocks below ``num_blocks`` in any order, that do not
            repeat in a list. What is past the count is not used.
        num_blocks: key blocks.
        width: at least the longest of the new lists. Not checked.

    Returns:
        count: int32 ``(1, H, num_blocks)``.
        index: int32 ``(1, H, num_blocks, width)``, query tiles in ascending order. What is past
            the count is not written.
    """
    return _list_query_tiles(count, index, num_blocks, width)


def _list_query_tiles(
    count: Tensor, index: Tensor, num_blocks: int, width: int | None
) -> tuple[Tensor, Tensor | None]:
    _check_lists("index", index)
    _, num_heads, num_tiles, listed = index.shape
    check_tensor("index", index, (1, *index.shape[1:]), torch.int32, index.device)
    check_tensor("count", count, (1, num_heads, num_tiles), torch.int32, index.device)
    tile_count = index.new_empty(1, num_heads, num_blocks)
    tile_index = None if width is None else index.new_empty(1, num_heads, num_blocks, width)
    if index.numel() == 0 or tile_count.numel() == 0 or width == 0:
        return tile_count.zero_(), tile_index
    compile_list_query_tiles(width is not None)(
        *map(_flat, (count, index, tile_count, tile_index)),
        *(num_heads, num_tiles, listed, num_blocks, width or 0),
    )
    return tile_count, tile_index


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous().view(-1)


def _check_lists(name: str, x: Tensor) -> None:
    if x.dtype != torch.int32 or x.ndim != 4 or not x.is_cuda:
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; it must be {torch.int32} with "
            "four dimensions, on a GPU"
        )
