"""The tiles of decoding's last kernel, from pages: some of the window, then some of a list."""

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
    """A CTA's tiles of 64 keys; with ``rings`` the window has keys of its own."""

    def __init__(self, attention: TileAttention, select_size: int, rings: bool):
        self.attention = attention
        self.select_size = select_size
        self.rings = rings

    @cute.jit
    def key_position(
        self, listed, window_start: Int32, window_begin: Int32, window_count: Int32,
        first_tile: Int32, valid: Int32, i: Int32, key: Int32,
    ) -> Int32:  # fmt: skip
        """The position of a key of this CTA's tile ``i``; none sees it where there is no key."""
        position = window_start + (window_begin + i) * TILE_KEYS + key
        if i >= window_count:
            index = (first_tile + i - window_count) * TILE_KEYS + key
            entry = index // self.select_size
            block = listed[cutlass.min(entry, MAX_LISTED - 1)]
            position = block * self.select_size + index % self.select_size
            position = position if entry < valid else Int32(_NO_POSITION)
        return position

    @cute.jit
    def load(
        self, pages: PagedTensors, rings: PagedTensors | None, sK: cute.Tensor, sV: cute.Tensor,
        listed: cute.Tensor, place: ListPlace, window_start: Int32, window_begin: Int32,
        window_count: Int32, tidx: Int32, first_tile: Int32, valid: Int32, i: Int32,
    ):  # fmt: skip
        """Start to copy this CTA's tile ``i``."""
        stage = i % self.attention.stages
        key_position = functools.partial(
            self.key_position, listed, window_start, window_begin, window_count, first_tile,
            valid, i,
        )  # fmt: skip
        if const_expr(self.rings):
            # The window has keys of its own.
            if i < window_count:
                ring_place = functools.partial(self._ring_place, rings, place, key_position)
                self.attention.load_tile(rings, sK, sV, ring_place, place.kv_head, tidx, stage)
            else:
                key_place = functools.partial(self._key_place, pages, place, key_position)
                self.attention.load_tile(pages, sK, sV, key_place, place.kv_head, tidx, stage)
        else:
            key_place = functools.partial(self._key_place, pages, place, key_position)
            self.attention.load_tile(pages, sK, sV, key_place, place.kv_head, tidx, stage)

    @cute.jit
    def _ring_place(self, rings: PagedTensors, place: ListPlace, key_position, key: Int32):
        position = key_position(key)
        row = Int32(Uint32(cutlass.min(position, place.position)) % Uint32(rings.page_rows))
        return place.sequence, row, position <= place.position

    @cute.jit
    def _key_place(self, pages: PagedTensors, place: ListPlace, key_position, key: Int32):
        position = key_position(key)
        seen = Uint32(cutlass.min(position, place.position))
        index = Int32(seen // Uint32(pages.page_rows))
        row = Int32(seen % Uint32(pages.page_rows))
        page = pages.table[Int64(place.sequence) * pages.max_pages + index]
        return page, row, position <= place.position
