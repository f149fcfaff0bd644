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
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import check_tensor, fake_flat

_WARPS = 8
_THREADS = _WARPS * WARP
# Key blocks of a CTA of the transpose: 32 KB of counters, of which six CTAs share an SM.
_RANGE = 1024
# Lists whose loads a warp issues together, before it uses the first.
_LISTS_IN_FLIGHT = 8


@mlir_namedtuple
class _KeyBlockTensors(NamedTuple):
    """What :func:`list_key_blocks` takes and returns."""

    indices: cute.Tensor
    first: cute.Tensor
    num_blocks: cute.Tensor
    num_full: cute.Tensor | None
    partial_count: cute.Tensor
    partial_index: cute.Tensor
    full_count: cute.Tensor | None
    full_index: cute.Tensor | None


@mlir_namedtuple
class _KeyBlockSizes(NamedTuple):
    """``listed`` blocks of a tile and head, ``width`` key blocks of a list."""

    batch: Int32
    tiles: Int32
    heads: Int32
    listed: Int32
    width: Int32
    entry_blocks: Int32


class ListKeyBlocks:
    """``parts`` key blocks for each listed block; with ``has_full`` full ones in their own list."""

    def __init__(self, parts: int, has_full: bool):
        self.parts = parts
        self.has_full = has_full

    @cute.jit
    def __call__(self, tensors: _KeyBlockTensors, sizes: _KeyBlockSizes, stream):
        rows = sizes.batch * sizes.tiles * sizes.heads
        self.kernel(tensors, sizes).launch(
            grid=[cute.ceil_div(rows, _WARPS), 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: _KeyBlockTensors, sizes: _KeyBlockSizes):
        batch, tiles, heads, listed, width, entry_blocks = sizes
        mPartialIndex, mFullIndex = tensors.partial_index, tensors.full_index
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        lane = tidx % WARP
        # Neighbouring warps take neighbouring heads, whose indices are neighbours in memory.
        source = bidx * _WARPS + tidx // WARP
        if source < batch * tiles * heads:
            row, head = source // heads, source % heads
            tile = row % tiles
            first = tensors.first[tile] + row // tiles * entry_blocks
            num_blocks = tensors.num_blocks[tile]
            num_full = Int32(0)
            if const_expr(self.has_full):
                num_full = tensors.num_full[tile]
            target = head * (batch * tiles) + row
            num_partial, num_whole = Int32(0), Int32(0)
            for step in cutlass.range(cute.ceil_div(width, WARP), unroll=1):
                entry = step * WARP + lane
                block = Int32(-1)
                if entry < width:
                    index = tensors.indices[Int64(source) * listed + entry // self.parts]
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
                tensors.partial_count[target] = num_partial
                if const_expr(self.has_full):
                    tensors.full_count[target] = num_whole

    @cute.jit
    def _place(self, chosen: Boolean, lane: Int32) -> tuple[Int32, Int32]:
        """How many lanes before this one chose, and how many of the warp did."""
        votes = cute.arch.vote_ballot_sync(chosen)
        return cute.arch.popc(votes & ((Int32(1) << lane) - 1)), cute.arch.popc(votes)


@mlir_namedtuple
class _QueryTileTensors(NamedTuple):
    """What :func:`list_query_tiles` takes and returns; ``rank`` is of :func:`rank_query_tiles`."""

    block_count: cute.Tensor
    block_index: cute.Tensor
    tile_count: cute.Tensor | None
    tile_index: cute.Tensor | None
    rank: cute.Tensor | None


@mlir_namedtuple
class _QueryTileSizes(NamedTuple):
    """``width`` entries of a list of key blocks, ``tile_width`` of one of query tiles."""

    tiles: Int32
    width: Int32
    blocks: Int32
    tile_width: Int32


class ListQueryTiles:
    """Counts each key block's query tiles and with ``fill`` lists them, or only ``ranks`` them."""

    def __init__(self, fill: bool, ranks: bool = False):
        self.fill = fill
        self.ranks = ranks

    @cute.jit
    def __call__(self, tensors: _QueryTileTensors, heads: Int32, sizes: _QueryTileSizes, stream):
        ranges = cute.ceil_div(sizes.blocks, _RANGE)
        self.kernel(tensors, sizes, ranges).launch(
            grid=[ranges * heads, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: _QueryTileTensors, sizes: _QueryTileSizes, ranges: Int32):
        blocks = sizes.blocks
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
        counted = tensors._replace(tile_index=None, rank=None)
        self._pass(counted, sizes, sNext, head, low, high)
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
                total = cutlass.min(total, sizes.tile_width)
            if const_expr(not self.ranks):
                tensors.tile_count[head * blocks + block] = total
        if const_expr(self.fill or self.ranks):
            cute.arch.barrier()
            self._pass(tensors, sizes, sNext, head, low, high)

    @cute.jit
    def _count(self, sNext: cute.Tensor, run: Int32, local: Int32) -> Int32:
        """The counter of a block, which it adds 1 to."""
        place = Int32(0)
        if const_expr(self.ranks):
            # A caller's blocks may repeat. Each has a turn then, for which CTAs wait.
            pointer = sNext.iterator + cute.crd2idx((run, local), sNext.layout)
            place = cute.arch.atomic_add(pointer.llvm_ptr, Int32(1))
        else:
            place = sNext[run, local]
            sNext[run, local] = place + 1
        return place

    @cute.jit
    def _pass(
        self,
        tensors: _QueryTileTensors,
        sizes: _QueryTileSizes,
        sNext: cute.Tensor,
        head: Int32,
        low: Int32,
        high: Int32,
    ):
        """This warp's run of tiles in order; lists its tiles where it is given an index."""
        tiles, width, blocks, tile_width = sizes
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
                count = tensors.block_count[source]
                block = tensors.block_index[source * width + cutlass.min(entry, width - 1)]
                listed = step < steps and entry < count
                wanted = listed and block >= low and block < high
                loaded.append((tile, block, wanted, source * width + entry))
            for u in cutlass.range_constexpr(_LISTS_IN_FLIGHT):
                tile, block, wanted, own = loaded[u]
                if wanted:
                    place = self._count(sNext, run, block - low)
                    if const_expr(tensors.rank is not None):
                        tensors.rank[own] = place
                    if const_expr(tensors.tile_index is not None):
                        fits = place < tile_width
                        if fits:
                            target = (Int64(head) * blocks + block) * tile_width + place
                            tensors.tile_index[target] = tile
                # Another lane may go on from this counter.
                cute.arch.sync_warp()


@kept
def compile_list_key_blocks(parts: int, has_full: bool) -> Callable:
    """The compiled kernel for blocks of ``parts`` key blocks."""
    wanted = (True, True, True, has_full, True, True, has_full, has_full)
    return compile_kernel(
        ListKeyBlocks(parts, has_full),
        _KeyBlockTensors(*map(_fake_int32, wanted)),
        _KeyBlockSizes(*(Int32(1) for _ in range(6))),
    )


@kept
def compile_list_query_tiles(fill: bool, ranks: bool = False) -> Callable:
    """The compiled kernel that counts query tiles and with ``fill`` lists them, or ``ranks``."""
    return compile_kernel(
        ListQueryTiles(fill, ranks),
        _QueryTileTensors(*map(_fake_int32, (True, True, not ranks, fill, ranks))),
        Int32(1),
        _QueryTileSizes(*(Int32(1) for _ in range(4))),
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
    yield "rank-query-tiles", functools.partial(compile_list_query_tiles, False, True)


def list_key_blocks(
    indices: Tensor,
    first: Tensor,
    num_blocks: Tensor,
    num_full: Tensor | None,
    parts: int,
    entry_blocks: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`nsa.fused.kernel_calls.list_key_blocks`."""
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
            _KeyBlockTensors(*map(_flat, (indices, *vectors, *optional))),
            _KeyBlockSizes(batch, num_tiles, num_heads, listed, width, entry_blocks),
        )
    return tuple(lists) if has_full else (*lists, None, None)


def count_query_tiles(count: Tensor, index: Tensor, num_blocks: int) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.count_query_tiles`."""
    return _list_query_tiles(count, index, num_blocks, None)[0]


def list_query_tiles(
    count: Tensor, index: Tensor, num_blocks: int, width: int
) -> tuple[Tensor, Tensor]:
    """See :func:`nsa.fused.kernel_calls.list_query_tiles`."""
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
        _QueryTileTensors(*map(_flat, (count, index, tile_count, tile_index, None))),
        num_heads,
        _QueryTileSizes(num_tiles, listed, num_blocks, width or 0),
    )
    return tile_count, tile_index


def rank_query_tiles(count: Tensor, index: Tensor, num_blocks: int) -> Tensor:
    """How many earlier tiles of the head list the block that an entry of ``index`` names.

    Args:
        count: int32 ``(1, H, tiles)``, the entries of each list.
        index: int32 ``(1, H, tiles, width)``, the key blocks that it names.
        num_blocks: number of key blocks.

    Returns:
        int32 like ``index``; past the count undefined.
    """
    _check_lists("index", index)
    _, num_heads, num_tiles, listed = index.shape
    check_tensor("count", count, (1, num_heads, num_tiles), torch.int32, index.device)
    rank = torch.empty_like(index, memory_format=torch.contiguous_format)
    if index.numel() and num_blocks:
        compile_list_query_tiles(False, True)(
            _QueryTileTensors(*map(_flat, (count, index, None, None, rank))),
            num_heads,
            _QueryTileSizes(num_tiles, listed, num_blocks, 0),
        )
    return rank


def _flat(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return x.contiguous() if x.ndim == 1 else x.contiguous().view(-1)


def _check_lists(name: str, x: Tensor) -> None:
    if x.dtype != torch.int32 or x.ndim != 4 or not x.is_cuda:
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; it must be {torch.int32} with "
            "four dimensions, on a GPU"
        )
