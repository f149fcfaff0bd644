"""The tiles of decoding's last kernel: of the window, then of a list of blocks, from pages."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from nsa.fused.decode_inputs import MAX_LISTED, TILE_KEYS
from nsa.fused.kernels.decode_tiles import PagedTensors, TileAttention

# Behind all tokens, with room for keys after it.
_NO_POSITION = 1 << 30


class ListPlace(NamedTuple):
    """The list of a cluster."""

    sequence: Int32
    kv_head: Int32
    position: Int32


class ListTiles:
    """Tiles of 64 keys; with ``rings`` the window has keys of its own."""

    def __init__(self, attention: TileAttention, select_size: int, rings: bool):
        self.attention = attention
        self.select_size = select_size
        self.rings = rings

    @cute.jit
    def key_position(
        self, listed: cute.Tensor, turn: Int32, window_start: Int32, valid: Int32, key: Int32
    ) -> Int32:
        """The position of a key of the window, then of the list; none sees it past the list."""
        position = window_start + key
        if turn == 1:
            # Unsigned, because // of signed numbers takes more instructions.
            entry = Int32(Uint32(key) // Uint32(self.select_size))
            block = listed[cutlass.min(entry, MAX_LISTED - 1)]
            position = block * self.select_size + Int32(Uint32(key) % Uint32(self.select_size))
            position = position if entry < valid else Int32(_NO_POSITION)
        return position

    @cute.jit
    def load(
        self, pages: PagedTensors, rings: PagedTensors | None, sK: cute.Tensor, sV: cute.Tensor,
        place: ListPlace, turn: Int32, key_position, tidx: Int32, tile: Int32, stage: Int32,
    ):  # fmt: skip
        """Start to copy a tile."""
        first_key = tile * TILE_KEYS
        if const_expr(self.rings):
            # The window has keys of its own: pages for each sequence, of which no table is needed.
            if turn == 0:
                key_place = self._places(rings, place, key_position, True, first_key)
                self.attention.load_tile(rings, sK, sV, key_place, place.kv_head, tidx, stage)
            else:
                key_place = self._places(pages, place, key_position, False, first_key)
                self.attention.load_tile(pages, sK, sV, key_place, place.kv_head, tidx, stage)
        else:
            key_place = self._places(pages, place, key_position, False, first_key)
            self.attention.load_tile(pages, sK, sV, key_place, place.kv_head, tidx, stage)

    def _places(
        self, pages: PagedTensors, place: ListPlace, key_position, ring: bool, first_key: Int32
    ):
        """Where the keys of a tile are, as a function of the key in it."""
        if self.select_size < TILE_KEYS:
            # A tile has keys of several blocks.
            return functools.partial(self._place_of, pages, place, key_position, ring, first_key)
        first = cutlass.min(key_position(first_key), place.position)
        # Unsigned, because // of signed numbers takes more instructions.
        page = Int32(Uint32(first) // Uint32(pages.page_rows))
        row = Int32(Uint32(first) % Uint32(pages.page_rows))
        return functools.partial(self._place_after, pages, place, ring, first, page, row)

    @cute.jit
    def _place_of(
        self, pages: PagedTensors, place: ListPlace, key_position, ring: cutlass.Constexpr[bool],
        first_key: Int32, key: Int32,
    ):  # fmt: skip
        position = key_position(first_key + key)
        seen = Uint32(cutlass.min(position, place.position))
        page = Int32(seen // Uint32(pages.page_rows))
        row = Int32(seen % Uint32(pages.page_rows))
        return self._page(pages, place, ring, page), row, position <= place.position

    @cute.jit
    def _place_after(
        self, pages: PagedTensors, place: ListPlace, ring: cutlass.Constexpr[bool], first: Int32,
        page: Int32, row: Int32, key: Int32,
    ):  # fmt: skip
        """The place of a key of a tile from ``row`` of a page, which may end in the next one."""
        row += cutlass.min(key, place.position - first)
        ends = row >= pages.page_rows
        page = page + 1 if ends else page
        row = row - pages.page_rows if ends else row
        return self._page(pages, place, ring, page), row, first + key <= place.position

    @cute.jit
    def _page(
        self, pages: PagedTensors, place: ListPlace, ring: cutlass.Constexpr[bool], index: Int32
    ) -> Int32:
        page = place.sequence
        if const_expr(not ring):
            page = pages.table[Int64(place.sequence) * pages.max_pages + index]
        return page
