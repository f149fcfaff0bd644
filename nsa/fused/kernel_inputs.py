"""The kernel contract: the calls that the fused stages make, and the plain data that they pass.

``nsa.fused.fa4`` implements these four calls with FlashAttention-4. Tests implement them with
PyTorch on a CPU, in any float dtype. Callers write ``fa4.dense_forward(...)``, so that a test can
replace the functions of that module. For all four:

- Query head ``h`` attends KV head ``h // (H / H_kv)``.
- ``scale`` multiplies ``q @ k^T``. Softmax is over the visible keys of a query. A query that sees
  none gets output 0 and ``lse`` -inf, and sends no gradient.
- ``lse`` is float32: the natural logarithm of the sum of ``exp(scale * q . k)`` over visible keys.
- Inputs may be strided (copied unless the last dimension is contiguous). ``out`` and ``lse`` are
  contiguous, and a gradient has the layout of its input. All but ``lse`` and ``statistics`` are in
  the dtype of ``q``. Gradients of ``k`` and ``v`` are summed over the heads of a group.
- Forward gives the same bits each time. Backward adds into float32 in any order.
- Values that no query may see must still be finite: they are multiplied by 0, not skipped.
- Backward takes, of the forward's results, only ``statistics``: :class:`RowStatistics`, two tensors
  in the shape of ``lse``, with any strides. ``dout`` is the gradient of ``out``, or of what ``out``
  is multiplied by a gate for; then the gate is in the statistics.

``dense_forward(q, k, v, *, scale, causal, window_size, key_times, cu_seqlens_q, cu_seqlens_k,
out, lse) -> (out, lse)`` and
``dense_backward(dout, q, k, v, statistics, *, ...the same, dq) -> (dq, dk, dv)``

    Batched ``q (B, Sq, H, D)``, ``k (B, Sk, H_kv, D)``, ``v (B, Sk, H_kv, Dv)``,
    ``out (B, Sq, H, Dv)``, ``lse (B, H, Sq)``. Packed, with ``cu_seqlens_*`` int32 ``(S + 1,)``:
    ``q (Tq, H, D)``, ``k (Tk, H_kv, D)``, ``lse (H, Tq)``.
    Sequences may end before the tensors do. Results past the end are not written, and backward
    does not read ``statistics`` there. If ``out`` and ``lse``, or ``dq``, are given, results are
    written to them; they may be strided.

    Positions are aligned at the end: query ``i`` of ``Sq`` has the position of key
    ``p = i + Sk - Sq``. With ``window_size=(left, right)`` it sees keys ``p - left`` to
    ``p + right`` inclusive; None is no bound. ``causal`` sets ``right`` to 0. ``key_times=(stride,
    first)`` excludes both and aligns nothing: query ``i`` sees keys ``j`` with
    ``j * stride + first <= i``. ``Dv`` may differ from ``D``, in backward only if ``H == H_kv``.

``sparse_forward(q, k, v, lists, *, scale, causal, key_limit) -> (out, lse)`` and
``sparse_backward(dout, q, k, v, statistics, lists, *, scale, causal, key_limit) -> (dq, dk, dv)``

    ``q (1, Tq, H, D)``, ``k (1, Tk, H_kv, D)``, ``v (1, Tk, H_kv, Dv)``, ``lse (1, H, Tq)``.
    A query sees the keys of the blocks listed for its block, if the mask allows it. ``causal`` is
    aligned at the end, ``key <= query + Tk - Tq``, and needs ``Tq <= Tk``. ``key_limit`` int32
    ``(Tq,)`` is ``key < key_limit[query]``. Not both may be given. ``lists`` are by query block in
    forward, and transposed, by key block, in backward. Both must name the same pairs.
"""

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

Pair = tuple[Tensor, Tensor]
"""Tensors of keys and of values, of one shape and dtype; strides may differ."""

MAX_BLOCKS = 256
"""The most blocks that a query tile may take: the best so far are in the registers of one warp."""


