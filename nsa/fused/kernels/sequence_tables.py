"""Index tensors of packed sequences in two kernels, whatever there are of sequences and tables.

The first adds up how many items of each kind the sequences have: one CTA, a sequence a thread at a
time. In the second, a thread finds the sequence of one item and writes its entry of each table. All
sizes are arguments, so that there is one kernel of each for all configurations.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple, warp_prefix_sum
from nsa.fused.kernels.sequence_search import find_sequence
from nsa.fused.kernels.vectors import check_tensor, fake_flat
from nsa.fused.plan_tables import BOUNDS, Items, TableRule, Tables, count_items, table_shapes

_THREADS = 256
_KINDS = len(BOUNDS)
_ALIGNED = 32  # elements at whose multiples tables start: 128 bytes
_FIELDS = 6  # of a tile of tokens

_Rule = mlir_namedtuple(NamedTuple("_Rule", [(name, Int32) for name in TableRule._fields]))
_Items = mlir_namedtuple(NamedTuple("_Items", [(name, Int32) for name in Items._fields]))
_Starts = mlir_namedtuple(NamedTuple("_Starts", [(name, Int32) for name in Tables._fields]))
"""Where each table starts among all; -1 for a table that is not wanted."""

ITEMS_OF_TABLES = dict(
    queries=(
        "first_block", "candidates", "own_block", "first_column", "run_base", "place", "lse_place",
        "row_of_query",
    ),
    keys=("row_of_key", "blocks_of_token"),
    compressed=("row_of_compressed", "block_start"),
    selection=("block_first", "block_keys", "block_row"),
    runs=("run_first",),
    tiles=(
        "tile_fields", "cmp_first", "visible", "tile_candidates", "own", "num_blocks", "tile_count",
        "key_block_first", "key_blocks", "full_key_blocks", "cmp_block_first", "cmp_blocks",
        "full_cmp_blocks",
    ),
    rows=("query_of_row", "key_limit", "cmp_key_limit"),
    key_rows=("key_of_row",),
    cmp_rows=("compressed_of_row",),
    slots=("query_of_slot",),
    few=("few_query", "few_first", "few_count"),
)  # fmt: skip
"""The tables that have an entry for each item of a kind."""


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Boundaries of queries, of keys and of the items of ``BOUNDS``; and all tables."""

    queries: cute.Tensor
    keys: cute.Tensor
    bounds: cute.Tensor
    tables: cute.Tensor


class _Sequence(NamedTuple):
    """Where a sequence starts and how many items it has; the position of its first query."""

    query_start: Int32
    queries: Int32
    key_start: Int32
    keys: Int32
    first: Int32
    compressed_start: Int32
    compressed: Int32


def _bounds_of(mBounds: cute.Tensor, kind: str, sequences: Int32) -> cute.Tensor:
    pointer = mBounds.iterator + BOUNDS.index(kind) * (sequences + 1)
    return cute.make_tensor(pointer, cute.make_layout(sequences + 1))


def _sequence(tensors: _Tensors, rule: _Rule, s: Int32) -> _Sequence:
    compressed = _bounds_of(tensors.bounds, "compressed", rule.sequences)
    queries, keys = (x[s + 1] - x[s] for x in (tensors.queries, tensors.keys))
    return _Sequence(
        query_start=tensors.queries[s],
        queries=queries,
        key_start=tensors.keys[s],
        keys=keys,
        first=keys - queries,
        compressed_start=compressed[s],
        compressed=compressed[s + 1] - compressed[s],
    )


def _ceil_div(size: Int32, step: Int32) -> Int32:
    return (size + step - 1) // step


def _left_out(rule: _Rule, first: Int32) -> Int32:
    """Folded rows before the first query, at position ``first``."""
    return cutlass.max(first - (rule.covered - 1), Int32(0)) // rule.stride


@cute.jit
def _num_visible(rule: _Rule, position: Int32, covered: Int32, blocks: Int32) -> Int32:
    """Of the ``blocks`` of a sequence, those with ``covered`` tokens up to a position."""
    seen = blocks
    if rule.causal == 1:
        seen = cutlass.max(position + (rule.stride + 1 - covered), Int32(0)) // rule.stride
        seen = cutlass.min(seen, blocks)
    return seen


@cute.jit
def _put(mTables: cute.Tensor, start: Int32, i: Int32, value: Int32):
    if start >= 0:
        mTables[start + i] = value


