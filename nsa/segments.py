"""Segments: items of consecutive sequences in one flat row, and queries at positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


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
        bounds: the start of each sequence, then the end of the last; int32 or int64 ``(S + 1,)``.
        total: items of the row, at least ``bounds[-1]``; those past it belong to no sequence.
    """

    single = False
    """Whether one sequence has all items."""

    length: int | None = None
    """Items of each sequence if all have as many and the host knows it."""

    def __init__(self, bounds: Tensor, total: int):
        self.total = total
        self.device = bounds.device
        self.num_sequences = bounds.shape[0] - 1
        self._bounds = bounds

    @cached_property
    def offset(self) -> Tensor:
        """The bounds in int64."""
        return self._bounds.long()

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


class CountedSegments(Segments):
    """Items of each sequence, counted by a function when they are first needed.

    Args:
        count: gives the items of each sequence, int64 ``(S,)``.
        sequences: how many.
        total: items of the row.
        device: of the tensors.
    """

    def __init__(
        self, count: Callable[[], Tensor], sequences: int, total: int, device: torch.device
    ):
        self.total = total
        self.device = device
        self.num_sequences = sequences
        self._count = count

    @cached_property
    def offset(self) -> Tensor:
        return prefix_sum(self._count())


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
    def offset(self) -> Tensor:
        # A list would be copied from the host, so this computes it.
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
