"""The tiles of decoding's last kernel: of the window, then of a list of blocks, from pages."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from nsa.fused.decode_inputs import MAX_LISTED, TILE_KEYS
from nsa.fused.kernels.decode_pages import PagedTensors
from nsa.fused.kernels.decode_tiles import TileAttention

MOST_TILES = MAX_LISTED * 128 // TILE_KEYS
"""Tiles whose places a CTA finds together: those of the longest list of blocks of 128."""

# Behind all tokens, with room for keys after it.
_NO_POSITION = 1 << 30


class KeyRange(NamedTuple):
    """Keys of a sequence and KV head from position ``first`` to ``last``."""

    sequence: Int32
    kv_head: Int32
    first: Int32
    last: Int32


class ListTiles:
    """Tiles of 64 keys; with ``rings`` the window has keys of its own.

    The window's begin at multiples of 64, so that each lies in one page, as those of a block do.
    """

    def __init__(self, attention: TileAttention, select_size: int, rings: bool):
        self.attention = attention
        self.select_size = select_size
        self.rings = rings
        # Else a tile has keys of several blocks.
        self.whole = select_size >= TILE_KEYS

    @cute.jit
    def key_position(
        self, listed: cute.Tensor, turn: Int32, window_tile: Int32, valid: Int32, key: Int32
    ) -> Int32:
        """The position of a key of the window, then of the list; none sees it past the list."""
        position = window_tile * TILE_KEYS + key
        if turn == 1:
            # Unsigned, because // of signed numbers takes more instructions.
            entry = Int32(Uint32(key) // Uint32(self.select_size))
            block = listed[cutlass.min(entry, MAX_LISTED - 1)]
            position = block * self.select_size + Int32(Uint32(key) % Uint32(self.select_size))
            position = position if entry < valid else Int32(_NO_POSITION)
        return position

    @cute.jit
    def find(
        self, pages: PagedTensors, rings: PagedTensors | None, sTiles, keys: KeyRange, turn: Int32,
        key_position, tidx: Int32, first_tile: Int32, count: Int32,
    ):  # fmt: skip
        """Find where the first keys of ``count`` tiles are, all of them together.

        So that no load waits for the page table. ``sTiles`` are pages and rows of tiles.
        """
        if const_expr(self.whole):
            for i in cutlass.range(
                tidx, cutlass.min(count, MOST_TILES), self.attention.threads, unroll=1
            ):
                page, row = self._first_key(pages, rings, keys, turn, key_position, first_tile + i)
                sTiles[0][i] = page
                sTiles[1][i] = row
            cute.arch.barrier()

    @cute.jit
    def load(
        self, pages: PagedTensors, rings: PagedTensors | None, sK: cute.Tensor, sV: cute.Tensor,
        sTiles, keys: KeyRange, turn: Int32, key_position, tidx: Int32, first_tile: Int32,
        i: Int32, stage: Int32,
    ):  # fmt: skip
        """Start to copy tile ``first_tile + i``."""
        load = functools.partial(
            self._load, pages, rings, sK, sV, sTiles, keys, turn, key_position, tidx, first_tile,
            i, stage,
        )  # fmt: skip
        if const_expr(self.rings):
            # The window has keys of its own: pages for each sequence, of which no table is needed.
            if turn == 0:
                load(rings, True)
            else:
                load(pages, False)
        else:
            load(pages, False)

    @cute.jit
    def _load(
        self, pages: PagedTensors, rings: PagedTensors | None, sK: cute.Tensor, sV: cute.Tensor,
        sTiles, keys: KeyRange, turn: Int32, key_position, tidx: Int32, first_tile: Int32,
        i: Int32, stage: Int32, source: PagedTensors, ring: cutlass.Constexpr[bool],
    ):  # fmt: skip
        first_key = (first_tile + i) * TILE_KEYS
        place = functools.partial(self._place_of, source, keys, key_position, ring, first_key)
        if const_expr(self.whole):
            seen = cutlass.min(i, MOST_TILES - 1)
            page, row = sTiles[0][seen], sTiles[1][seen]
            if i >= MOST_TILES:
                page, row = self._first_key(pages, rings, keys, turn, key_position, first_tile + i)
            place = functools.partial(self._place_after, keys, key_position(first_key), page, row)
        self.attention.load_tile(
            source, sK, sV, place, keys.kv_head, self.whole, False, tidx, stage
        )

    @cute.jit
    def _first_key(
        self, pages: PagedTensors, rings: PagedTensors | None, keys: KeyRange, turn: Int32,
        key_position, tile: Int32,
    ) -> tuple[Int32, Int32]:  # fmt: skip
        """Page and row of a tile's first key. The last tile may have no key of the list."""
        seen = Uint32(cutlass.min(key_position(tile * TILE_KEYS), keys.last))
        rows = pages.page_rows
        if const_expr(self.rings):
            rows = rings.page_rows if turn == 0 else rows
        index, row = Int32(seen // Uint32(rows)), Int32(seen % Uint32(rows))
        page = keys.sequence
        if const_expr(self.rings):
            if turn == 1:
                page = self._page(pages, keys, False, index)
        else:
            page = self._page(pages, keys, False, index)
        return page, row

    def _place_after(self, keys: KeyRange, first: Int32, page: Int32, row: Int32, key: Int32):
        """The place of a key of a tile whose first is at ``first``, in a row of a page."""
        position = first + key
        return page, row + key, (position >= keys.first) & (position <= keys.last)

    @cute.jit
    def _place_of(
        self, pages: PagedTensors, keys: KeyRange, key_position, ring: cutlass.Constexpr[bool],
        first_key: Int32, key: Int32,
    ):  # fmt: skip
        position = key_position(first_key + key)
        seen = Uint32(cutlass.min(position, keys.last))
        page = self._page(pages, keys, ring, Int32(seen // Uint32(pages.page_rows)))
        row = Int32(seen % Uint32(pages.page_rows))
        return page, row, position >= keys.first and position <= keys.last

    @cute.jit
    def _page(
        self, pages: PagedTensors, keys: KeyRange, ring: cutlass.Constexpr[bool], index: Int32
    ) -> Int32:
        page = keys.sequence
        if const_expr(not ring):
            page = pages.table[Int64(keys.sequence) * pages.max_pages + index]
        return page
