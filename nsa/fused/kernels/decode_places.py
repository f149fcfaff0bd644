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
    def load(
        self, pages: PagedTensors, rings: PagedTensors | None, sK: cute.Tensor, sV: cute.Tensor,
        keys: KeyRange, turn: Int32, key_position, tidx: Int32, first_tile: Int32, i: Int32,
        stage: Int32,
    ):  # fmt: skip
        """Start to copy tile ``first_tile + i``."""
        load = functools.partial(
            self._load, sK, sV, keys, key_position, tidx, (first_tile + i) * TILE_KEYS, stage
        )
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
        self, sK: cute.Tensor, sV: cute.Tensor, keys: KeyRange, key_position, tidx: Int32,
        first_key: Int32, stage: Int32, pages: PagedTensors, ring: cutlass.Constexpr[bool],
    ):  # fmt: skip
        # A tile of smaller blocks has keys of several.
        whole = const_expr(self.select_size >= TILE_KEYS)
        place = functools.partial(self._place_of, pages, keys, key_position, ring, first_key)
        if const_expr(whole):
            first = key_position(first_key)
            # The last tile may have no key of the list.
            seen = Uint32(cutlass.min(first, keys.last))
            page = self._page(pages, keys, ring, Int32(seen // Uint32(pages.page_rows)))
            row = Int32(seen % Uint32(pages.page_rows))
            place = functools.partial(self._place_after, keys, first, page, row)
        self.attention.load_tile(pages, sK, sV, place, keys.kv_head, whole, False, tidx, stage)

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
