"""Chunks of queries, which bound the memory of every stage and do not change its result."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa.host import needs_gradients

CPU_CHUNK_ELEMENTS = 1 << 21
"""Elements of scores and gathered keys that one chunk may hold: about the size of a cache."""

GPU_CHUNK_ELEMENTS = 1 << 25
"""The same for other devices. Larger, because small chunks would spend their time on launches."""


def fitting_chunks(
    num_items: int, elements: Callable[[int, int], int], device: torch.device
) -> list[tuple[int, int]]:
    """Ranges ``[start, stop)`` of items for which ``elements(start, stop)`` fits the bound.

    Each range doubles while it fits. If there are no items, there is one empty range, so that
    callers still build a graph.
    """
    most = CPU_CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
    chunks, start = [], 0
    while start < num_items:
        stop = start + 1
        while stop < num_items:
            doubled = min(2 * stop - start, num_items)
            if elements(start, doubled) > most:
                break
            stop = doubled
        chunks.append((start, stop))
        start = stop
    return chunks or [(0, 0)]


def query_chunks(first: Tensor, end: Tensor, elements_per_key: int) -> list[tuple[int, int]]:
    """Ranges ``[start, stop)`` of queries whose score matrices fit a chunk.

    Args:
        first, end: keys ``[first, end)`` of each query ``(Q,)``.
        elements_per_key: scores held for one query and key.
    """
    low, high = first.tolist(), end.tolist()

    def elements(start: int, stop: int) -> int:
        covered = max(high[start:stop]) - min(low[start:stop])
        return (stop - start) * max(1, covered) * elements_per_key

    return fitting_chunks(len(low), elements, first.device)


def covered_range(first: Tensor, end: Tensor, start: int, stop: int) -> tuple[int, int]:
    """Keys ``[low, high)`` that cover the intervals of queries ``start`` to ``stop``."""
    if start == stop:
        return 0, 0
    low, high = int(first[start:stop].min()), int(end[start:stop].max())
    return low, max(low, high)


def recomputed(function, *args):
    """Call ``function``. Backward recomputes it instead of keeping its intermediates."""
    # A checkpoint saves its arguments even if there is no backward, and refuses inference tensors.
    if not needs_gradients(*(x for x in args if isinstance(x, Tensor))):
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