class SequenceBounds:
    """``bounds (7, S + 1)`` of all kinds of items."""

    @cute.jit
    def __call__(
        self, mQueries: cute.Tensor, mKeys: cute.Tensor, mBounds: cute.Tensor, rule: _Rule, stream
    ):
        self.kernel(mQueries, mKeys, mBounds, rule).launch(
            grid=[1, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, mQueries: cute.Tensor, mKeys: cute.Tensor, mBounds: cute.Tensor, rule: _Rule):
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = tidx // WARP, tidx % WARP
        warps = _THREADS // WARP
        smem = cutlass.memory.SmemAllocator()
        sTotals = smem.allocate_tensor(Int32, cute.make_layout((_KINDS, warps)), byte_alignment=16)
        done, counts, through = (cute.make_rmem_tensor(_KINDS, Int32) for _ in range(3))
        done.fill(0)
        pitch = rule.sequences + 1
        if tidx < _KINDS:
            mBounds[tidx * pitch] = Int32(0)
        for step in cutlass.range(cute.ceil_div(rule.sequences, _THREADS), unroll=1):
            s = step * _THREADS + tidx
            counts.fill(0)
            if s < rule.sequences:
                queries = mQueries[s + 1] - mQueries[s]
                self._count(rule, queries, mKeys[s + 1] - mKeys[s], counts)
            for k in cutlass.range_constexpr(_KINDS):
                through[k] = warp_prefix_sum(counts[k], lane)
                if lane == WARP - 1:
                    sTotals[k, warp] = through[k]
            cute.arch.barrier()
            for k in cutlass.range_constexpr(_KINDS):
                end = done[k] + through[k]
                for w in cutlass.range_constexpr(warps):
                    total = sTotals[k, w]
                    end += total if w < warp else Int32(0)
                    done[k] = done[k] + total
                if s < rule.sequences:
                    mBounds[k * pitch + s + 1] = end
            # Before the next step writes the totals.
            cute.arch.barrier()

    @cute.jit
    def _count(self, rule: _Rule, queries: Int32, keys: Int32, counts: cute.Tensor):
        """The items of each kind of a sequence, in the order of ``BOUNDS``."""
        first = keys - queries
        compressed = cutlass.max(keys // rule.stride - (rule.overlap - 1), Int32(0))
        folded, runs = Int32(0), Int32(0)
        if queries > 0 or rule.whole == 1:
            folded = compressed + rule.extra_rows - _left_out(rule, first)
        if queries > 0:
            runs = _ceil_div(keys, rule.select_size) - first // rule.select_size
        counts[0] = compressed
        counts[1] = _ceil_div(keys, rule.select_size)
        counts[2] = _ceil_div(queries, rule.tile)
        counts[3] = folded
        counts[4] = _ceil_div(keys, rule.tile)
        counts[5] = _ceil_div(compressed, rule.cmp_key_block)
        counts[6] = runs


class PlanTables:
    """All tables. The second dimension of the grid is the kind of items."""

    @cute.jit
    def __call__(
        self, tensors: _Tensors, starts: _Starts, items: _Items, rule: _Rule, ctas: Int32, stream
    ):
        self.kernel(tensors, starts, items, rule).launch(
            grid=[ctas, len(Items._fields), 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, starts: _Starts, items: _Items, rule: _Rule):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, kind, _ = cute.arch.block_idx()
        i = bidx * _THREADS + tidx
        writers = (
            self._of_query, self._of_key, self._of_compressed, self._of_selection, self._of_run,
            self._of_tile, self._of_row, self._of_key_row, self._of_cmp_row, self._of_slot,
            self._of_few,
        )  # fmt: skip
        for k in cutlass.range_constexpr(len(writers)):
            if kind == k and i < items[k]:
                writers[k](tensors, starts, rule, i)

    @cute.jit
    def _of_query(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        mTables = tensors.tables
        s = find_sequence(tensors.queries, i, rule.sequences)
        own = _sequence(tensors, rule, s)
        selection, tiles, folded, runs = (
            _bounds_of(tensors.bounds, kind, rule.sequences)[s]
            for kind in ("selection", "tiles", "folded", "runs")
        )
        local = i - own.query_start
        position = own.first + local
        block = position // rule.select_size
        row, limit = Int32(-1), Int32(0)
        place, lse_place = Int32(-1), Int32(0)
        if local < own.queries:
            row = tiles * rule.tile + local
            limit = block + 1
            if rule.causal == 0:
                limit = _ceil_div(own.keys, rule.select_size)
            passed = position - (rule.covered - 1)
            if passed >= 0:
                first_row = folded - _left_out(rule, own.first)
                place = first_row * rule.stride + passed
                lse_place = place
        _put(mTables, starts.first_block, i, selection)
        _put(mTables, starts.candidates, i, limit)
        _put(mTables, starts.own_block, i, block)
        _put(mTables, starts.first_column, i, Int32(0))
        _put(mTables, starts.run_base, i, runs - own.first // rule.select_size)
        _put(mTables, starts.row_of_query, i, row)
        _put(mTables, starts.place, i, place)
        _put(mTables, starts.lse_place, i, lse_place)

    @cute.jit
    def _of_key(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        s = find_sequence(tensors.keys, i, rule.sequences)
        own = _sequence(tensors, rule, s)
        key_tiles = _bounds_of(tensors.bounds, "key_tiles", rule.sequences)[s]
        local = i - own.key_start
        row = Int32(-1)
        if local < own.keys:
            row = key_tiles * rule.tile + local
        _put(tensors.tables, starts.row_of_key, i, row)
        if starts.blocks_of_token >= 0:
            for earlier in cutlass.range(rule.overlap, unroll=1):
                block = local // rule.stride - earlier
                found = Int32(-1)
                if block >= 0 and block < own.compressed:
                    found = own.compressed_start + block
                tensors.tables[starts.blocks_of_token + i * rule.overlap + earlier] = found

    @cute.jit
    def _of_compressed(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        compressed, cmp_blocks = (
            _bounds_of(tensors.bounds, kind, rule.sequences)
            for kind in ("compressed", "cmp_key_blocks")
        )
        s = find_sequence(compressed, i, rule.sequences)
        own = _sequence(tensors, rule, s)
        local = i - own.compressed_start
        start, row = Int32(-1), Int32(-1)
        if local < own.compressed:
            start = own.key_start + local * rule.stride
            row = cmp_blocks[s] * rule.cmp_key_block + local
        _put(tensors.tables, starts.block_start, i, start)
        _put(tensors.tables, starts.row_of_compressed, i, row)

    @cute.jit
    def _of_selection(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        selection = _bounds_of(tensors.bounds, "selection", rule.sequences)
        s = find_sequence(selection, i, rule.sequences)
        own = _sequence(tensors, rule, s)
        done = (i - selection[s]) * rule.select_size
        keys = cutlass.min(cutlass.max(own.keys - done, Int32(0)), rule.select_size)
        _put(tensors.tables, starts.block_first, i, own.key_start + done)
        _put(tensors.tables, starts.block_keys, i, keys)
        _put(tensors.tables, starts.block_row, i, own.query_start - own.first + done)

    @cute.jit
    def _of_run(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        runs = _bounds_of(tensors.bounds, "runs", rule.sequences)
        s = find_sequence(runs, i, rule.sequences)
        own = _sequence(tensors, rule, s)
        local = i - runs[s]
        token = tensors.queries[rule.sequences]
        if i < runs[s + 1]:
            start = (own.first // rule.select_size + local) * rule.select_size
            token = own.query_start + cutlass.max(start - own.first, Int32(0))
        _put(tensors.tables, starts.run_first, i, token)

    @cute.jit
    def _of_tile(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        tiles = _bounds_of(tensors.bounds, "tiles", rule.sequences)
        s = find_sequence(tiles, i, rule.sequences)
        done = (i - tiles[s]) * rule.tile
        if starts.tile_fields >= 0:
            self._write_fields(tensors, starts, rule, i, done, s)
        if starts.own >= 0:
            self._write_tile(tensors, starts, rule, i, done, s)

    @cute.jit
    def _write_fields(
        self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32, done: Int32, s: Int32
    ):
        """See :class:`nsa.fused.token_inputs.TokenTiles`."""
        own = _sequence(tensors, rule, s)
        fields = (
            own.query_start + done,
            own.first + done,
            cutlass.min(cutlass.max(own.queries - done, Int32(0)), rule.tile),
            own.compressed_start,
            own.compressed,
            _ceil_div(own.keys, rule.select_size),
        )
        for field in cutlass.range_constexpr(_FIELDS):
            tensors.tables[starts.tile_fields + i * _FIELDS + field] = fields[field]

    @cute.jit
    def _write_tile(
        self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32, done: Int32, s: Int32
    ):
        """The tables of a tile that selects, whose first query is number ``done``."""
        mTables = tensors.tables
        own = _sequence(tensors, rule, s)
        key_tiles, cmp_blocks = (
            _bounds_of(tensors.bounds, kind, rule.sequences)[s]
            for kind in ("key_tiles", "cmp_key_blocks")
        )
        first = own.first + done
        end = first + (rule.tile - 1)
        last = cutlass.min(end, own.keys - 1)
        summary = last
        if rule.by_first == 1:
            summary = first
        num_blocks = _ceil_div(own.keys, rule.select_size)
        visible, candidates, key_blocks, listed = Int32(0), Int32(0), Int32(0), Int32(0)
        if done < own.queries:
            visible = _num_visible(rule, summary, rule.complete, own.compressed)
            candidates = end // rule.select_size + 1
            if rule.causal == 0:
                candidates = cutlass.max(candidates, num_blocks)
            key_blocks = _ceil_div(own.keys, rule.key_block)
            listed = _ceil_div(own.compressed, rule.cmp_key_block)
        _put(mTables, starts.cmp_first, i, own.compressed_start)
        _put(mTables, starts.visible, i, visible)
        _put(mTables, starts.tile_candidates, i, candidates)
        _put(mTables, starts.own, i, end // rule.select_size)
        _put(mTables, starts.num_blocks, i, num_blocks)
        _put(mTables, starts.tile_count, i, last - first + 1)
        _put(mTables, starts.key_block_first, i, key_tiles * rule.tile // rule.key_block)
        _put(mTables, starts.key_blocks, i, key_blocks)
        _put(mTables, starts.full_key_blocks, i, (first + 1) // rule.key_block)
        _put(mTables, starts.cmp_block_first, i, cmp_blocks)
        _put(mTables, starts.cmp_blocks, i, listed)
        seen = _num_visible(rule, first, rule.covered, own.compressed)
        _put(mTables, starts.full_cmp_blocks, i, seen // rule.cmp_key_block)

    @cute.jit
    def _of_row(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        tiles, key_tiles, cmp_blocks = (
            _bounds_of(tensors.bounds, kind, rule.sequences)
            for kind in ("tiles", "key_tiles", "cmp_key_blocks")
        )
        s = find_sequence(tiles, i // rule.tile, rule.sequences)
        own = _sequence(tensors, rule, s)
        local = i - tiles[s] * rule.tile
        query = Int32(-1)
        if local < own.queries:
            query = own.query_start + local
        limit = own.keys
        if rule.causal == 1:
            limit = cutlass.min(limit, own.first + local + 1)
        seen = _num_visible(rule, own.first + local, rule.covered, own.compressed)
        _put(tensors.tables, starts.query_of_row, i, query)
        _put(tensors.tables, starts.key_limit, i, key_tiles[s] * rule.tile + limit)
        cmp_limit = cmp_blocks[s] * rule.cmp_key_block + seen
        _put(tensors.tables, starts.cmp_key_limit, i, cmp_limit)

    @cute.jit
    def _of_key_row(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        key_tiles = _bounds_of(tensors.bounds, "key_tiles", rule.sequences)
        s = find_sequence(key_tiles, i // rule.tile, rule.sequences)
        own = _sequence(tensors, rule, s)
        local = i - key_tiles[s] * rule.tile
        key = Int32(-1)
        if local < own.keys:
            key = own.key_start + local
        _put(tensors.tables, starts.key_of_row, i, key)

    @cute.jit
    def _of_cmp_row(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        cmp_blocks = _bounds_of(tensors.bounds, "cmp_key_blocks", rule.sequences)
        s = find_sequence(cmp_blocks, i // rule.cmp_key_block, rule.sequences)
        own = _sequence(tensors, rule, s)
        local = i - cmp_blocks[s] * rule.cmp_key_block
        compressed = Int32(-1)
        if local < own.compressed:
            compressed = own.compressed_start + local
        _put(tensors.tables, starts.compressed_of_row, i, compressed)

    @cute.jit
    def _of_slot(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        folded = _bounds_of(tensors.bounds, "folded", rule.sequences)
        row = i // rule.stride
        s = find_sequence(folded, row, rule.sequences)
        own = _sequence(tensors, rule, s)
        # Counted from the first query of the sequence.
        row_in_sequence = row - folded[s] + _left_out(rule, own.first)
        index = row_in_sequence * rule.stride + (rule.covered - 1) + i % rule.stride - own.first
        query = Int32(-1)
        if row < folded[s + 1] and index >= 0 and index < own.queries:
            query = own.query_start + index
        _put(tensors.tables, starts.query_of_slot, i, query)

    @cute.jit
    def _of_few(self, tensors: _Tensors, starts: _Starts, rule: _Rule, i: Int32):
        s = i // rule.few
        own = _sequence(tensors, rule, s)
        # From the first position that sees two keys.
        position = i % rule.few + (rule.covered - 1 + rule.stride)
        local = position - own.first
        count = _num_visible(rule, position, rule.covered, own.compressed)
        query = Int32(-1)
        if local >= 0 and local < own.queries and count > 1:
            query = own.query_start + local
        _put(tensors.tables, starts.few_query, i, query)
        # A sequence without blocks may start behind the last row of k.
        first = own.compressed_start if query >= 0 else Int32(0)
        _put(tensors.tables, starts.few_first, i, first)
        _put(tensors.tables, starts.few_count, i, cutlass.max(count, Int32(1)))


def _fakes(count: int) -> list:
    return [fake_flat(Int32, alignment=4) for _ in range(count)]


def _ones(kind: type) -> tuple:
    return kind(*(Int32(1) for _ in kind._fields))


@kept
def compile_bounds() -> Callable:
    """The compiled kernel that adds up."""
    return compile_kernel(SequenceBounds(), *_fakes(3), _ones(_Rule))


@kept
def compile_tables() -> Callable:
    """The compiled kernel that writes tables."""
    numbers = (_ones(_Starts), _ones(_Items), _ones(_Rule), Int32(1))
    return compile_kernel(PlanTables(), _Tensors(*_fakes(4)), *numbers)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    yield "plan-bounds", compile_bounds
    yield "plan-tables", compile_tables


def sequence_bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor, rule: TableRule) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.sequence_bounds`."""
    _check(cu_seqlens, cu_seqlens_k, rule)
    shape = (_KINDS, rule.sequences + 1)
    bounds = torch.empty(shape, dtype=torch.int32, device=cu_seqlens.device)
    given = (cu_seqlens.contiguous(), cu_seqlens_k.contiguous())
    compile_bounds()(*given, bounds.view(-1), _Rule(*map(int, rule)))
    return bounds


def plan_tables(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, bounds: Tensor, rule: TableRule, means: bool
) -> Tables:
    """See :func:`nsa.fused.kernel_calls.plan_tables`."""
    _check(cu_seqlens, cu_seqlens_k, rule)
    shape = (_KINDS, rule.sequences + 1)
    check_tensor("bounds", bounds, shape, torch.int32, cu_seqlens.device)
    layout = _layout(rule, means)
    tables = torch.empty(layout.total, dtype=torch.int32, device=cu_seqlens.device)
    given = (cu_seqlens.contiguous(), cu_seqlens_k.contiguous())
    tensors = _Tensors(*given, bounds.view(-1), tables)
    ctas = -(-max(layout.items) // _THREADS)
    if ctas:
        numbers = (layout.starts, layout.items, _Rule(*map(int, rule)), ctas)
        compile_tables()(tensors, *numbers)
    parts = tables.split(layout.pieces)[::2]
    shaped = {
        name: part if len(shape) == 1 else part.view(shape)
        for part, (name, shape) in zip(parts, table_shapes(rule, means).items(), strict=True)
    }
    return Tables(**shaped)


class _Layout(NamedTuple):
    """Where tables start; items to write for; lengths of tables and of gaps in turn; their sum."""

    starts: tuple
    items: tuple
    pieces: list[int]
    total: int


@functools.lru_cache(maxsize=256)
def _layout(rule: TableRule, means: bool) -> _Layout:
    starts = dict.fromkeys(Tables._fields, -1)
    pieces, total, shapes = [], 0, table_shapes(rule, means)
    for name, shape in shapes.items():
        starts[name], size = total, math.prod(shape)
        pieces += [size, -size % _ALIGNED]
        total += sum(pieces[-2:])
    counts = count_items(rule)._asdict()
    for kind, names in ITEMS_OF_TABLES.items():
        if shapes.keys().isdisjoint(names):
            counts[kind] = 0
    return _Layout(_Starts(**starts), _Items(**counts), pieces, total)


def _check(cu_seqlens: Tensor, cu_seqlens_k: Tensor, rule: TableRule) -> None:
    """Raise on what the kernels cannot take."""
    for name, bounds in (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, bounds, (rule.sequences + 1,), torch.int32, cu_seqlens.device)
        if not bounds.is_cuda:
            raise ValueError(f"{name} is on {bounds.device}; it must be on a GPU")
