"""Counts of the blocks, groups and tiles of a sequence, and the overlap of blocks."""

from typing import NamedTuple, TypeVar

from torch import Tensor

from nsa.config import NSAConfig

Count = TypeVar("Count", int, Tensor)
"""A number for one sequence, or a tensor with one for each sequence."""


def num_compressed_blocks(length: Count, config: NSAConfig) -> Count:
    """Complete compressed blocks of a sequence: ``max(0, (N - l) // d + 1)``."""
    blocks = length // config.compress_stride
    extra = config.compress_block_size // config.compress_stride - 1
    if extra == 0:
        return blocks
    return (blocks - extra).clamp(min=0) if isinstance(length, Tensor) else max(0, blocks - extra)


def most_completed_blocks(new: Count, config: NSAConfig) -> Count:
    """Compressed blocks that ``new`` tokens may complete, wherever they are: ``ceil(new / d)``."""
    return -(-new // config.compress_stride)


def covered_tokens(config: NSAConfig, visibility: str) -> int:
    """Tokens of a compressed block that must be at or before a query that sees it: all, or one."""
    return config.compress_block_size if visibility == "complete" else 1


def num_selection_blocks(length: Count, config: NSAConfig) -> Count:
    """Selection blocks of a sequence; the last one may be short: ``ceil(N / l')``."""
    return -(-length // config.select_block_size)


def num_query_tiles(length: Count, config: NSAConfig) -> Count:
    """Query tiles of a sequence; the last one may be short: ``ceil(N / q_tile_size)``."""
    return -(-length // config.q_tile_size)


def most_query_tiles(tokens: int, sequences: int, config: NSAConfig) -> int:
    """Upper bound on the query tiles of packed sequences with ``tokens`` tokens in total."""
    return tokens // config.q_tile_size + sequences


def num_cmp_groups(length: Count, config: NSAConfig) -> Count:
    """Groups of compressed tokens of a sequence: ``ceil(N_cmp / cmp_group_size)``."""
    return -(-num_compressed_blocks(length, config) // config.cmp_group_size)


def overlap_weights(config: NSAConfig, num_compressed: int | None = None) -> list[int]:
    """Weights ``|j ∩ J| / d`` of compressed block ``j`` in selection block ``J`` (Eq. 9).

    Entry ``o`` is for ``j = J * (l'/d) - (l/d - 1) + o``; all other blocks have weight 0. Entries
    that match none of the first ``num_compressed`` blocks for any ``J`` are left out.
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


class BlockPlaces(NamedTuple):
    """Where the compressed blocks of batched or packed tokens lie.

    Attributes:
        block_size, stride: tokens of a block, and from one block of a sequence to the next.
        blocks: rows of blocks; for packed tokens perhaps more than there are blocks.
        entry_tokens, entry_blocks: of an entry of a batch.
        token_bounds: int32 ``(S + 1,)``, where the tokens of each packed sequence start, then where
            the last end; None for a batch.
        block_bounds: the same for blocks.
    """

    block_size: int
    stride: int
    blocks: int
    entry_tokens: int
    entry_blocks: int
    token_bounds: Tensor | None
    block_bounds: Tensor | None
