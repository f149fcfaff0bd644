"""How many blocks, groups and tiles a sequence has, and how blocks overlap: numbers alone."""

from typing import TypeVar

from torch import Tensor

from nsa.config import NSAConfig

Count = TypeVar("Count", int, Tensor)
"""Of one sequence, or of each of several."""


def num_compressed_blocks(length: Count, config: NSAConfig) -> Count:
    """Complete compressed blocks of a sequence: ``max(0, (N - l) // d + 1)``."""
    blocks = length // config.compress_stride
    extra = config.compress_block_size // config.compress_stride - 1
    if extra == 0:
        return blocks
    return (blocks - extra).clamp(min=0) if isinstance(length, Tensor) else max(0, blocks - extra)


def covered_tokens(config: NSAConfig, visibility: str) -> int:
    """Tokens of a compressed block that must have come where a query sees it: all, or the first."""
    return config.compress_block_size if visibility == "complete" else 1


def num_selection_blocks(length: Count, config: NSAConfig) -> Count:
    """Selection blocks of a sequence, the last one possibly short: ``ceil(N / l')``."""
    return -(-length // config.select_block_size)


def num_query_tiles(length: Count, config: NSAConfig) -> Count:
    """Query tiles of a sequence, the last one possibly short: ``ceil(N / q_tile_size)``."""
    return -(-length // config.q_tile_size)


def most_query_tiles(tokens: int, sequences: int, config: NSAConfig) -> int:
    """Upper bound of the query tiles of packed sequences with ``tokens`` tokens together."""
    return tokens // config.q_tile_size + sequences


def num_cmp_groups(length: Count, config: NSAConfig) -> Count:
    """Groups of compressed tokens of a sequence: ``ceil(N_cmp / cmp_group_size)``."""
    return -(-num_compressed_blocks(length, config) // config.cmp_group_size)


def overlap_weights(config: NSAConfig, num_compressed: int | None = None) -> list[int]:
    """Weights ``|j ∩ J| / d`` of compressed block ``j`` in selection block ``J`` (Eq. 9).

    Entry ``o`` belongs to ``j = J * (l'/d) - (l/d - 1) + o``; blocks outside weigh nothing. Entries
    that belong to none of the first ``num_compressed`` blocks for any ``J`` are left out.
    """
    per_select = config.select_block_size // config.compress_stride
    per_compress = config.compress_block_size // config.compress_stride
    entries = per_select + per_compress - 1
    if num_compressed is not None:
        entries = min(entries, num_compressed + per_compress - 1 if num_compressed else 0)
    return [
        min(o + 1, per_compress, per_select, per_select + per_compress - 1 - o)
        for o in range(entries)
    ]
