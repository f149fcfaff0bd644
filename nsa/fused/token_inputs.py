"""The plain data of token mode's kernels: what tokens score, and what they may attend."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.blocks import covered_tokens, overlap_weights
from nsa.config import NSAConfig
from nsa.fused.hardware import QUAD, SHARED_BYTES, WGMMA_ROWS
from nsa.fused.plan_tables import TableRule, Tables, expect
from nsa.geometry import Geometry
from nsa.segments import QuerySegments, Segments, equal_segments, locate_items, prefix_sum

MAX_GROUP = 32
"""The most query heads per KV head, because they share a thread's columns."""


WARPGROUPS = 2
"""Warpgroups of a CTA that have queries."""


TILE_FIELDS = 6
"""Fields of a tile of tokens, see :class:`TokenTiles`."""


PITCH = 74
"""Words between the sums of neighbouring tokens in shared memory. One word is skipped after 32
rows. With 74, which is 10 modulo 32, the stores of a warp (8 rows by 4 tokens) and its loads (every
4th row) use all banks."""


class Rule(NamedTuple):
    """The part of a configuration that the kernel is compiled for. Sizes are in tokens."""

    block_size: int
    stride: int
    select_size: int
    covered: int
    causal: bool

    @classmethod
    def of(cls, config: NSAConfig) -> "Rule":
        return cls(
            config.compress_block_size,
            config.compress_stride,
            config.select_block_size,
            covered_tokens(config, config.compressed_visibility),
            config.causal,
        )

    @property
    def per_select(self) -> int:
        return self.select_size // self.stride

    @property
    def per_compress(self) -> int:
        return self.block_size // self.stride

    @property
    def rows(self) -> int:
        """Compressed tokens from one tile to the next: whole selection blocks."""
        return WGMMA_ROWS // self.per_select * self.per_select

    @property
    def carried(self) -> int:
        """Compressed tokens before a selection block that overlap it."""
        return self.per_compress - 1

    def weights(self) -> list[int]:
        config = NSAConfig(
            selection="token",
            compress_block_size=self.block_size,
            compress_stride=self.stride,
            select_block_size=self.select_size,
        )
        return overlap_weights(config)


