"""What a rank computes, sends and receives: index tensors that follow from lengths alone.

"Flat" rows are those of all entries of the batch one after another. A rank's queries are the last
ones of as many sequences of keys as it has query segments. If these are few and long, each is a
call of the backend by itself, and segments of one sequence share one copy of its keys. Else one
packed call has them all, with keys for each. If queries see later tokens, each sequence of keys
comes once and whole.
"""

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nsa.blocks import num_compressed_blocks, num_query_tiles, num_selection_blocks
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.distributed.backend_calls import BackendCall, are_few, call_each, one_call
from nsa.distributed.order import Pieces, QueryRuns, check_tiles, expand, make_pieces, make_runs
from nsa.host import may_keep
from nsa.packing import Packing
from nsa.rope import Positions
from nsa.segments import QuerySegments, Segments, prefix_sum

MAX_KEPT = 16
"""Layouts that are kept, each with some 20 bytes for each token of the whole sequence."""

MAX_RUNS = 64
"""Query segments of all ranks up to which keys are copied run by run."""


class Whole(NamedTuple):
    """The whole that ranks share: ``lengths`` is None for batched input."""

    batch: int
    length: int
    lengths: tuple[int, ...] | None

    @property
    def sequences(self) -> list[int]:
        """Tokens of each sequence of all entries."""
        return [self.length] * self.batch if self.lengths is None else list(self.lengths)


class Borders(NamedTuple):
    """Rows that ranks send to all, and which of them this rank needs.

    Attributes:
        send: this rank's rows to send, padded to what the rank with most sends, int64 ``(width,)``.
        take: rows that it needs of those of all ranks one after another, int64.
    """

    send: Tensor
    take: Tensor


class Blocks(NamedTuple):
    """The compressed blocks of all ranks, and which of them this rank's queries need.

    Attributes:
        width: most blocks that one rank completes; others pad theirs.
        take: blocks to attend, of the padded ones of all ranks one after another, int64.
    """

    width: int
    take: Tensor


