"""New tokens whose places the host knows, in pages that lie in order.

Such pages hold the tokens of a sequence one after another, so tokens are written, and read where
they lie, as slices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.cache.state import Cache, Pair

Branches = tuple[Tensor, Tensor, Tensor]


class Spans(NamedTuple):
    """The new tokens of each sequence.

    Attributes:
        starts, ends: lengths before and after the call.
        whole: whether all sequences are one batch of equal spans, so that one slice has them all.
    """

    starts: list[int]
    ends: list[int]
    whole: bool

    @property
    def counts(self) -> list[int]:
        return [end - start for start, end in zip(self.starts, self.ends, strict=True)]

    def blocks(self, config) -> tuple[list[int], list[int]]:
        """Complete compressed blocks of each sequence before and after the call."""
        before, after = (
            [num_compressed_blocks(n, config) for n in lengths]
            for lengths in (self.starts, self.ends)
        )
        return before, after


def find_spans(cache: Cache, counts: list[int] | None, batched: bool) -> Spans | None:
    """The spans of ``counts`` new tokens, if the host knows that slices of the pages take them.

    It waits for a GPU if it does not know the lengths of the cache.
    """
    if counts is None or not cache.has_ordered_pages:
        return None
    starts = cache.known_lengths()
    if starts is None:
        starts = cache.lengths.tolist()
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    if max(ends) > cache.max_length:
        return None
    equal = len(set(zip(starts, ends, strict=True))) == 1
    return Spans(starts, ends, batched and equal)


def ordered_rows(cache: Cache, pool: Tensor) -> Tensor:
    """``k_pages`` and so on as ``(B, rows, H_kv, C)``: row ``p`` is token ``p`` of a sequence.

    Compressed block ``j`` is row ``j + l / d - 1`` of its pool.
    """
    return pool.unflatten(0, (cache.batch_size, -1)).flatten(1, 2)


def write_tokens(cache: Cache, spans: Spans, k: Branches, v: Branches):
    """Write new tokens into the pages and the rings.

    In rings they overwrite old tokens, which the call may still attend. In pages their places are
    free.

    Args:
        k, v: of each branch, ``(B, N, H_kv, C)`` or packed ``(T, H_kv, C)``.
    """
    copies = SliceCopies(spans)
    copies.add(cache, (cache.k_pages, cache.v_pages), (k[1], v[1]), spans.starts, spans.counts)
    for rings, branch in ((cache.open_rings, 0), (cache.window_rings, 2)):
        if rings is not None:
            for ring, x in zip(rings, (k[branch], v[branch]), strict=True):
                copies.add_last(ring, x)
    copies.run()


def write_blocks(cache: Cache, spans: Spans, compressed: Pair):
    """Write the blocks that the new tokens complete, ``(M, H_kv, C)``, into their pages."""
    config = cache.config
    before, after = spans.blocks(config)
    shift = config.compress_block_size // config.compress_stride - 1
    firsts = [first + shift for first in before]
    counts = [past - first for first, past in zip(before, after, strict=True)]
    if spans.whole:
        k_cmp, v_cmp = (x.unflatten(0, (cache.batch_size, counts[0])) for x in compressed)
        compressed = k_cmp, v_cmp
    copies = SliceCopies(spans)
    copies.add(cache, (cache.k_cmp_pages, cache.v_cmp_pages), compressed, firsts, counts)
    copies.run()


class SliceCopies:
    """Copies of slices: a few one by one, which is fastest; many in a few launches."""

    def __init__(self, spans: Spans):
        self.spans = spans
        self.targets: list[Tensor] = []
        self.sources: list[Tensor] = []

    def add(self, cache: Cache, pools: Pair, new: Pair, firsts: list[int], counts: list[int]):
        """Rows ``firsts`` and following of each sequence, from ``counts`` rows of ``new``."""
        for pool, x in zip(pools, new, strict=True):
            parts = self.parts(x, counts)
            rows = self.sequences(ordered_rows(cache, pool))
            for row, part, first in zip(rows, parts, firsts, strict=False):
                self.copy(row.narrow(-3, first, part.shape[-3]), part)

    def add_last(self, ring: Tensor, new: Tensor):
        """The last tokens of each sequence, into slots that follow each other around the ring."""
        size, spans = ring.shape[1], self.spans
        parts = self.parts(new, spans.counts)
        bounds = zip(self.sequences(ring), parts, spans.starts, spans.ends, strict=False)
        for slots, part, start, end in bounds:
            first = max(start, end - size)
            while first < end:
                slot = first % size
                past = min(end, first - slot + size)
                source = part.narrow(-3, first - start, past - first)
                self.copy(slots.narrow(-3, slot, past - first), source)
                first = past

    def parts(self, x: Tensor, counts: list[int]) -> list[Tensor]:
        """``x`` of each sequence, or of all where one slice has them."""
        if x.ndim == 4:
            return self.sequences(x)
        return list(x.split(counts))

    def sequences(self, x: Tensor) -> list[Tensor]:
        return [x] if self.spans.whole else list(x.unbind())

    def copy(self, target: Tensor, source: Tensor):
        if source.numel():
            self.targets.append(target)
            self.sources.append(source)

    def run(self):
        if len(self.targets) > 8:
            torch._foreach_copy_(self.targets, self.sources)
            return
        for target, source in zip(self.targets, self.sources, strict=True):
            target.copy_(source)
