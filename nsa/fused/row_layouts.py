"""Layouts of packed sequences for the kernels: aligned rows and folded queries.

Tensors are ``(B, T, H, D)``. The host reads no lengths, so sizes that depend on lengths are upper
bounds.
"""

from functools import cached_property

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.fused import kernel_calls
from nsa.fused.compressed_forms import extra_rows, num_folded_rows
from nsa.fused.kernel_inputs import Placement
from nsa.geometry import Geometry
from nsa.segments import Segments, SingleSegment, prefix_sum


class AlignedRows:
    """All items of a batch in one row. Each sequence starts at a multiple of ``alignment``.

    No block then has keys of two sequences, so lists can keep sequences apart. The padding of a
    sequence comes after all its queries, so a causal mask hides it.

    Args:
        items: the sequences in each of the ``B`` entries.
        alignment: the multiple, in items.
    """

    def __init__(self, items: Segments, alignment: int):
        self.items = items
        self.alignment = alignment
        self.single = items.single
        self.segments = self._align(items, alignment)
        """Where each sequence lies in the row of one entry of the batch."""
        self._rows_of_batch: dict[int, Tensor | None] = {}

    @staticmethod
    def _align(items: Segments, alignment: int) -> Segments:
        if items.single:
            return SingleSegment(-(-items.total // alignment) * alignment, items.device)
        offset = prefix_sum(-(-items.count // alignment) * alignment)
        return Segments(offset, (items.total // alignment + items.num_sequences) * alignment)

    @property
    def rows(self) -> int:
        """Upper bound on the rows of one entry of the batch."""
        return self.segments.total

    @cached_property
    def _row_of_item(self) -> Tensor:
        """The row that holds each item, -1 for items of no sequence, int32 ``(T,)``."""
        items = self.items
        row = self.segments.offset[items.owner] + items.local
        return torch.where(items.real, row, -1).int()

    @cached_property
    def _item_of_row(self) -> Tensor:
        """The item that each row holds, -1 for padding, int32 ``(rows,)``."""
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
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        config, queries = geometry.config, geometry.queries
        whole = queries.rows is geometry.keys
        assert queries.sequence is None
        self.size = config.compress_stride
        self.started = config.compressed_visibility == "started"
        # Position of the first query of row 0.
        self.lead = covered_tokens(config, config.compressed_visibility) - 1
        self.extra = extra_rows(config)
        """Rows of a sequence beyond its blocks."""
        counts = geometry.compressed.count + self.extra
        self._before: Tensor | None = None
        """Rows of each sequence that are left out; None for none."""
        if not whole:
            assert isinstance(queries.first, Tensor)  # as of all packed sequences
            first_row = (queries.first - self.lead).div(self.size, rounding_mode="floor")
            self._before = first_row.clamp(min=0)
            counts = torch.where(queries.rows.count > 0, counts - self._before, 0)
        total = num_folded_rows(queries.rows.total, len(counts), config, whole=whole)
        self.rows = Segments(prefix_sum(counts), total)
        # Keyed by the number of KV heads, which differs between chunks.
        self._fold_indices: dict[int, Tensor] = {}
        self._unfold_indices: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}

    @cached_property
    def _token(self) -> Tensor:
        """The token of each row and slot, -1 where there is none: ``(rows, d)``."""
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
        return torch.where(real, queries.offset[rows.owner, None] + index, -1)

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """The row and slot of each token, row -1 if it has none: ``(T,)`` each."""
        queries = self.geometry.queries
        position, owner = queries.position - self.lead, queries.rows.owner
        row = self.rows.offset[owner] + position // self.size
        if self._before is not None:
            row = row - self._before[owner]
        return torch.where((position >= 0) & queries.rows.real, row, -1), position % self.size

    def _fold_index(self, num_kv_heads: int) -> Tensor:
        """The ``(T, H_kv)`` index in each of ``(rows, H_kv, d)``, -1 for none: int32, flat."""
        if num_kv_heads not in self._fold_indices:
            head = torch.arange(num_kv_heads, device=self.rows.device)[:, None]
            token = self._token[:, None]
            index = torch.where(token >= 0, token * num_kv_heads + head, -1)
            self._fold_indices[num_kv_heads] = index.flatten().int()
        return self._fold_indices[num_kv_heads]

    @cached_property
    def bounds(self) -> Tensor:
        """Where the rows of each sequence start, then where the last end, int32 ``(S + 1,)``."""
        return self.rows.offset.int()

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
        """The ``(rows, H_kv, d)`` index of each of ``(T, H_kv)``, -1 for none: int32, flat."""
        if num_kv_heads not in self._unfold_indices:
            row, slot = (x[:, None] for x in self._place)
            head = torch.arange(num_kv_heads, device=row.device)
            index = (row * num_kv_heads + head) * self.size + slot
            self._unfold_indices[num_kv_heads] = torch.where(row >= 0, index, -1).flatten().int()
        return self._unfold_indices[num_kv_heads]

    @cached_property
    def _lse_index(self) -> Tensor:
        """The ``(rows, d)`` index of each token; any for queries left out: int64 ``(T,)``."""
        row, slot = self._place
        return row.clamp(min=0) * self.size + slot

    def placement(self, num_heads: int, num_kv_heads: int) -> Placement:
        """Where :meth:`fold` puts the heads of each token. Queries left out have no place."""
        if num_kv_heads not in self._places:
            row, slot = self._place
            place = torch.where(row >= 0, row * (num_kv_heads * self.size) + slot, -1)
            self._places[num_kv_heads] = place.int()
        group = num_heads // num_kv_heads
        return Placement(self._places[num_kv_heads], group, group, self.size * group)

    def unfold_lse(self, lse: Tensor, num_kv_heads: int) -> Tensor:
        """``(rows, H_kv * d * G)`` to ``(1, H, T)``; undefined for queries left out."""
        by_head = lse.unflatten(1, (num_kv_heads, self.size, -1)).permute(1, 3, 0, 2).flatten(2)
        return by_head.index_select(2, self._lse_index).flatten(0, 1)[None]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather items ``index (R,)`` of every entry of the batch, 0 for -1: ``(B, R, H, D)``."""
    return kernel_calls.gather_rows(x, over_batch(index, *x.shape[:2]))


def over_batch(index: Tensor, batch: int, stride: int) -> Tensor:
    """Turn indices into one entry of the batch into int32 indices into all entries.

    ``(R, ...)`` becomes ``(B * R, ...)``; -1 stays -1.
    """
    if batch == 1:
        return index.int()
    offset = torch.arange(batch, device=index.device).view(-1, *(1,) * index.ndim) * stride
    return torch.where(index >= 0, index + offset, -1).flatten(0, 1).int()
