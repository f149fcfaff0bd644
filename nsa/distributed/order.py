"""Which tokens each rank holds. Only integers, the same on every rank; all tensors are on the CPU.

A piece is a run of consecutive tokens that a rank holds. A query segment is the part of a piece
that lies in one sequence.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.segments import prefix_sum

ORDERS = ("contiguous", "head-tail", "head-tail-each")


def check_order(order) -> str:
    """``order`` if it is one."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    return order


class Pieces:
    """The pieces of every rank, in the order in which the rank holds them.

    Args:
        start: the first token of each piece, int64 ``(ranks, pieces)``.
        count: tokens of each piece; each rank has as many in total.
    """

    def __init__(self, start: Tensor, count: Tensor):
        self.start = start
        self.count = count

    @property
    def ranks(self) -> int:
        return self.start.shape[0]

    @cached_property
    def own_length(self) -> int:
        """Tokens of a rank."""
        return int(self.count[0].sum())

    def tokens(self, rank: int) -> Tensor:
        """The tokens of a rank in its order, int64 ``(own_length,)``."""
        return expand(self.start[rank], self.count[rank])

    def place(self) -> Tensor:
        """Where each token lies in the tokens of all ranks one after another, int64 ``(N,)``."""
        held = expand(self.start.flatten(), self.count.flatten())
        place = torch.empty_like(held)
        place[held] = _arange(len(held))
        return place


def make_pieces(length: int, ranks: int, order: str, lengths: Sequence[int] | None) -> Pieces:
    """Cut ``length`` tokens among ``ranks``.

    Args:
        length: tokens ``N``.
        lengths: tokens of each packed sequence, which only ``"head-tail-each"`` reads; None for
            batched input, one sequence.

    Raises:
        ValueError: the tokens cannot be cut into equal pieces.
    """
    cuts = ranks if order == "contiguous" else 2 * ranks
    if order == "head-tail-each" and lengths is not None:
        for at, each in enumerate(lengths):
            if each % cuts:
                raise ValueError(
                    f"each sequence must have a multiple of {cuts} tokens, 2 for each of {ranks} "
                    f"ranks, with order='head-tail-each', got {each} in sequence {at}; pad it at "
                    "the end"
                )
        size = torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None] // cuts
        first = prefix_sum(size[:, 0] * cuts)[:-1, None]
    else:
        if length % cuts:
            raise ValueError(
                f"the sequence dimension must be a multiple of {cuts}, {cuts // ranks} for each of "
                f"{ranks} ranks, with order={order!r}, got {length}; pad it at the end"
            )
        size = torch.tensor([[length // cuts]], dtype=torch.int64, device="cpu")
        first = torch.zeros_like(size)
    own = _arange(ranks)[:, None]  # the number of a rank's piece
    piece = own if order == "contiguous" else torch.cat((own, cuts - 1 - own), dim=1)
    start = first + piece[:, None] * size  # (ranks, sequences, pieces)
    return Pieces(start.flatten(1), size.expand_as(start).flatten(1))


class QueryRuns(NamedTuple):
    """Query segments of one rank or of all, in the order in which the ranks hold them.

    Attributes:
        rank: the rank that holds it, int64 ``(segments,)``, as all are.
        tokens: how many it has, at least 1.
        position: of its first token in its sequence.
        sequence: the sequence that it lies in.
    """

    rank: Tensor
    tokens: Tensor
    position: Tensor
    sequence: Tensor

    @property
    def end(self) -> Tensor:
        """The position after the last token."""
        return self.position + self.tokens

    def of(self, rank: int) -> "QueryRuns":
        """Those of one rank."""
        return QueryRuns(*(x[self.rank == rank] for x in self))


def make_runs(pieces: Pieces, bounds: Tensor, batch: int) -> QueryRuns:
    """The query segments of all ranks.

    Args:
        bounds: boundaries of the sequences, int64 ``(S + 1,)``.
        batch: how many entries have these pieces; the sequences of each come after those before.
    """
    held = pieces.count.flatten() > 0
    rank = _arange(pieces.ranks)[:, None].expand_as(pieces.start)
    rank, start, count = (x.flatten()[held] for x in (rank, pieces.start, pieces.count))
    if len(start) == 0:
        return QueryRuns(*(torch.zeros(0, dtype=torch.int64, device="cpu") for _ in range(4)))
    first, last = (
        torch.searchsorted(bounds, x, right=True) - 1 for x in (start, start + count - 1)
    )
    per_piece = last - first + 1
    piece = _arange(len(start)).repeat_interleave(per_piece)
    sequence = expand(first, per_piece)
    begin = torch.maximum(start[piece], bounds[sequence])
    end = torch.minimum(start[piece] + count[piece], bounds[sequence + 1])
    real = end > begin  # a piece may have empty sequences inside
    runs = QueryRuns(rank[piece], end - begin, begin - bounds[sequence], sequence)
    runs = QueryRuns(*(x[real] for x in runs))
    return _repeat(runs, len(bounds) - 1, batch)


def check_tiles(runs: QueryRuns, lengths: Tensor, config: NSAConfig):
    """Raise if a piece cuts a tile."""
    if config.selection == "token":
        return
    cut = runs.position % config.q_tile_size != 0
    if cut.any():
        at = int(cut.nonzero()[0])
        sequence = int(runs.sequence[at])
        raise ValueError(
            "pieces must start at multiples of q_tile_size in their sequence with "
            f"selection='tile': q_tile_size is {config.q_tile_size}, got a piece of rank "
            f"{int(runs.rank[at])} at position {int(runs.position[at])} of the "
            f"{int(lengths[sequence])} tokens of sequence {sequence}; pad sequences at the end, "
            "use another order or selection='token'"
        )


def _repeat(runs: QueryRuns, sequences: int, batch: int) -> QueryRuns:
    """The runs of each entry of a batch, all entries of a rank before the next rank."""
    if batch == 1:
        return runs
    entry = _arange(batch).repeat_interleave(len(runs.rank))
    rank, count, position, sequence = (x.repeat(batch) for x in runs)
    order = torch.sort(rank * batch + entry, stable=True).indices
    whole = (rank, count, position, sequence + entry * sequences)
    return QueryRuns(*(x[order] for x in whole))


def expand(start: Tensor, count: Tensor) -> Tensor:
    """``start[i], start[i] + 1, ...``, ``count[i]`` of them, one run after another."""
    end = count.cumsum(0)
    skipped = (start - (end - count)).repeat_interleave(count)
    return _arange(int(end[-1]) if len(end) else 0) + skipped


def _arange(count: int) -> Tensor:
    return torch.arange(count, device="cpu")
