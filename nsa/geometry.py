"""Where queries, keys, blocks and tiles lie, and what each query may see. Both backends use it.

Sequences of keys lie one after another ("flat"), so batched and packed input are the same case. A
query then sees one interval ``[first, end)`` of flat keys in a branch. Queries come in segments,
each a run of consecutive positions of one sequence.
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
    """Items (queries, keys, blocks or tiles) of consecutive sequences in one flat row.

    Args:
        offset: the start of each sequence, then the end of the last; int64 ``(S + 1,)``.
        total: items of the row, at least ``offset[-1]``; those past it belong to no sequence.
    """

    single = False
    """Whether one sequence has all items."""

    length: int | None = None
    """Items of each sequence if all have as many and the host knows it."""

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


class EqualSegments(Segments):
    """Sequences of equal length, which the host knows."""

    def __init__(self, sequences: int, length: int, device: torch.device):
        super().__init__(torch.arange(sequences + 1, device=device) * length, sequences * length)
        self.length = length


class SingleSegment(Segments):
    """Items of a single sequence. They need no look-ups, so fewer kernels run, or none."""

    single = True
    num_sequences = 1

    def __init__(self, total: int, device: torch.device):
        self.total = total
        self.length = total
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


def equal_segments(sequences: int, length: int, device: torch.device) -> Segments:
    """``sequences`` sequences of ``length`` items each."""
    if sequences == 1:
        return SingleSegment(length, device)
    return EqualSegments(sequences, length, device)


@dataclass(frozen=True, eq=False)
class QuerySegments:
    """Rows of q in segments. The queries of a segment stand at consecutive positions.

    Several segments may lie in one sequence of keys, in any order, and a sequence may have none. In
    tile mode each segment starts at a multiple of ``q_tile_size``, and ends at one or at the end of
    its sequence. If one segment has all rows, one sequence has all keys.

    Args:
        rows: the rows of q of each segment.
        first: the position of each segment's first query in its sequence, int64 ``(segments,)``; or
            an int, the same for all.
        sequence: the sequence of keys of each segment, int64 ``(segments,)``; by default segment
            ``i`` lies in sequence ``i``.
    """

    rows: Segments
    first: Tensor | int = 0
    sequence: Tensor | None = None

    def first_of(self, segment: Tensor) -> Tensor | int:
        """Position of the first query of each ``segment``; an int if all have the same."""
        return self.first if isinstance(self.first, int) else self.first[segment]

    @property
    def from_start(self) -> bool:
        """Whether every segment is known to start at position 0."""
        return isinstance(self.first, int) and self.first == 0

    def positions(self, local: Tensor, segment: Tensor) -> Tensor:
        """The position of the query ``local`` of each ``segment``, counted from its first one."""
        if self.from_start:
            return local
        return local + self.first_of(segment)

    def sequence_of(self, segment: Tensor) -> Tensor:
        """The sequence of keys of each ``segment``."""
        return segment if self.sequence is None else self.sequence[segment]

    @cached_property
    def position(self) -> Tensor:
        """Each query's position in its sequence, int64 ``(T,)``."""
        return self.positions(self.rows.local, self.rows.owner)

    @cached_property
    def owner(self) -> Tensor:
        """Each query's sequence of keys, int64 ``(T,)``."""
        return self.sequence_of(self.rows.owner)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the queries, keys, blocks and tiles lie, and what each query may see.

    An ``owner`` in the arguments of a method is a sequence of keys. Blocks and groups are those of
    the keys; tiles are those of the queries, so the owner of a tile in ``tiles`` is a segment.

    Args:
        queries: the segments of queries. If each sequence has as many queries as keys, their rows
            are ``keys`` itself.
        keys: the sequences of keys.
        config: block sizes and rules.
        exact: whether to count blocks exactly, which reads the lengths on the host if they are not
            known there. Otherwise each kind of block gets an upper bound from the number of items
            and sequences.
    """

    queries: QuerySegments
    keys: Segments
    config: NSAConfig
    exact: bool = True

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        config: NSAConfig,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> "Geometry":
        """Geometry of batched ``q (B, Nq, H, D)`` and ``k (B, Nk, H_kv, D)``, flattened; or of
        packed ``(T, H, D)`` and ``(Tk, H_kv, D)``, with boundaries as in :meth:`packed`."""
        if cu_seqlens is None:
            return cls.equal(q.shape[0], q.shape[1], k.shape[1], q.device, config)
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        return cls.packed(cu_seqlens, cu_seqlens_k, q.shape[0], k.shape[0], config)

    @classmethod
    def equal(
        cls,
        sequences: int,
        num_queries: int,
        num_keys: int,
        device: torch.device,
        config: NSAConfig,
    ) -> "Geometry":
        """Geometry of sequences of equal length. The queries of each are its last ones."""
        keys = equal_segments(sequences, num_keys, device)
        if num_queries == num_keys:
            return cls(QuerySegments(keys), keys, config)
        rows = equal_segments(sequences, num_queries, device)
        return cls(QuerySegments(rows, num_keys - num_queries), keys, config)

    @classmethod
    def packed(
        cls,
        cu_seqlens: Tensor,
        cu_seqlens_k: Tensor,
        num_queries: int,
        num_keys: int,
        config: NSAConfig,
        *,
        exact: bool = True,
    ) -> "Geometry":
        """Geometry of packed sequences. The queries of each are its last ones.

        Args:
            cu_seqlens, cu_seqlens_k: int32 ``(S + 1,)`` boundaries of queries and of keys; one
                tensor for both if each sequence has as many queries as keys.
            num_queries, num_keys: rows of q and of k.
        """
        keys = Segments(cu_seqlens_k.long(), num_keys)
        if cu_seqlens is cu_seqlens_k:
            return cls(QuerySegments(keys), keys, config, exact)
        rows = Segments(cu_seqlens.long(), num_queries)
        return cls(QuerySegments(rows, keys.count - rows.count), keys, config, exact)

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def _segments(self, count, items: Segments, bound: int) -> Segments:
        """``count(length)`` blocks or tiles of each sequence of ``items``."""
        if items.length is not None:
            return equal_segments(
                items.num_sequences, count(items.length, self.config), self.device
            )
        offset = prefix_sum(count(items.count, self.config))
        return Segments(offset, int(offset[-1]) if self.exact else bound)

    @cached_property
    def compressed(self) -> Segments:
        bound = self.keys.total // self.config.compress_stride
        return self._segments(num_compressed_blocks, self.keys, bound)

    @cached_property
    def selection(self) -> Segments:
        bound = self.keys.total // self.config.select_block_size + self.keys.num_sequences
        return self._segments(num_selection_blocks, self.keys, bound)

    @cached_property
    def groups(self) -> Segments:
        bound = self.compressed.total // self.config.cmp_group_size + self.keys.num_sequences
        return self._segments(num_cmp_groups, self.keys, bound)

    @cached_property
    def tiles(self) -> Segments:
        """The tiles that have queries, of each segment of queries."""
        rows = self.queries.rows
        bound = most_query_tiles(rows.total, rows.num_sequences, self.config)
        return self._segments(num_query_tiles, rows, bound)

    @cached_property
    def tile_owner(self) -> Tensor:
        """Each tile's sequence of keys, int64 ``(tiles,)``."""
        return self.queries.sequence_of(self.tiles.owner)

    @cached_property
    def tile_row(self) -> Tensor:
        """The row of q of each tile's first query, int64 ``(tiles,)``."""
        start = self.queries.rows.offset[self.tiles.owner]
        return start + self.tiles.local * self.config.q_tile_size

    @cached_property
    def tile_first(self) -> Tensor:
        """Position of each tile's first query in its sequence, int64 ``(tiles,)``."""
        first = self.tiles.local * self.config.q_tile_size
        return self.queries.positions(first, self.tiles.owner)

    @cached_property
    def tile_end(self) -> Tensor:
        """Last position of each tile, even if its sequence ends earlier: ``(tiles,)``."""
        return self.tile_first + (self.config.q_tile_size - 1)

    @cached_property
    def tile_last(self) -> Tensor:
        """Position of each tile's last query in its sequence, int64 ``(tiles,)``."""
        segment = self.tiles.owner
        end = self.queries.rows.count_of(segment)
        if not self.queries.from_start:
            end = end + self.queries.first_of(segment)
        return self.tile_end.clamp(max=end - 1)

    @property
    def units(self) -> Segments:
        """What selects together: a query or a tile. Their owner is a segment of queries."""
        return self.queries.rows if self.config.selection == "token" else self.tiles

    @property
    def unit_owner(self) -> Tensor:
        """Each unit's sequence of keys, int64 ``(units,)``."""
        return self.queries.owner if self.config.selection == "token" else self.tile_owner

    @property
    def unit_position(self) -> Tensor:
        """The position that sets each unit's forced blocks and candidates, int64 ``(units,)``."""
        return self.queries.position if self.config.selection == "token" else self.tile_end

    def num_visible(self, position: Tensor, owner: Tensor, visibility: str) -> Tensor:
        """Compressed blocks that a query at ``position`` of sequence ``owner`` sees."""
        config = self.config
        if not config.causal:
            return self.compressed.count[owner]
        visible = position + (config.compress_stride + 1 - covered_tokens(config, visibility))
        visible = visible.div(config.compress_stride, rounding_mode="floor").clamp(min=0)
        return visible.clamp(max=self.compressed.count_of(owner))

    def compressed_interval(self) -> tuple[Tensor, Tensor]:
        """Flat compressed blocks ``[first, end)`` that each query sees."""
        owner = self.queries.owner
        first = self.compressed.offset[owner]
        visibility = self.config.compressed_visibility
        return first, first + self.num_visible(self.queries.position, owner, visibility)

    def key_interval(self) -> tuple[Tensor, Tensor]:
        """Flat keys ``[first, end)`` that each query may see in any branch."""
        owner = self.queries.owner
        first = self.keys.offset[owner]
        seen = self.queries.position + 1 if self.config.causal else self.keys.count[owner]
        return first, first + seen

    @property
    def query_key(self) -> Tensor:
        """The flat key at each query's position, int64 ``(T,)``."""
        if self.queries.rows is self.keys:
            return torch.arange(self.keys.total, device=self.device)
        return self.keys.offset[self.queries.owner] + self.queries.position

    def window_interval(self) -> tuple[Tensor, Tensor]:
        """Flat keys ``[first, end)`` in each query's window."""
        first, end = self.key_interval()
        own = self.query_key
        window = min(self.config.window_size, self.keys.total)
        return torch.maximum(first, own - window + 1), torch.minimum(end, own + window)

    def candidate_interval(self, position: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        """Flat selection blocks ``[first, end)`` open to queries at ``position`` of ``owner``."""
        first, count = self.selection.offset[owner], self.selection.count[owner]
        if self.config.causal:
            count = torch.minimum(count, position // self.config.select_block_size + 1)
        return first, first + count

    def block_rules(self, position: Tensor, owner: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Which flat selection ``blocks`` are candidates, and which candidates are forced.

        Args:
            position, owner: ``unit_position`` and ``unit_owner`` of some units, ``(C,)``.
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