class BlockLists(NamedTuple):
    """The key blocks that each query block of each head attends, or the transpose.

    Forward: a row is a query block and entries are key blocks. Backward: a row is a key block and
    entries are query blocks. The last block of either kind may be short. Entries of a row ascend,
    do not repeat, and appear in at most one of the two lists; entries past the count are not read.

    Attributes:
        partial_count: int32 ``(1, H, rows)``, blocks to which the mask is applied.
        partial_index: int32 ``(1, H, rows, width)``, ``1 <= width <= number of blocks``.
        full_count: the same for blocks in which every pair is visible, so the mask is skipped.
            None if there are none.
        full_index: the same for those blocks; its width may differ.
        query_block: queries in a block, a multiple of 64.
        key_block: keys in a block, 64 or 128.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor | None
    full_index: Tensor | None
    query_block: int
    key_block: int


class RowStatistics(NamedTuple):
    """What the backward of attention needs of each row and head, beside its inputs.

    With ``P = exp2(scale * log2(e) * S - lse_log2)`` it is ``dV = P^T dout`` and
    ``dS = P * (dout V^T - delta)``. Float32, or in tests the dtype of sums.

    For attention alone, ``lse_log2`` is the log-sum-exp times log2(e) and ``delta`` the sum of
    ``dout * out``. A gate ``g`` of the output goes into the first: it is less by ``log2(g)``, so
    that P has the factor g, and ``dout`` is the gradient of the gated sum.

    Attributes:
        lse_log2: infinity, so that P is 0, for a row that sees no key or whose gate is 0.
        delta: any finite number where P is 0.
    """

    lse_log2: Tensor
    delta: Tensor


class Placement(NamedTuple):
    """Where every token's heads lie in a contiguous buffer of vectors ``(D,)``, or of numbers.

    Head ``h`` of token ``r`` is vector
    ``place[r] * unit + h // group * group_stride + h % group * head_stride`` of the buffer. A token
    without a place reads as 0 and is not written. No two tokens share a vector.

    Attributes:
        place: int32 ``(R,)``, contiguous; -1 for none. None if the place of token ``r`` is ``r``.
        unit: vectors from one place to the next.
        group: number of heads whose distance is ``head_stride``: those of a KV head, or all.
        group_stride: vectors from the first head of one group to the first of the next.
        head_stride: vectors from a head to the next of the group.
    """

    place: Tensor | None
    unit: int
    group: int
    group_stride: int
    head_stride: int = 1


def multiplies_gates(dtype: torch.dtype, gates: Tensor | None, weight: Tensor | None) -> bool:
    """Whether each branch gets an output gradient of its own, times its gate.

    Else the gate goes into the log-sum-exp. Gates that are given may be 0 or less, so they have no
    logarithm. And in float16 probabilities times a small gate are denormal: with a gate of 0.01 and
    16K keys, gradients of values then err by 2.5 % instead of 0.03 %.
    """
    return gates is not None or (weight is not None and dtype == torch.float16)


def new_statistics(lse: Tensor, placement: Placement, written: int) -> RowStatistics:
    """Statistics like ``lse``, of which a kernel will write so many by ``placement``.

    Where it may leave some unwritten, as in padding, P is 0.
    """
    statistics = RowStatistics(*torch.empty((2, *lse.shape), dtype=lse.dtype, device=lse.device))
    if placement.place is not None or lse.numel() > written:
        statistics.lse_log2.fill_(torch.inf)
        statistics.delta.zero_()
    return statistics


Placements = tuple[Placement | None, Placement | None]
"""Placements of the compressed and the selected branch; None for token order."""

IN_ORDER: Placements = (None, None)

StatisticsPlacements = tuple[Placement | None, Placement, Placement]
"""Where the log-sum-exps and statistics of the branches lie: compressed, selected, window. None if
there are no compressed tokens."""


MOST_FEW_KEYS = 4
"""Keys that a query of :class:`FewKeys` sees at most. In simulation, delta from the 16-bit output
makes gradients err 1.15 times as much as the reference's for 2 keys, and 0.98 for 4."""


class FewKeys(NamedTuple):
    """Queries that see 2 to ``MOST_FEW_KEYS`` neighbouring keys; int32 ``(R,)`` each.

    Attributes:
        query: row of q, -1 for none.
        first: row of k of the first key; 0 for none, because kernels read it all the same.
        keys: how many keys, at least 1.
    """

    query: Tensor
    first: Tensor
    keys: Tensor


MAX_GROUP = 32
"""The most query heads per KV head, because they share a thread's columns."""

WARPGROUPS = 2
"""Warpgroups of a CTA that have queries."""

TILE_FIELDS = 6
"""Fields of a tile of tokens, see :class:`TokenTiles`."""

PITCH = 74
"""Words between the sums of neighbouring tokens in shared memory. A word is skipped after 32 rows,
and 74 is 10 modulo 32. So both the stores of a warp (8 rows by 4 tokens) and the loads (every 4th
row) use all banks."""


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
        # 16 bytes more than a multiple, so that the 16-byte loads of four lanes use other banks.
        per_lane = self.columns // QUAD
        return -(-per_lane // 32) * 32 + 4


@functools.lru_cache(maxsize=None)
def choose_shape(head_dim: int, group: int) -> Shape:
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
        # A list of blocks for each segment, though segments of a sequence have the same blocks.
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
    # One more than there can be, so that the last run has an end.
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
