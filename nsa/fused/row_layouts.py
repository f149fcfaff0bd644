"""Layouts of packed sequences for the kernels: aligned rows and folded queries.

Tensors are ``(B, T, H, D)``. The host reads no lengths, so sizes that depend on lengths are upper
bounds.
"""

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.fused import kernel_calls
from nsa.fused.compressed_forms import extra_rows, num_folded_rows
from nsa.fused.kernel_inputs import Placement, RowStatistics
from nsa.fused.plan_tables import NO_TABLES, Tables
from nsa.geometry import Geometry
from nsa.segments import CountedSegments, QuerySegments, Segments, SingleSegment


class AlignedRows:
    """All items of a batch in one row. Each sequence starts at a multiple of ``alignment``.

    No block then has keys of two sequences, so lists can keep sequences apart. The padding of a
    sequence comes after all its queries, so a causal mask hides it.

    Args:
        items: the sequences in each of the ``B`` entries.
        alignment: the multiple, in items.
        tables: the row of each item and the item of each row, where a kernel made these.
    """

    def __init__(
        self,
        items: Segments,
        alignment: int,
        tables: tuple[Tensor | None, Tensor | None] = (None, None),
    ):
        self.items = items
        self.alignment = alignment
        self.single = items.single
        self.tables = tables
        self.segments = self._align(items, alignment)
        """Where each sequence lies in the row of one entry of the batch."""
        self._rows_of_batch: dict[int, Tensor | None] = {}

    @staticmethod
    def _align(items: Segments, alignment: int) -> Segments:
        if items.single:
            return SingleSegment(-(-items.total // alignment) * alignment, items.device)
        total = (items.total // alignment + items.num_sequences) * alignment
        return CountedSegments(
            lambda: -(-items.count // alignment) * alignment,
            items.num_sequences,
            total,
            items.device,
        )

    @property
    def rows(self) -> int:
        """Upper bound on the rows of one entry of the batch."""
        return self.segments.total

    @cached_property
    def _row_of_item(self) -> Tensor:
        """The row that holds each item, -1 for items of no sequence, int32 ``(T,)``."""
        if self.tables[0] is not None:
            return self.tables[0]
        items = self.items
        row = self.segments.offset[items.owner] + items.local
        return torch.where(items.real, row, -1).int()

    @cached_property
    def _item_of_row(self) -> Tensor:
        """The item that each row holds, -1 for padding, int32 ``(rows,)``."""
        if self.tables[1] is not None:
            return self.tables[1]
        segments, items = self.segments, self.items
        item = items.offset[segments.owner] + segments.local
        return torch.where(segments.local < items.count[segments.owner], item, -1).int()

    def pack(self, x: Tensor) -> Tensor:
        """``(B, T, H, D)`` to ``(1, B * rows, H, D)`` with zeros in the padding."""
        if not self.single:
            return _gather(x, self._item_of_row).view(1, -1, *x.shape[2:])
        missing = self.rows - x.shape[1]
        if missing:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x if x.shape[0] == 1 else x.reshape(1, -1, *x.shape[2:])

    def unpack(self, rows: Tensor) -> Tensor:
        """``(1, B * rows, H, D)`` to ``(B, T, H, D)``."""
        x = rows
        if rows.shape[1] != self.rows:
            x = rows.view(-1, self.rows, *rows.shape[2:])
        if not self.single:
            return _gather(x, self._row_of_item)
        if self.rows != self.items.total:
            x = x[:, : self.items.total]
        return x.contiguous()

    def placement(self, num_heads: int) -> Placement:
        """Where the heads of each item lie in the rows of a batch of one."""
        return Placement(self._row_of_item, num_heads, num_heads, 0)

    def statistics_placement(self, num_heads: int, batch: int) -> Placement:
        """Where each item lies in ``(1, H, B * rows)``."""
        if batch not in self._rows_of_batch:
            rows_are_items = self.single and (batch == 1 or self.rows == self.items.total)
            self._rows_of_batch[batch] = (
                None if rows_are_items else over_batch(self._row_of_item, batch, self.rows)
            )
        return Placement(self._rows_of_batch[batch], 1, num_heads, 0, batch * self.rows)


class FoldedQueries:
    """Queries that see the same compressed blocks, folded into the heads of their KV head.

    All queries with the same ``(t + 1 - l) // d`` see the same complete blocks. Row ``r`` of a
    sequence holds the ``d`` queries that see exactly the blocks ``0 .. r``, so the complete-block
    rule is the causal mask of a sequence of ``N_cmp`` rows. Queries that see no block are left out.
    With started blocks, row ``r`` holds the queries with ``t // d == r``. There are
    ``N_cmp + l / d`` rows, and the last of them see all blocks. Rows before the first query of a
    sequence are left out.

    FA4 aligns rows and blocks at the end, so queries are the last tokens of their sequence.

    Args:
        geometry: the sequences.
        tables: those of the plan, where a kernel made them.
        bounds: where the rows of each sequence start, then where the last end, int32 ``(S + 1,)``,
            from the same kernel.
    """

    def __init__(
        self, geometry: Geometry, tables: Tables = NO_TABLES, bounds: Tensor | None = None
    ):
        self.geometry = geometry
        self.tables = tables
        self._bounds = bounds
        config, queries = geometry.config, geometry.queries
        whole = queries.rows is geometry.keys
        assert queries.sequence is None
        self.size = config.compress_stride
        self.started = config.compressed_visibility == "started"
        # Position of the first query of row 0.
        self.lead = covered_tokens(config, config.compressed_visibility) - 1
        self.extra = extra_rows(config)
        """Rows of a sequence beyond its blocks."""
        sequences = queries.rows.num_sequences
        total = num_folded_rows(queries.rows.total, sequences, config, whole=whole)
        self._count_left_out: Callable[[], Tensor] | None = None
        if not whole:
            self._count_left_out = partial(_count_left_out, queries, self.lead, self.size)
        count = partial(
            _count_rows, geometry.compressed, queries.rows, self.extra, self._count_left_out
        )
        self.rows = CountedSegments(count, sequences, total, geometry.device)
        # Keyed by the number of KV heads, which differs between chunks.
        self._fold_indices: dict[int, Tensor] = {}
        self._unfold_indices: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}

    @cached_property
    def query_of_slot(self) -> Tensor:
        """The token of each row and slot, -1 where there is none: int32 ``(rows * d,)``."""
        if self.tables.query_of_slot is not None:
            return self.tables.query_of_slot
        queries, rows = self.geometry.queries.rows, self.rows
        slot = torch.arange(self.size, device=rows.device)
        # Counted from the first query of the sequence.
        index = rows.local[:, None] * self.size + self.lead + slot
        real = rows.real[:, None]
        if self._before is not None:
            passed = self._before * self.size - self.geometry.queries.first
            index = index + passed[rows.owner, None]
            real = real & (index >= 0)
        real = real & (index < queries.count[rows.owner, None])
        return torch.where(real, queries.offset[rows.owner, None] + index, -1).flatten().int()

    @cached_property
    def place(self) -> Tensor:
        """``row * d + slot`` of each token, -1 if it has none: int32 ``(T,)``."""
        if self.tables.place is not None:
            return self.tables.place
        queries = self.geometry.queries
        position, owner = queries.position - self.lead, queries.rows.owner
        place = self.rows.offset[owner] * self.size + position
        if self._before is not None:
            place = place - self._before[owner] * self.size
        return torch.where((position >= 0) & queries.rows.real, place, -1).int()

    @cached_property
    def lse_place(self) -> Tensor:
        """The :attr:`place` of each token, 0 for queries left out: int32 ``(T,)``."""
        if self.tables.lse_place is not None:
            return self.tables.lse_place
        return self.place.clamp(min=0)

    def _fold_index(self, num_kv_heads: int) -> Tensor:
        """The ``(T, H_kv)`` index in each of ``(rows, H_kv, d)``, negative for none; flat."""
        if num_kv_heads == 1:
            return self.query_of_slot
        if num_kv_heads not in self._fold_indices:
            token = self.query_of_slot.view(-1, 1, self.size)
            index = torch.add(_heads(num_kv_heads, token)[:, None], token, alpha=num_kv_heads)
            self._fold_indices[num_kv_heads] = index.flatten()
        return self._fold_indices[num_kv_heads]

    @cached_property
    def bounds(self) -> Tensor:
        """Where the rows of each sequence start, then where the last end, int32 ``(S + 1,)``."""
        return self.rows.offset.int() if self._bounds is None else self._bounds

    @cached_property
    def _before(self) -> Tensor | None:
        """Rows of each sequence that are left out; None for none."""
        return None if self._count_left_out is None else self._count_left_out()

    def fold(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """``(B, T, H, D)`` to ``(B, rows, H_kv * d * G, D)``; empty slots are 0."""
        # Each gathered row is one token's group of heads.
        grouped = x.reshape(x.shape[0], -1, 1, x[0, 0].numel() // num_kv_heads)
        folded = _gather(grouped, self._fold_index(num_kv_heads))
        return folded.view(x.shape[0], self.rows.total, -1, x.shape[-1])

    def unfold(self, folded: Tensor, num_kv_heads: int) -> Tensor:
        """``(B, rows, H_kv * d * G, D)`` to ``(B, T, H, D)``. Queries that were left out are 0."""
        width = folded[0, 0].numel() // (num_kv_heads * self.size)
        grouped = folded.reshape(folded.shape[0], -1, 1, width)
        x = _gather(grouped, self._unfold_index(num_kv_heads))
        return x.view(folded.shape[0], x.shape[1] // num_kv_heads, -1, folded.shape[-1])

    def _unfold_index(self, num_kv_heads: int) -> Tensor:
        """The ``(rows, H_kv, d)`` index of each of ``(T, H_kv)``, negative for none; flat."""
        if num_kv_heads == 1:
            return self.place
        if num_kv_heads not in self._unfold_indices:
            first = self._place_of_first_head(num_kv_heads)[:, None]
            index = torch.add(first, _heads(num_kv_heads, first), alpha=self.size)
            self._unfold_indices[num_kv_heads] = index.flatten()
        return self._unfold_indices[num_kv_heads]

    def _place_of_first_head(self, num_kv_heads: int) -> Tensor:
        """``row * H_kv * d + slot`` of each token, at most ``-H_kv * d`` for none but one head."""
        row = self.place // self.size
        return torch.add(self.place, row, alpha=(num_kv_heads - 1) * self.size)

    def placement(self, num_heads: int, num_kv_heads: int) -> Placement:
        """Where :meth:`fold` puts the heads of each token. Queries left out have no place."""
        if num_kv_heads not in self._places:
            place = self.place
            if num_kv_heads > 1:
                place = self._place_of_first_head(num_kv_heads).clamp(min=-1)
            self._places[num_kv_heads] = place
        group = num_heads // num_kv_heads
        return Placement(self._places[num_kv_heads], group, group, self.size * group)

    def unfold_lse(self, lse: Tensor, num_kv_heads: int) -> Tensor:
        """``(rows, H_kv * d * G)`` to ``(H, T)``; undefined for queries left out."""
        by_head = lse.unflatten(1, (num_kv_heads, self.size, -1)).permute(1, 3, 0, 2).flatten(2)
        return by_head.index_select(2, self.lse_place).flatten(0, 1)

    def fold_statistics(self, statistics: RowStatistics, num_kv_heads: int) -> RowStatistics:
        """``(H, T)`` to ``(H_kv * d * G, rows)``. P is 0 in empty slots."""
        query = self.query_of_slot
        # Not the first query's delta, which may be NaN and would reach the keys of all sequences.
        folded = (
            x.index_select(1, query.clamp(min=0)).masked_fill(query < 0, empty)
            for x, empty in zip(statistics, (math.inf, 0), strict=True)
        )
        shape = (num_kv_heads, -1, self.rows.total, self.size)
        by_row = (x.view(shape).permute(0, 3, 1, 2) for x in folded)
        return RowStatistics(*(x.reshape(-1, self.rows.total) for x in by_row))


def _count_left_out(queries: QuerySegments, lead: int, size: int) -> Tensor:
    """Folded rows of each sequence before its first query."""
    first_row = (queries.first - lead).div(size, rounding_mode="floor")  # type: ignore[union-attr]
    return first_row.clamp(min=0)


def _count_rows(
    compressed: Segments, rows: Segments, extra: int, left_out: Callable[[], Tensor] | None
) -> Tensor:
    """Folded rows of each sequence, whose queries have ``rows``."""
    counts = compressed.count + extra
    return counts if left_out is None else torch.where(rows.count > 0, counts - left_out(), 0)


def _heads(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather items ``index (R,)`` of every entry, 0 for a negative one: ``(B, R, H, D)``."""
    # Means over blocks of one token.
    return kernel_calls.mean_forward(x, over_batch(index, *x.shape[:2]), 1, x.dtype)


def over_batch(index: Tensor, batch: int, stride: int) -> Tensor:
    """Turn indices into one entry of the batch into int32 indices into all entries.

    ``(R, ...)`` becomes ``(B * R, ...)``; a negative index stays negative.
    """
    if batch == 1:
        return index.int()
    offset = torch.arange(batch, device=index.device).view(-1, *(1,) * index.ndim) * stride
    return torch.where(index >= 0, index + offset, -1).flatten(0, 1).int()