class Shape(NamedTuple):
    """The layout of a CTA's queries.

    A lane has ``tokens`` tokens in a unit, and a unit has ``columns`` columns, at most 128. A
    warpgroup has ``parts`` units side by side. There are ``stages`` tiles of compressed keys.
    """

    tokens: int
    columns: int
    parts: int
    stages: int

    @property
    def unit_tokens(self) -> int:
        return QUAD * self.tokens

    @property
    def tile_tokens(self) -> int:
        return WARPGROUPS * self.parts * self.unit_tokens

    @property
    def lse_pitch(self) -> int:
        # 16 bytes past a multiple of 128, so that the 16-byte loads of four lanes use different
        # banks.
        per_lane = self.columns // QUAD
        return -(-per_lane // 32) * 32 + 4


def find_shape(head_dim: int, group: int) -> Shape:
    """The largest shape that fits shared memory and still loads keys ahead."""
    for per_lane, parts in ((32, 2), (32, 1), (16, 2), (16, 1)):
        tokens = max(1, per_lane // group)
        columns = QUAD * (-(-tokens * group // 2) * 2)
        shape = Shape(tokens, columns, parts, 0)
        stages = (SHARED_BYTES - _bytes_but_keys(shape, head_dim)) // (WGMMA_ROWS * head_dim * 2)
        # With one part, two tiles are in use at a time.
        if stages >= (3 if parts == 2 else 4):
            return shape._replace(stages=min(stages, 5))
    # At least two stages fit, at the largest head dimension and group.
    return shape._replace(stages=stages)


choose_shape = functools.lru_cache(maxsize=None)(find_shape)
""":func:`find_shape`, cached. torch.compile warns about cached functions."""


def _bytes_but_keys(shape: Shape, head_dim: int) -> int:
    """Bytes of shared memory without the tiles of compressed keys, alignment included."""
    units = WARPGROUPS * shape.parts
    queries = units * shape.columns * head_dim * 2
    sums = WARPGROUPS * 2 * shape.unit_tokens * PITCH * 4
    lse = units * QUAD * shape.lse_pitch * 4
    bounds = 2 * shape.tile_tokens * 4
    return queries + sums + lse + bounds + 4096


class TokenTiles(NamedTuple):
    """The tokens of an entry of the batch, in tiles that do not mix segments.

    Args:
        fields: int32 ``(tiles, 6)``. For each tile: its first token, a row of q; that token's
            position in the sequence of keys; and the number of tokens. For that sequence: the first
            compressed token, their number, and the number of selection blocks. Tiles past the last
            have no tokens.
        first: int32 ``(chunks,)``, the first tile with tokens of each chunk.
        chunk: tokens of a chunk.
        grid: an upper bound on the tiles with tokens of a chunk.
    """

    fields: Tensor
    first: Tensor
    chunk: int
    grid: int


def make_token_tiles(
    geometry: Geometry, tile_tokens: int, chunk: int, fields: Tensor | None = None
) -> TokenTiles:
    """Tiles of at most ``tile_tokens`` tokens, for chunks of ``chunk`` tokens. No host sync.

    ``fields`` are those of the tiles, if they are known.
    """
    rows = geometry.queries.rows
    total = rows.total // tile_tokens + rows.num_sequences
    if fields is None:
        fields = _tile_fields(geometry, tile_tokens, total)
    if 0 < rows.total <= chunk:
        # The first tile with tokens is number 0, as its first token is.
        return TokenTiles(fields, fields[0, :1], chunk, total)
    chunks = torch.arange(0, max(1, rows.total), chunk, dtype=torch.int32, device=fields.device)
    end = fields[:, 0] + fields[:, 2]
    first = torch.searchsorted(end, chunks, right=True, out_int32=True)
    grid = min(total, chunk // tile_tokens + rows.num_sequences + 1)
    return TokenTiles(fields, first, chunk, grid)


def _tile_fields(geometry: Geometry, tile_tokens: int, total: int) -> Tensor:
    """``TokenTiles.fields``."""
    queries, rows, compressed = geometry.queries, geometry.queries.rows, geometry.compressed
    segment, index = locate_items(prefix_sum(-(-rows.count // tile_tokens)), total)
    done = index * tile_tokens
    owner = queries.sequence_of(segment)
    fields = [
        rows.offset[segment] + done,
        queries.positions(done, segment),
        (rows.count[segment] - done).clamp(0, tile_tokens),
        compressed.offset[owner],
        compressed.count[owner],
        geometry.selection.count[owner],
    ]
    return torch.stack(fields, dim=1).int()


class TokenBlocks(NamedTuple):
    """The blocks of each segment's sequence, numbered consecutively, and the tokens of q.

    Block ``J`` of a token's sequence is block ``base + J`` overall, and the token may attend it if
    ``0 <= J < limit``. With a causal mask the token in row ``r`` of q sees the first
    ``r - row + 1`` keys of a block. The tokens of a segment that are in one block are a run; block
    ``J`` of their sequence is run ``run_base + J``. Runs are in the order of the tokens. All
    tensors are int32.

    If each sequence has as many queries as keys, the segments are the sequences, and ``row`` and
    ``run_first`` are ``first``, and ``run_base`` is ``base``.

    Args:
        base: ``(T,)``, the first block of each token's segment.
        limit: ``(T,)``, how many blocks each token may attend; 0 for tokens of no segment.
        first: ``(blocks,)``, the first key of each block, a row of k.
        keys: ``(blocks,)``, keys in each block; 0 for blocks of no sequence.
        row: ``(blocks,)``, where in q a token of the segment at the block's first key would be. It
            may lie outside of the segment, or be negative.
        run_base: ``(T,)``, see above.
        run_first: ``(runs,)``, the first token of each run; the end of all segments for the rest.
        segments: number of segments.
        earlier: keys that precede the queries, in all segments together.
    """

    base: Tensor
    limit: Tensor
    first: Tensor
    keys: Tensor
    row: Tensor
    run_base: Tensor
    run_first: Tensor
    segments: int
    earlier: int

    def most_runs(self, tokens: int, block_size: int) -> int:
        """Upper bound on the runs that have one of ``tokens`` consecutive tokens."""
        # A segment that starts in the range has one short run, or two if its first block is not
        # whole; the segment before the range has two.
        short = min(self.segments, tokens) * (2 if self.earlier else 1) + 1
        return min(tokens, tokens // block_size + short)


def make_token_blocks(geometry: Geometry, batch: int) -> TokenBlocks:
    """The blocks of a batch of ``batch`` entries, each as in ``geometry``."""
    queries, keys, blocks = geometry.queries, geometry.keys, geometry.selection
    whole, times = queries.rows is keys, 1
    if batch > 1:
        keys, blocks = (_repeat(x, batch) for x in (keys, blocks))
        rows = keys if whole else _repeat(queries.rows, batch)
        queries = _repeat_queries(queries, rows, geometry.keys.num_sequences, batch)
    size, rows, sequence = geometry.config.select_block_size, queries.rows, queries.sequence
    if sequence is not None:
        # Each segment gets a list of blocks of its own, though segments of one sequence have equal
        # lists.
        times = -(-rows.num_sequences // keys.num_sequences)
        blocks = Segments(prefix_sum(blocks.count[sequence]), times * blocks.total)
    done, owner = blocks.local * size, queries.sequence_of(blocks.owner)
    base = blocks.offset[rows.owner].int()
    first = (keys.offset[owner] + done).int()
    limit = blocks.count[rows.owner]
    if geometry.config.causal:
        limit = queries.position // size + 1
    row, run_base, run_first = first, base, first
    if not whole:
        row = (rows.offset[blocks.owner] - queries.first_of(blocks.owner) + done).int()
        run_base, run_first = _find_runs(queries, size)
    return TokenBlocks(
        base=base,
        limit=torch.where(rows.real, limit, 0).int(),
        first=first,
        keys=(keys.count[owner] - done).clamp(0, size).int(),
        row=row,
        run_base=run_base,
        run_first=run_first,
        segments=rows.num_sequences,
        earlier=times * keys.total - rows.total,
    )


def blocks_of_tables(tables: Tables, rule: TableRule) -> TokenBlocks:
    """The blocks of packed sequences from the tables that a kernel made."""
    first, base = tables.block_first, tables.first_block
    row, run_base, run_first = first, base, first
    if not rule.whole:
        row, run_base, run_first = tables.block_row, tables.run_base, tables.run_first
    return TokenBlocks(
        base=expect(base),
        limit=expect(tables.candidates),
        first=expect(first),
        keys=expect(tables.block_keys),
        row=expect(row),
        run_base=expect(run_base),
        run_first=expect(run_first),
        segments=rule.sequences,
        earlier=rule.keys - rule.queries,
    )


def _find_runs(queries: QuerySegments, size: int) -> tuple[Tensor, Tensor]:
    """``run_base`` and ``run_first`` of :class:`TokenBlocks`, for blocks of ``size`` keys."""
    rows = queries.rows
    first = queries.first + torch.zeros_like(rows.count)
    before = first // size
    count = (first + rows.count + (size - 1)) // size - before
    offset = prefix_sum(torch.where(rows.count > 0, count, 0))
    # One row more than there can be runs, so that the last run has an end.
    runs = Segments(offset, min(rows.total, rows.total // size + 2 * rows.num_sequences) + 1)
    owner = runs.owner
    skipped = ((before[owner] + runs.local) * size - first[owner]).clamp(min=0)
    run_first = torch.where(runs.real, rows.offset[owner] + skipped, rows.offset[-1])
    return (offset[:-1] - before)[rows.owner].int(), run_first.int()


def _repeat(items: Segments, times: int) -> Segments:
    """The sequences of one entry, for each of ``times`` entries."""
    if items.single:
        return equal_segments(times, items.total, items.device)
    start = torch.arange(times, device=items.device)[:, None] * items.total + items.offset[:-1]
    return Segments(pad(start.flatten(), (0, 1), value=times * items.total), times * items.total)


def _repeat_queries(
    queries: QuerySegments, rows: Segments, sequences: int, times: int
) -> QuerySegments:
    """The segments of one entry, of ``sequences`` sequences, for each of ``times`` entries.

    ``rows`` are those of all entries.
    """
    first, sequence = queries.first, queries.sequence
    if not isinstance(first, int):
        first = first.repeat(times)
    if sequence is not None:
        entry = torch.arange(times, device=rows.device)[:, None]
        sequence = (entry * sequences + sequence).flatten()
    return QuerySegments(rows, first, sequence)
