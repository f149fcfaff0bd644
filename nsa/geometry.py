"""Where tokens, blocks and tiles lie, and what each query may see. Both backends use it.

Sequences lie one after another ("flat"), so batched and packed input are the same case. A query
then sees one interval ``[first, end)`` of flat keys in a branch, and both bounds grow with the flat
query index.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nsa.blocks import (
    covered_tokens,
    most_query_tiles,
    num_cmp_groups,
    num_compressed_blocks,
    num_query_tiles,
    num_selection_blocks,
)
from nsa.config import NSAConfig

UNLIMITED = 1 << 62
"""Larger than any count. The sum of two does not overflow an int64."""


def prefix_sum(counts: Tensor) -> Tensor:
    """Start of each of consecutive runs, then the end of the last: ``(S,)`` to ``(S + 1,)``."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def locate_items(offset: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The sequence of each of ``total`` items, and its index there: int64 ``(total,)`` each.

    ``offset (S + 1,)`` holds the start of each sequence, then the end of the last. Items past the
    end count as the last sequence's.
    """
    index = torch.arange(total, device=offset.device)
    # This searches the whole offset, because torch.compile for GPUs cannot search in a slice.
    owner = torch.searchsorted(offset, index, right=True).clamp(max=offset.shape[0] - 1) - 1
    return owner, index - offset[owner]


class Segments:
    """Items (tokens, blocks or tiles) of consecutive sequences in one flat row.

    Args:
        offset: the start of each sequence, then the end of the last; int64 ``(S + 1,)``.
        total: items of the row, at least ``offset[-1]``; those past it belong to no sequence.
    """

    single = False
    """Whether one sequence has all items."""

    def __init__(self, offset: Tensor, total: int):
        self.offset = offset
        self.total = total
        self.device = offset.device

    @property
    def num_sequences(self) -> int:
        return self.offset.shape[0] - 1

    @cached_property
    def offsets(self) -> list[int]:
        """``offset`` on the host."""
        return self.offset.tolist()

    @cached_property
    def count(self) -> Tensor:
        """Items of each sequence, int64 ``(S,)``."""
        return self.offset.diff()

    @cached_property
    def counts(self) -> list[int]:
        """``count`` on the host."""
        return self.count.tolist()

    @cached_property
    def owner(self) -> Tensor:
        """Each item's sequence, int64 ``(total,)``."""
        return self._items[0]

    @cached_property
    def local(self) -> Tensor:
        """Each item's index in its sequence, int64 ``(total,)``."""
        return self._items[1]

    @cached_property
    def real(self) -> Tensor:
        """Which items belong to a sequence, bool ``(total,)``."""
        return self.local < self.count[self.owner]

    def count_of(self, owner: Tensor) -> Tensor | int:
        """Items of the sequence of each ``owner``; an int if there is one sequence."""
        return self.count[owner]

    def only_real(self, x: Tensor) -> Tensor:
        """``x``, which has one value per item, with 0 for items of no sequence."""
        return torch.where(self.real, x, 0)

    @cached_property
    def _items(self) -> tuple[Tensor, Tensor]:
        return locate_items(self.offset, self.total)


