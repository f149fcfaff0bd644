"""Block geometry that both backends use unchanged: counts, visibility and overlap weights.

Sequences are laid out one after another ("flat"), so that batched and packed input are one case.
What a query may see in a branch is then one interval ``[first, end)`` of flat keys, and both bounds
grow with the flat query index.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nsa.config import NSAConfig


def num_compressed_blocks(length: int, config: NSAConfig) -> int:
    """Complete compressed blocks of a sequence: ``max(0, (N - l) // d + 1)``."""
    return max(0, (length - config.compress_block_size) // config.compress_stride + 1)


def num_selection_blocks(length: int, config: NSAConfig) -> int:
    """Selection blocks of a sequence, the last one possibly short: ``ceil(N / l')``."""
    return -(-length // config.select_block_size)


def num_query_tiles(length: int, config: NSAConfig) -> int:
    """Query tiles of a sequence, the last one possibly short: ``ceil(N / q_tile_size)``."""
    return -(-length // config.q_tile_size)


def num_cmp_groups(length: int, config: NSAConfig) -> int:
    """Groups of compressed tokens of a sequence: ``ceil(N_cmp / cmp_group_size)``."""
    return -(-num_compressed_blocks(length, config) // config.cmp_group_size)


def overlap_weights(config: NSAConfig) -> list[int]:
    """Weights ``|j ∩ J| / d`` of compressed block ``j`` in selection block ``J`` (Eq. 9).

    Entry ``o`` belongs to ``j = J * (l'/d) - (l/d - 1) + o``; blocks outside weigh nothing.
    """
    per_select = config.select_block_size // config.compress_stride
    per_compress = config.compress_block_size // config.compress_stride
    return [
        min(o + 1, per_compress, per_select, per_select + per_compress - 1 - o)
        for o in range(per_select + per_compress - 1)
    ]


@dataclass(frozen=True)
class Segments:
    """Items (tokens, blocks or tiles) of consecutive sequences in one flat row.

    ``offsets`` has one entry more than there are sequences; ``owner`` and ``local`` give each
    item's sequence and its index in that sequence, int64 ``(total,)``.
    """

    offsets: list[int]
    device: torch.device

    @classmethod
    def from_counts(cls, counts: list[int], device: torch.device) -> "Segments":
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        return cls(offsets, device)

    @property
    def total(self) -> int:
        return self.offsets[-1]

    @cached_property
    def counts(self) -> list[int]:
        return [end - start for start, end in zip(self.offsets, self.offsets[1:], strict=False)]

    @cached_property
    def offset(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.int64, device=self.device)

    @cached_property
    def count(self) -> Tensor:
        return self.offset.diff()

    @cached_property
    def owner(self) -> Tensor:
        ids = torch.arange(len(self.counts), device=self.device)
        return torch.repeat_interleave(ids, self.count, output_size=self.total)

    @cached_property
    def local(self) -> Tensor:
        return torch.arange(self.total, device=self.device) - self.offset[self.owner]


@dataclass(frozen=True)
class Geometry:
    """Where the tokens, blocks and tiles of every sequence lie, and what each query may see."""

    lengths: tuple[int, ...]
    config: NSAConfig
    device: torch.device

    def _segments(self, count) -> Segments:
        counts = [count(length, self.config) for length in self.lengths]
        return Segments.from_counts(counts, self.device)

    @cached_property
    def tokens(self) -> Segments:
        return Segments.from_counts(list(self.lengths), self.device)

    @cached_property
    def compressed(self) -> Segments:
        return self._segments(num_compressed_blocks)

    @cached_property
    def selection(self) -> Segments:
        return self._segments(num_selection_blocks)

    @cached_property
    def tiles(self) -> Segments:
        return self._segments(num_query_tiles)

    @cached_property
    def groups(self) -> Segments:
        return self._segments(num_cmp_groups)

    @cached_property
    def tile_first(self) -> Tensor:
        """Position of each tile's first query in its sequence, int64 ``(tiles,)``."""
        return self.tiles.local * self.config.q_tile_size

    @cached_property
    def tile_last(self) -> Tensor:
        """Position of each tile's last query in its sequence, int64 ``(tiles,)``."""
        last = self.tile_first + self.config.q_tile_size
        return torch.minimum(last, self.tokens.count[self.tiles.owner]) - 1

    def num_visible(self, position: Tensor, owner: Tensor, visibility: str) -> Tensor:
        """Compressed blocks that a query at ``position`` of sequence ``owner`` sees."""
        config, count = self.config, self.compressed.count[owner]
        if not config.causal:
            return count
        covered = config.compress_block_size if visibility == "complete" else 1
        visible = (position + 1 - covered).div(config.compress_stride, rounding_mode="floor") + 1
        return torch.minimum(visible.clamp(min=0), count)

    def compressed_interval(self) -> tuple[Tensor, Tensor]:
        """Flat compressed blocks ``[first, end)`` that each token sees."""
        owner = self.tokens.owner
        first = self.compressed.offset[owner]
        visibility = self.config.compressed_visibility
        return first, first + self.num_visible(self.tokens.local, owner, visibility)

    def token_interval(self) -> tuple[Tensor, Tensor]:
        """Flat tokens ``[first, end)`` that each token may see in any branch."""
        owner = self.tokens.owner
        first = self.tokens.offset[owner]
        seen = self.tokens.local + 1 if self.config.causal else self.tokens.count[owner]
        return first, first + seen

    def window_interval(self) -> tuple[Tensor, Tensor]:
        """Flat tokens ``[first, end)`` in each token's window."""
        first, end = self.token_interval()
        index = torch.arange(self.tokens.total, device=self.device)
        window = self.config.window_size
        return torch.maximum(first, index - window + 1), torch.minimum(end, index + window)

    def candidate_interval(self, position: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Flat selection blocks ``[first, end)`` open to queries at ``position`` of ``owner``."""
        first = self.selection.offset[owner]
        if not self.config.causal:
            return first, first + self.selection.count[owner]
        return first, first + position // self.config.select_block_size + 1
