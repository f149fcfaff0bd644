"""Where the tokens and compressed blocks of a sequence lie in a cache, and writes to such places.

A place is a pair of indices into the first two dimensions of a store: page and slot of a pool, or
sequence and slot of a ring.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa.cache.state import Cache


class CachePlaces(NamedTuple):
    """One place for each of some items.

    Attributes:
        outer, inner: int64 indices of the first two dimensions of a store.
        valid: bool, false where an item has no place; its indices are then some valid place.
    """

    outer: Tensor
    inner: Tensor
    valid: Tensor

    def read(self, store: Tensor) -> Tensor:
        """``store (X, Y, H_kv, C)`` at each place: the shape of ``outer``, then ``(H_kv, C)``."""
        return store[self.outer, self.inner]


def page_places(
    page_table: Tensor, sequence: Tensor, position: Tensor, page_size: int, num_pages: int
) -> CachePlaces:
    """The page and slot of each token; no place where the table names no page.

    Args:
        page_table: int32 ``(B, max_pages)``; entries outside ``[0, num_pages)`` name no page.
        sequence, position: int64, of one shape.
        page_size: tokens of a page.
    """
    max_pages = page_table.shape[1]
    index = position.div(page_size, rounding_mode="floor")
    # -1 must not wrap to the last page, so every index is clamped before its use.
    page = page_table[sequence, index.clamp(0, max_pages - 1)].long()
    valid = (index >= 0) & (index < max_pages) & (page >= 0) & (page < num_pages)
    return CachePlaces(torch.where(valid, page, 0), position % page_size, valid)


def token_places(cache: "Cache", sequence: Tensor, position: Tensor) -> CachePlaces:
    """Places of tokens in ``k_pages`` and ``v_pages``."""
    size, pages = cache.layout.page_size, cache.k_pages.shape[0]
    places = page_places(cache.page_table, sequence, position, size, pages)
    return places._replace(valid=places.valid & (position < cache.max_length))


def block_places(cache: "Cache", sequence: Tensor, block: Tensor) -> CachePlaces:
    """Places of compressed blocks in ``k_cmp_pages`` and ``v_cmp_pages``."""
    stride = cache.config.compress_stride
    last = block * stride + (cache.config.compress_block_size - 1)
    places = token_places(cache, sequence, last)
    return places._replace(inner=places.inner // stride)


def window_places(cache: "Cache", sequence: Tensor, position: Tensor) -> CachePlaces:
    """Places of tokens in ``window_rings``."""
    return _ring_places(sequence, position, cache.layout.window_ring)


def open_places(cache: "Cache", sequence: Tensor, position: Tensor) -> CachePlaces:
    """Places of tokens in ``open_rings``."""
    return _ring_places(sequence, position, cache.layout.open_ring)


def _ring_places(sequence: Tensor, position: Tensor, ring_size: int) -> CachePlaces:
    return CachePlaces(sequence, position % ring_size, position >= 0)


def write(store: Tensor, places: CachePlaces, values: Tensor):
    """``store[places] = values`` for the valid places, which must differ from each other.

    It has static shapes and reads nothing on the host. An invalid item repeats the first valid one:
    the same value to the same place, so their order does not matter. If none is valid, the first
    place of the store gets its own value.
    """
    if not places.valid.numel():
        return
    some = places.valid.any()
    index = torch.arange(places.valid.shape[0], device=store.device)
    item = torch.where(places.valid, index, places.valid.int().argmax())
    outer = torch.where(some, places.outer[item], 0)
    inner = torch.where(some, places.inner[item], 0)
    store[outer, inner] = torch.where(some, values[item], store[0, 0])