class SingleSegment(Segments):
    """Items of a single sequence. They need no look-ups, so fewer kernels run, or none."""

    single = True
    num_sequences = 1

    def __init__(self, total: int, device: torch.device):
        self.total = total
        self.device = device

    @cached_property
    def offset(self) -> Tensor:  # type: ignore[override]
        # Nothing assigns it. A list would be copied from the host, so this computes it.
        return torch.arange(2, device=self.device) * self.total

    @cached_property
    def owner(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=self.device).expand(self.total)

    @cached_property
    def local(self) -> Tensor:
        return torch.arange(self.total, device=self.device)

    @cached_property
    def real(self) -> Tensor:
        return torch.ones(self.total, dtype=torch.bool, device=self.device)

    def count_of(self, owner: Tensor) -> int:
        return self.total

    def only_real(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the tokens, blocks and tiles of every sequence lie, and what each query may see.

    Args:
        tokens: the sequences.
        config: block sizes and rules.
        exact: whether to count blocks exactly, which reads the lengths on the host. Otherwise each
            kind of block gets an upper bound from the number of tokens and sequences.
        uniform: number and length of the sequences if all have one length; counts are then exact.
    """

    tokens: Segments
    config: NSAConfig
    exact: bool = True
    uniform: tuple[int, int] | None = None

    @classmethod
    def single(cls, length: int, device: torch.device, config: NSAConfig) -> "Geometry":
        """Geometry of one sequence."""
        return cls(SingleSegment(length, device), config)

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None, config: NSAConfig) -> "Geometry":
        """Geometry of batched ``(B, N, H, D)`` or packed ``(T, H, D)`` queries, flattened."""
        if cu_seqlens is None:
            batch, length = q.shape[:2]
            if batch == 1:
                return cls.single(length, q.device, config)
            offset = torch.arange(batch + 1, device=q.device) * length
            return cls(Segments(offset, batch * length), config, uniform=(batch, length))
        return cls(Segments(cu_seqlens.long(), q.shape[0]), config)

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def _segments(self, count, bound: int) -> Segments:
        if self.tokens.single:
            return SingleSegment(count(self.tokens.total, self.config), self.device)
        offset = prefix_sum(count(self.tokens.count, self.config))
        if self.uniform is not None:
            batch, length = self.uniform
            return Segments(offset, batch * count(length, self.config))
        return Segments(offset, int(offset[-1]) if self.exact else bound)

    @cached_property
    def compressed(self) -> Segments:
        bound = self.tokens.total // self.config.compress_stride
        return self._segments(num_compressed_blocks, bound)

    @cached_property
    def selection(self) -> Segments:
        bound = self.tokens.total // self.config.select_block_size + self.tokens.num_sequences
        return self._segments(num_selection_blocks, bound)

    @cached_property
    def tiles(self) -> Segments:
        bound = most_query_tiles(self.tokens.total, self.tokens.num_sequences, self.config)
        return self._segments(num_query_tiles, bound)

    @cached_property
    def groups(self) -> Segments:
        bound = self.compressed.total // self.config.cmp_group_size + self.tokens.num_sequences
        return self._segments(num_cmp_groups, bound)

    @property
    def units(self) -> Segments:
        """What selects together: a token or a tile."""
        return self.tokens if self.config.selection == "token" else self.tiles

    @cached_property
    def tile_first(self) -> Tensor:
        """Position of each tile's first query in its sequence, int64 ``(tiles,)``."""
        return self.tiles.local * self.config.q_tile_size

    @cached_property
    def tile_end(self) -> Tensor:
        """Last position of each tile, even if its sequence ends earlier: ``(tiles,)``."""
        return self.tile_first + (self.config.q_tile_size - 1)

    @cached_property
    def tile_last(self) -> Tensor:
        """Position of each tile's last query in its sequence, int64 ``(tiles,)``."""
        return self.tile_end.clamp(max=self.tokens.count_of(self.tiles.owner) - 1)

    @property
    def unit_position(self) -> Tensor:
        """The position that sets each unit's forced blocks and candidates, int64 ``(units,)``."""
        return self.tokens.local if self.config.selection == "token" else self.tile_end

    def num_visible(self, position: Tensor, owner: Tensor, visibility: str) -> Tensor:
        """Compressed blocks that a query at ``position`` of sequence ``owner`` sees."""
        config = self.config
        if not config.causal:
            return self.compressed.count[owner]
        visible = position + (config.compress_stride + 1 - covered_tokens(config, visibility))
        visible = visible.div(config.compress_stride, rounding_mode="floor").clamp(min=0)
        return visible.clamp(max=self.compressed.count_of(owner))

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
        window = min(self.config.window_size, self.tokens.total)
        return torch.maximum(first, index - window + 1), torch.minimum(end, index + window)

    def candidate_interval(self, position: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Flat selection blocks ``[first, end)`` open to queries at ``position`` of ``owner``."""
        first, count = self.selection.offset[owner], self.selection.count[owner]
        if self.config.causal:
            count = torch.minimum(count, position // self.config.select_block_size + 1)
        return first, first + count

    def block_rules(self, position: Tensor, owner: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Which flat selection ``blocks`` are candidates, and which candidates are forced.

        Args:
            position, owner: ``unit_position`` and sequence of each unit, ``(C,)``.
            blocks: flat selection blocks ``(X,)``.

        Returns:
            Two bool tensors ``(C, X)``.
        """
        first, end = (bound[:, None] for bound in self.candidate_interval(position, owner))
        own = first + position[:, None] // self.config.select_block_size
        num_initial, num_local = self._forced_counts
        candidate = (blocks >= first) & (blocks < end)
        initial = blocks < first + num_initial
        local = blocks > own - num_local
        return candidate, candidate & (blocks <= own) & (initial | local)

    def num_forced_past_end(self, position: Tensor, owner: Tensor) -> Tensor:
        """Number of forced blocks that start past the end of the sequence, int64 ``(C,)``.

        Only the last tile of a sequence can have some. Arguments as in :meth:`block_rules`.
        """
        count = self.selection.count[owner]
        end = position // self.config.select_block_size + 1
        num_initial, num_local = self._forced_counts
        local = torch.maximum(end - num_local, count)
        initial = torch.minimum(local, end.clamp(max=num_initial))
        return (end - local).clamp(min=0) + (initial - count).clamp(min=0)

    @property
    def _forced_counts(self) -> tuple[int, int]:
        """Initial and local blocks, limited so that sums do not overflow."""
        config = self.config
        return (
            min(config.num_initial_blocks, UNLIMITED),
            min(config.num_local_blocks, UNLIMITED),
        )
