"""Which rows each call of the backend takes: all query segments of a rank, or one.

A call for one segment takes consecutive rows of queries and of keys, so nothing is copied. Many
short segments are one packed call, which launches fewer kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks, num_query_tiles
from nsa.config import NSAConfig
from nsa.distributed.order import QueryRuns
from nsa.segments import prefix_sum

MAX_CALLS = 4
"""The most query segments that may be calls of their own."""

MIN_TOKENS = 4096
"""The fewest tokens of such segments on average: what is not copied then outweighs the launches."""


class BackendCall(NamedTuple):
    """One call of the backend.

    Attributes:
        rows: its queries, of own rows.
        tiles: their tiles, of own tiles; in tile mode.
        keys: of :attr:`Layout.keys`.
        blocks: of the blocks that :attr:`Layout.blocks` takes.
        runs: its keys as runs of the rows of all ranks; None if they are many.
        packed: whether it has all query segments. Otherwise it has one, as a batch.
    """

    rows: slice
    tiles: slice
    keys: slice
    blocks: slice
    runs: list[tuple[int, int]] | None
    packed: bool


def are_few(segments: int, rows: int) -> bool:
    """Whether query segments, which have ``rows`` tokens in all, are calls of their own."""
    return segments == 1 or (0 < segments <= MAX_CALLS and rows >= segments * MIN_TOKENS)


def one_call(runs: list[tuple[int, int]] | None) -> BackendCall:
    """The packed call of all query segments."""
    return BackendCall(*(slice(None),) * 4, runs, packed=True)


def call_each(
    own: QueryRuns, taken: tuple[Tensor, Tensor], runs: list, config: NSAConfig
) -> list[BackendCall]:
    """A call for each query segment.

    Args:
        own: the query segments.
        taken: the sequences of which there are keys, ascending, and how many of each.
        runs: of the keys of each segment.
    """
    sequences, ends = taken
    first = prefix_sum(ends)[torch.searchsorted(sequences, own.sequence)]
    seen = num_compressed_blocks(own.end, config)
    counts = (own.tokens, num_query_tiles(own.tokens, config), seen)
    rows, tiles, blocks = (_slices(prefix_sum(x)[:-1], x) for x in counts)
    parts = zip(rows, tiles, _slices(first, own.end), blocks, runs, strict=True)
    return [BackendCall(*part, packed=False) for part in parts]


def _slices(start: Tensor, count: Tensor) -> list[slice]:
    return [slice(a, b) for a, b in zip(start.tolist(), (start + count).tolist(), strict=True)]
