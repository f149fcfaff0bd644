"""Sequences cut into pieces: each has some of the queries, and the keys up to its last query."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from nsa.testing import make_cu_seqlens
from tests.helpers.strategies import Problem, leaves

CLOSE = dict(rtol=0, atol=1e-10)
Span = tuple[int, int]
"""Queries ``[start, stop)`` of a sequence, with its keys ``[0, stop)``."""


class Piece(NamedTuple):
    """Some queries of a problem. Its tensors are views or copies that differentiate to the whole's.

    ``rows`` and ``units`` are the whole's rows of q, and rows of block indices, that it has.
    """

    problem: Problem
    rows: Tensor
    units: Tensor


class CutProblem(NamedTuple):
    """A problem, and the span of each sequence in each piece. A batch has one for all entries."""

    whole: Problem
    pieces: list[list[Span]]


def lengths_of(problem: Problem) -> list[int]:
    """The length of each packed sequence, or the one length of a batch."""
    if problem.q.ndim == 4:
        return [problem.q.shape[1]]
    return problem.extras["cu_seqlens"].diff().tolist()


@st.composite
def cut_problems(draw, problems: st.SearchStrategy[Problem]) -> CutProblem:
    """A problem cut anywhere, in tile mode at tiles.

    If queries see later keys, the pieces would lack them; then there is one piece, with all keys.
    """
    problem = draw(problems)
    config = problem.config
    unit = 1 if config.selection == "token" else config.q_tile_size
    lengths = lengths_of(problem)
    sees_ahead = not config.causal or config.compressed_visibility == "started"
    cuts = 1 if sees_ahead else draw(st.integers(0, 3))

    def bounds(length: int) -> list[int]:
        tiles = st.integers(0, -(-length // unit))
        drawn = sorted(min(length, draw(tiles) * unit) for _ in range(cuts))
        return [*drawn, length] if sees_ahead else [0, *drawn, length]

    edges = [bounds(length) for length in lengths]
    count = 1 if sees_ahead else cuts + 1
    return CutProblem(problem, [[(e[i], e[i + 1]) for e in edges] for i in range(count)])


def cut(problem: Problem, spans: list[Span]) -> Piece:
    """The queries of ``spans``, one span a sequence."""
    q, k, v, config, extras = problem
    lengths, packed = lengths_of(problem), q.ndim == 3
    size, stride, tile = config.compress_block_size, config.compress_stride, config.q_tile_size

    def num_blocks(length):
        return max(0, (length - size) // stride + 1)

    def runs(count, pairs):
        """Consecutive runs of the spans, in sequences of ``count(length)`` items each."""
        starts = make_cu_seqlens([count(n) for n in lengths])[:-1].tolist()
        found = [torch.arange(s + a, s + b) for s, (a, b) in zip(starts, pairs, strict=True)]
        return torch.cat([torch.arange(0), *found])

    rows = runs(lambda n: n, spans)
    keys = runs(lambda n: n, [(0, stop) for _, stop in spans])
    blocks = runs(num_blocks, [(0, num_blocks(stop)) for _, stop in spans])
    # A span without queries may stop inside a tile, of which it then has no part.
    of_tiles = [(a // tile, -(-b // tile) if b > a else a // tile) for a, b in spans]
    tiles = runs(lambda n: -(-n // tile), of_tiles)

    def take(x, index):
        if isinstance(x, tuple):
            return tuple(take(part, index) for part in x)
        return x.index_select(0 if packed else 1, index)

    own = {name: x for name, x in extras.items() if name.endswith("weight")}
    if "gates" in extras:
        own["gates"] = take(extras["gates"], rows)
    if "compressed_kv" in extras:
        own["compressed_kv"] = take(extras["compressed_kv"], blocks)
    if packed:
        own["cu_seqlens"] = make_cu_seqlens([b - a for a, b in spans])
        own["cu_seqlens_k"] = make_cu_seqlens([b for _, b in spans])
        if "max_seqlen" in extras:
            own["max_seqlen"] = own["max_seqlen_k"] = extras["max_seqlen"]
    part = Problem(take(q, rows), take(k, keys), take(v, keys), config, own)
    return Piece(part, rows, rows if config.selection == "token" else tiles)


def rows_of(x: Tensor, piece: Piece) -> Tensor:
    """The piece's rows of the whole's output, or of a gradient of it."""
    return x.index_select(0 if x.ndim == 3 else 1, piece.rows)


def units_of(block_indices: Tensor, piece: Piece) -> Tensor:
    """The piece's rows of the whole's block indices."""
    # Token mode (B, N, H_kv, n) or (T, H_kv, n), tile mode (B, H, tiles, n) or (H, tiles, n).
    axis = -3 if piece.problem.config.selection == "token" else -2
    return block_indices.index_select(axis, piece.units)


def _gradients(outs: list[Tensor], inputs: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(outs, inputs, douts, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]


def assert_pieces_equal_whole(case: CutProblem, backend: str, *, given_indices: bool) -> None:
    """Compare outputs row by row, and the sums of the pieces' gradients, with those of the whole.

    ``given_indices`` tells whether the caller passes the blocks that the whole selects.
    """
    whole = case.whole
    inputs = [x.requires_grad_() for x in leaves(whole)]
    fixed = {"backend": backend}
    indices = whole.select_blocks(**fixed) if given_indices else None
    out = whole.forward(**fixed, block_indices=indices)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    seen = torch.zeros(out.shape[0 if out.ndim == 3 else 1], dtype=torch.bool)
    outs, douts = [], []
    for spans in case.pieces:
        piece = cut(whole, spans)
        own = None if indices is None else units_of(indices, piece)
        outs.append(piece.problem.forward(**fixed, block_indices=own))
        torch.testing.assert_close(outs[-1], rows_of(out, piece), **CLOSE)
        douts.append(rows_of(dout, piece))
        seen[piece.rows] = True
    actual = _gradients(outs, inputs, douts)
    masked = dout * seen[:, None, None]
    for found, expected in zip(actual, _gradients([out], inputs, [masked]), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