class Layout:
    """One rank's part of a call.

    Args:
        whole: the tokens of all ranks.
        ranks, rank: number of ranks, and which one this is.
        order: how tokens are cut.
        config: block sizes and rules.
        device: of the index tensors.
        inference: whether it is made in inference mode.
    """

    def __init__(
        self,
        whole: Whole,
        ranks: int,
        rank: int,
        order: str,
        config: NSAConfig,
        device: torch.device,
        inference: bool = False,
    ):
        self.whole, self.ranks, self.rank = whole, ranks, rank
        self.config, self.device = config, device
        self.pieces: Pieces = make_pieces(whole.length, ranks, order, whole.lengths)
        each = torch.tensor(whole.sequences, dtype=torch.int64, device="cpu")
        self._start = prefix_sum(each)
        bounds = self._start
        if whole.lengths is None:
            bounds = torch.tensor([0, whole.length], dtype=torch.int64, device="cpu")
        self._runs = make_runs(self.pieces, bounds, whole.batch)
        self._own = self._runs.of(rank)
        check_tiles(self._runs, each, config)

    @property
    def rows(self) -> int:
        """Flat rows of a rank."""
        return self.whole.batch * self.pieces.own_length

    @property
    def num_own_blocks(self) -> int:
        """Compressed blocks that this rank's tokens complete."""
        return int(self._completed(self._own)[1].sum())

    @cached_property
    def boundaries(self) -> Boundaries:
        """Of the queries, and of the keys that :attr:`keys` gathers for them."""
        counts = [self._own.tokens.tolist(), self._key_counts.tolist()]
        bounds = [
            prefix_sum(torch.tensor(x, dtype=torch.int64, device="cpu")).int().to(self.device)
            for x in counts
        ]
        packing = None
        if self.last_queries:
            # It keeps what the backend computes from the boundaries.
            packing = Packing(bounds[0], bounds[1])
            bounds = [packing.cu_seqlens, packing.cu_seqlens_k]
        (lengths, longest), (lengths_k, longest_k) = ((x, max(x, default=0)) for x in counts)
        return Boundaries(bounds[0], lengths, longest, packing, bounds[1], lengths_k, longest_k)

    @cached_property
    def segments(self) -> QuerySegments | None:
        """Where the queries stand, unless they are the last of their sequences of keys."""
        if self.last_queries:
            return None
        rows = Segments(self.boundaries.cu_seqlens.long(), self.rows)
        first, sequence = (x.to(self.device) for x in (self._own.position, self._own.sequence))
        return QuerySegments(rows, first, sequence)

    @cached_property
    def calls(self) -> list[BackendCall]:
        """The calls of the backend that attend this rank's queries."""
        if not self.separate:
            return [one_call(self.key_runs)]
        runs = [self._runs_of([x]) for x in self._own_ends]
        return call_each(self._own, self._taken, runs, self.config)

    @cached_property
    def separate(self) -> bool:
        """Whether each query segment is a call of its own."""
        return self.last_queries and are_few(len(self._own.rank), self.rows)

    @cached_property
    def keys(self) -> Tensor | None:
        """The key rows to attend, of the rows of all ranks one after another; None for all."""
        sequences, ends = self._taken
        index = self._place[expand(self._start[sequences], ends)]
        return self._unless_all(index, self.ranks * self.rows)

    @cached_property
    def _taken(self) -> tuple[Tensor, Tensor]:
        """The sequence of each row of consecutive :attr:`keys`, and how many of it there are."""
        if not self.last_queries:
            lengths = self._start.diff()
            return torch.arange(len(lengths), device="cpu"), lengths
        sequences, ends = self._own.sequence, self._own.end
        if self.separate:
            sequences = sequences.unique()
            ends = torch.stack([ends[self._own.sequence == x].max() for x in sequences])
        return sequences, ends

    @cached_property
    def all_runs(self) -> list[tuple[int, int]]:
        """Where the query segments of all ranks lie in their rows, and their lengths."""
        return [(at, count) for *_, at, count in self._sorted_runs]

    @cached_property
    def key_runs(self) -> list[tuple[int, int]] | None:
        """:attr:`keys` as runs of rows: where each starts, and its length; None if they are many.

        Each run is a whole query segment of some rank.
        """
        if not self.last_queries and len(self._runs.rank) <= MAX_RUNS:
            return self.all_runs
        return self._runs_of(list(zip(*(x.tolist() for x in self._taken), strict=True)))

    @cached_property
    def heads(self) -> int:
        """Rows of a rank that come first among its own and, rank after rank, among the keys.

        Those of the first of two pieces of one sequence, on every rank; else 0.
        """
        two_pieces = len(self._start) == 2 and len(self._runs.rank) == 2 * self.ranks
        shared = self.key_runs is not None and (self.separate or not self.last_queries)
        return self.all_runs[0][1] if two_pieces and shared else 0

    @cached_property
    def swap(self) -> tuple[slice, slice] | None:
        """Which keys this rank of two sends and receives, if each are consecutive."""
        piece = self.heads
        if self.ranks != 2 or not piece or not self.last_queries:
            return None
        # Queries of the second rank's pieces, which lie in the middle, see nothing of the last.
        first, middle = slice(0, piece), slice(piece, 3 * piece)
        return (middle, first) if self.rank else (first, middle)

    @property
    def _own_ends(self) -> list[tuple[int, int]]:
        return list(zip(self._own.sequence.tolist(), self._own.end.tolist(), strict=True))

    def _runs_of(self, ends: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
        """The runs of the first keys of some sequences, in that order; None if runs are many."""
        if len(self._runs.rank) > MAX_RUNS:
            return None
        return [
            (at, count)
            for taken, end in ends
            for sequence, position, at, count in self._sorted_runs
            if sequence == taken and position < end
        ]

    @cached_property
    def _sorted_runs(self) -> list[tuple[int, int, int, int]]:
        """Sequence, position, place and length of all query segments, in the order of tokens."""
        runs = self._runs
        place = self._place[self._start[runs.sequence] + runs.position]
        columns = (runs.sequence, runs.position, place, runs.tokens)
        return sorted(zip(*(x.tolist() for x in columns), strict=True))

    @cached_property
    def blocks(self) -> Blocks:
        """The compressed blocks of :attr:`keys`."""
        first, count = self._completed(self._runs)
        own = torch.stack([count[self._runs.rank == rank].sum() for rank in range(self.ranks)])
        width = int(own.max())
        total = prefix_sum(num_compressed_blocks(self._start.diff(), self.config))
        block = expand(total[self._runs.sequence] + first, count)
        rank = self._runs.rank.repeat_interleave(count)
        place = torch.empty_like(block)
        place[block] = rank * width + expand(torch.zeros_like(own), own)
        if self.last_queries:
            seen = num_compressed_blocks(self._own.end, self.config)
            place = place[expand(total[self._own.sequence], seen)]
        return Blocks(width, place.to(self.device))

    @cached_property
    def borders(self) -> Borders:
        """Tokens before a piece that are in blocks which the piece completes."""
        first, count = self._completed(self._runs)
        begin = first * self.config.compress_stride
        missing = torch.where(count > 0, self._runs.position - begin, 0)
        token = expand(self._start[self._runs.sequence] + begin, missing)
        place = self._place[token]
        holder, local = place // max(1, self.rows), place % max(1, self.rows)
        slot = torch.empty_like(place)
        sends = []
        for rank in range(self.ranks):
            at = holder == rank
            sends.append(local[at])
            slot[at] = torch.arange(len(sends[-1]), device="cpu")
        width = max(len(x) for x in sends)
        send = torch.nn.functional.pad(sends[self.rank], (0, width - len(sends[self.rank])))
        needed = self._runs.rank.repeat_interleave(missing) == self.rank
        return Borders(send.to(self.device), (holder * width + slot)[needed].to(self.device))

    @cached_property
    def block_tokens(self) -> Tensor | None:
        """The tokens of own blocks, of own rows followed by those that :attr:`borders` takes.

        None if these are own rows as they are.
        """
        first, count = self._completed(self._own)
        _, end = self._block_ends(self._own)
        missing = torch.where(count > 0, self._own.position - first * self._stride, 0)
        border, row = prefix_sum(missing)[:-1], prefix_sum(self._own.tokens)[:-1]
        inside = torch.where(count > 0, end - self._own.position, 0)
        starts = torch.stack((self.rows + border, row), dim=1).flatten()
        counts = torch.stack((missing, inside), dim=1).flatten()
        return self._unless_all(expand(starts, counts), self.rows)

    @cached_property
    def positions(self) -> Positions:
        """Of own flat tokens in their sequences."""
        rows = (self._own.position, self._own.tokens)
        return self._positions(0, 1, rows, lambda: self._token_index, self._longest)

    @cached_property
    def block_positions(self) -> Positions:
        """Of the centres of own blocks, in the order of own tokens."""
        size, stride = self.config.compress_block_size, self._stride
        length = num_compressed_blocks(self._longest, self.config)
        rows = self._completed(self._own)
        return self._positions((size - 1) / 2, stride, rows, lambda: self._block_index, length)

    def _positions(
        self,
        start: float,
        step: int,
        rows: tuple[Tensor, Tensor],
        locate: Callable[[], Tensor],
        length: int,
    ) -> Positions:
        """Of ``rows`` of each own segment: the index of the first, and how many there are."""
        first, counts = rows
        bounds = prefix_sum(counts)
        bounds, origin = (x.int().to(self.device) for x in (bounds, bounds[:-1] - first))
        return Positions(start, step, bounds, locate, origin, length)

    @cached_property
    def _token_index(self) -> Tensor:
        return expand(self._own.position, self._own.tokens).to(self.device)

    @cached_property
    def _block_index(self) -> Tensor:
        return expand(*self._completed(self._own)).to(self.device)

    @cached_property
    def block_boundaries(self) -> Boundaries:
        """The sequences of :attr:`block_tokens`, one for each query segment."""
        begin, end = self._block_ends(self._own)
        packing = Packing(prefix_sum(end - begin).int().to(self.device))
        bounds, lengths, longest = packing.cu_seqlens, packing.lengths, packing.max_seqlen
        return Boundaries(bounds, lengths, longest, packing, bounds, lengths, longest)

    @property
    def num_keys(self) -> int:
        """Rows of :attr:`keys`."""
        return int(self._key_counts.sum())

    @property
    def sequence_lengths(self) -> list[int]:
        """Tokens of the sequence that each of this rank's query segments lies in."""
        return self._start.diff()[self._own.sequence].tolist()

    def within_keys(self, block_indices: Tensor) -> Tensor:
        """``block_indices (T, H_kv, n)`` or ``(H, tiles, n)`` without blocks past the keys."""
        if not self.last_queries:
            return block_indices
        blocks, token = num_selection_blocks(self._own.end, self.config), self.token_mode
        units = self._own.tokens if token else num_query_tiles(self._own.tokens, self.config)
        limit = blocks.repeat_interleave(units).to(block_indices.device)
        limit = limit[:, None, None] if token else limit[:, None]
        return torch.where(block_indices < limit, block_indices, -1)

    @property
    def _longest(self) -> int:
        return max(self.whole.sequences, default=0)

    @property
    def last_queries(self) -> bool:
        """Whether queries see no later token, so that they can be the last ones of their keys."""
        return self.config.causal and self.config.compressed_visibility == "complete"

    @property
    def token_mode(self) -> bool:
        return self.config.selection == "token"

    @property
    def _stride(self) -> int:
        return self.config.compress_stride

    def _unless_all(self, index: Tensor, rows: int) -> Tensor | None:
        """``index`` on the device of the call; None if it is ``0, 1, ... rows - 1``."""
        if torch.equal(index, torch.arange(rows, device="cpu")):
            return None
        return index.to(self.device)

    @cached_property
    def _key_counts(self) -> Tensor:
        return self._own.end if self.last_queries else self._start.diff()

    def _completed(self, runs: QueryRuns) -> tuple[Tensor, Tensor]:
        """The first compressed block that each segment completes, and how many it does."""
        first = num_compressed_blocks(runs.position, self.config)
        return first, num_compressed_blocks(runs.end, self.config) - first

    def _block_ends(self, runs: QueryRuns) -> tuple[Tensor, Tensor]:
        """Positions ``[begin, end)`` of the blocks that each segment completes."""
        first, count = self._completed(runs)
        begin = first * self._stride
        length = (count - 1) * self._stride + self.config.compress_block_size
        return begin, begin + torch.where(count > 0, length, 0)

    @cached_property
    def _place(self) -> Tensor:
        """Where each flat token lies in the rows of all ranks one after another."""
        place, own = self.pieces.place(), max(1, self.pieces.own_length)
        entry = torch.arange(self.whole.batch, device="cpu")[:, None]
        return (place // own * self.rows + entry * own + place % own).flatten()


def make_layout(
    whole: Whole, group: ProcessGroup, order: str, config: NSAConfig, q: Tensor
) -> Layout:
    """This rank's part. The last few layouts are kept, because layers and steps share them.

    Args:
        q: a tensor on the device of the call.
    """
    make = _kept_layout if may_keep(q) else Layout
    # A tensor made in inference mode cannot be saved for backward.
    mode = torch.is_inference_mode_enabled()
    return make(whole, group.size(), group.rank(), order, config, q.device, mode)


_kept_layout = lru_cache(maxsize=MAX_KEPT)(Layout)
