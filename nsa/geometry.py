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
from nsa.segments import CountedSegments, QuerySegments, Segments, equal_segments, prefix_sum

UNLIMITED = 1 << 62
"""Larger than any count. The sum of two does not overflow an int64."""


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
        keys = Segments(cu_seqlens_k, num_keys)
        if cu_seqlens is cu_seqlens_k:
            return cls(QuerySegments(keys), keys, config, exact)
        rows = Segments(cu_seqlens, num_queries)
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
        if not self.exact:
            config = self.config  # not self, which would never be freed without gc
            return CountedSegments(
                lambda: count(items.count, config), items.num_sequences, bound, self.device
            )
        offset = prefix_sum(count(items.count, self.config))
        return Segments(offset, int(offset[-1]))

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
