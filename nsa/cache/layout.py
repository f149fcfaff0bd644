"""Sizes of a cache's tensors, which follow from the configuration and the longest sequence."""

from typing import NamedTuple

from nsa.blocks import num_cmp_groups, num_selection_blocks
from nsa.config import NSAConfig

MAX_GUESSES = 8
"""New tokens of a decoding call, all of which may be dropped again."""

_TILE_STRIDES = 64
"""Compressed tokens that the decoding kernels load at a time."""

_RING_TILE = 64
"""Window keys that the decoding kernels load at a time."""


class CacheLayout(NamedTuple):
    """Sizes of a cache, in tokens unless said.

    Attributes:
        page_size: tokens of a page, a multiple of ``l'`` and of ``d``.
        max_pages: pages of a sequence.
        window_ring: tokens of the window branch's ring, where that branch has keys of its own.
        open_ring: tokens of the compressed branch's ring, where that branch has keys of its own.
        tile_slots: tiles whose lists are kept; 0 in token mode. Tile ``u`` has slot
            ``u % tile_slots``.
        list_width, group_list_width: slots of a tile's list of blocks, and of groups.
    """

    page_size: int
    max_pages: int
    window_ring: int
    open_ring: int
    tile_slots: int
    list_width: int
    group_list_width: int


def make_layout(config: NSAConfig, max_length: int, page_size: int) -> CacheLayout:
    """The layout for sequences of up to ``max_length`` tokens."""
    block, stride = config.compress_block_size, config.compress_stride
    # Once some guesses are dropped, the next query still needs the whole window before it.
    window = round_up(config.window_size + MAX_GUESSES - 1, _RING_TILE)
    opened = round_up(block + MAX_GUESSES - 1, stride)
    tile_slots = group_list_width = 0
    if config.selection == "tile":
        # The open tile, and those that dropped guesses may have begun.
        tile_slots = 1 + -(-MAX_GUESSES // config.q_tile_size)
    if config.num_cmp_selected_blocks is not None:
        group_list_width = min(config.num_cmp_selected_blocks, num_cmp_groups(max_length, config))
    return CacheLayout(
        page_size=page_size,
        max_pages=-(-max_length // page_size),
        window_ring=min(window, round_up(max_length, _RING_TILE)),
        open_ring=min(opened, round_up(max_length, stride)),
        tile_slots=tile_slots,
        list_width=min(config.num_selected_blocks, num_selection_blocks(max_length, config)),
        group_list_width=group_list_width,
    )


def choose_page_size(config: NSAConfig, max_length: int) -> int:
    """Tokens of a page: those of a kernel's tile of compressed tokens, if that wastes little."""
    size = config.select_block_size
    strides = size // config.compress_stride
    page = min(max(1, _TILE_STRIDES // strides) * size, round_up(max_length, size))
    # At most a sixteenth of the last page may be unused, where smaller pages help.
    while page % (2 * size) == 0 and -max_length % page > max_length // 16:
        page //= 2
    return page


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is at least ``x``."""
    return -(-x // multiple) * multiple
