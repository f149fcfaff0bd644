"""Partial gradients of queries, one for each pair of a token and a block, and their sum.

In bfloat16 a pair's partial gradient is packed, 12 bits a number, see
:mod:`nsa.fused.kernels.partial_rows`. In float16 it is stored in 16-bit floats of 11 bits, scaled
in each *part* of a row's columns by a power of two, so that the largest stands between 2^14 and
2^15. bfloat16 itself has 8 bits and would not do: a row of dS adds up to 0, so the partial
gradients of keys with a mean cancel.

They lie in the order in which threads have them after a wgmma: a warp stores, and loads, 512
neighbouring bytes at once. Row ``r`` is query head ``r % G`` of the pair at position ``r // G`` of
the wave. :class:`AddPartials` adds the pairs of each token in the order of its slots, so the sum
has the same bits each time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr

from nsa.fused.hardware import QUAD, WARP, WGMMA_ROWS
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.forward_tiles import GROUP_COLUMNS, row_words
from nsa.fused.kernels.hopper import (
    cvt_f16,
    fmax,
    fmax_reduce,
    mlir_namedtuple,
    reshape_acc_to_mn,
    store_v4,
)
from nsa.fused.kernels.inverted_index import load_slots
from nsa.fused.kernels.partial_rows import PartialRows
from nsa.fused.kernels.query_sums import (
    OtherTensors,
    fake_others,
    gate_terms,
    load_dlogits,
    load_sums,
    sums_place,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    copy_vector,
    exchange_in_quad,
    fake_flat,
)

_THREADS = 128
# Partial gradients that a thread loads together; packed ones have several vectors.
_LOADS = 16
_PACKED_LOADS = 8
# Rows whose partial gradients lie together.
_ROWS = 8
# The exponent of the largest number of a part, after scaling.
_EXPONENT = 14
_BIAS = 127
_MANTISSA = 23


@mlir_namedtuple
class Partials(NamedTuple):
    """Packed rows alone; or float16 ``[row / 8][columns / 32][row % 8][32]``, and what to multiply
    them by: float32 ``[row / 8][part][row % 8]``."""

    values: cute.Tensor
    factor: cute.Tensor | None


class PartialFormat:
    """How rows of ``head_dim`` numbers are kept, in parts of ``columns``.

    ``rows`` is None where they are not packed: in float16, and where a part ends within a vector.
    """

    def __init__(self, dtype: type[cutlass.Numeric], head_dim: int, columns: int):
        self.head_dim = head_dim
        self.columns = columns
        self.parts = head_dim // columns
        self.rows = None
        if dtype is BFloat16 and columns % GROUP_COLUMNS == 0:
            self.rows = PartialRows(dtype, columns, packed=True, parts=self.parts)

    def new(self, rows: int, device: torch.device) -> Partials:
        """Room for ``rows``, a multiple of 8."""
        if self.rows is not None:
            words = rows * self.parts * QUAD * self.rows.words
            return Partials(torch.empty(words, dtype=torch.int32, device=device), None)
        values = torch.empty(rows * self.head_dim, dtype=torch.float16, device=device)
        factor = torch.empty(rows * self.parts, dtype=torch.float32, device=device)
        return Partials(values, factor)

    def fakes(self) -> Partials:
        """Stand-ins, to compile with."""
        if self.rows is not None:
            return Partials(fake_flat(Int32), None)
        return Partials(fake_flat(Float16), fake_flat(Float32, alignment=4))

    def place(self, row: Int32, lane: Int32) -> tuple:
        """Where the first of a thread's two rows of 64 lies, for :meth:`store`."""
        if self.rows is not None:
            return self.rows.place(row, lane % QUAD)
        return partial_row(row, lane, self.parts, self.columns)

    @cute.jit
    def store(
        self,
        accs: list[cute.Tensor],
        wait: Callable[[int], None],
        partials: Partials,
        place: tuple,
        tile: Int32,
        count: Int32,
        part: Int32 | int,
    ):
        """Round and store a part of the columns of a tile of 64 rows.

        Args:
            accs: the wgmma accumulators of the part's columns.
            wait: until the accumulator of a number is there.
            partials: where to.
            place: of the thread's first row of tile 0.
            tile: which tile.
            count: how many of the tile's rows there are from the thread's first one on.
            part: which.
        """
        if const_expr(self.rows is not None):
            words = [[], []]
            for j in cutlass.range_constexpr(len(accs)):
                wait(j)
                for r in cutlass.range_constexpr(2):
                    words[r] += self.rows.of_accumulator(accs[j], r)
            for r in cutlass.range_constexpr(2):
                if _ROWS * r < count:
                    more = tile * WGMMA_ROWS + _ROWS * r
                    self.rows.store(words[r], partials.values, place, more, part)
        else:
            largest = cute.make_rmem_tensor(2, Float32)
            largest.fill(0.0)
            for j in cutlass.range_constexpr(len(accs)):
                wait(j)
                find_largest(accs[j], largest)
            scaled = cute.make_rmem_tensor((self.columns // 8, 2), Int32)
            factors = cute.make_rmem_tensor(2, Float32)
            scale_partial(accs, largest, scaled, factors)
            store_partial(scaled, factors, partials, place, tile, count, part, self.parts)


@cute.jit
def find_largest(acc: cute.Tensor, largest: cute.Tensor):
    """Raise ``largest (2,)`` to the largest size of the thread's numbers in each of its two rows of
    a wgmma accumulator."""
    acc_mn = reshape_acc_to_mn(acc)
    for r in cutlass.range_constexpr(2):
        size = cute.make_rmem_tensor(cute.size(acc_mn, mode=[1]), Float32)
        size.store(cute.math.absf(acc_mn[r, None].load()))
        largest[r] = fmax(largest[r], fmax_reduce(size.load()))


@cute.jit
def scale_partial(
    accs: list[cute.Tensor], largest: cute.Tensor, words: cute.Tensor, factor: cute.Tensor
):
    """Scale and round the two rows of a part that a thread has in wgmma accumulators.

    Args:
        accs: the accumulators of the part's columns.
        largest: Float32 ``(2,)``, what :func:`find_largest` gives for these.
        words: Int32 ``(columns / 8, 2)``, two columns each, for the two rows.
        factor: Float32 ``(2,)``, what to multiply each row by.
    """
    rows = [reshape_acc_to_mn(acc) for acc in accs]
    columns = const_expr(cute.size(rows[0], mode=[1]))
    for r in cutlass.range_constexpr(2):
        of_row = cute.arch.warp_reduction_max(largest[r], threads_in_group=QUAD)
        # So that both factors are normal numbers.
        exponent = cutlass.max(of_row.bitcast(Int32) >> _MANTISSA, _EXPONENT + 1)
        scale = ((2 * _BIAS + _EXPONENT - exponent) << _MANTISSA).bitcast(Float32)
        factor[r] = ((exponent - _EXPONENT) << _MANTISSA).bitcast(Float32)
        for i in cutlass.range_constexpr(len(rows)):
            values = cute.make_rmem_tensor(columns, Float32)
            values.store(rows[i][r, None].load() * scale)
            rounded = cute.recast_tensor(cvt_f16(values, Float16), Int32)
            for w in cutlass.range_constexpr(columns // 2):
                words[i * (columns // 2) + w, r] = rounded[w]


@mlir_namedtuple
class PartialRow(NamedTuple):
    """Where the first of a thread's two rows of 64 and its factor lie. The other is the 8th after.

    This is computed once: from row to row, tile to tile and part to part, places differ by
    constants.
    """

    offset: Int64
    factor: Int64


def partial_row(row: Int32, lane: Int32, parts: int, columns: int) -> PartialRow:
    """The place of a thread's ``row``, which has ``parts`` parts of ``columns`` columns."""
    rows, within = row // _ROWS, row % _ROWS
    offset = Int64(rows) * (_ROWS * parts * columns)
    offset += within * GROUP_COLUMNS + lane % QUAD * VECTOR
    return PartialRow(offset, Int64(rows) * (_ROWS * parts) + within)


@cute.jit
def store_partial(
    words: cute.Tensor,
    factor: cute.Tensor,
    partials: Partials,
    place: PartialRow,
    tile: Int32,
    count: Int32,
    part: Int32 | int,
    parts: cutlass.Constexpr[int],
):
    """Store a part of the columns of a tile of 64 rows.

    Args:
        words, factor: what :func:`scale_partial` gives.
        partials: where to.
        place: of the thread's first row of tile 0.
        tile: which tile.
        count: how many of the tile's rows there are from the thread's first one on.
        part: which of ``parts`` parts.
    """
    columns = const_expr(2 * QUAD * cute.size(words, mode=[0]))
    tile_rows = const_expr(WGMMA_ROWS * parts)
    for r in cutlass.range_constexpr(2):
        row = place.offset + Int64(tile) * (tile_rows * columns) + r * (_ROWS * parts * columns)
        at_factor = place.factor + Int64(tile) * tile_rows + (r * parts + part) * _ROWS
        if _ROWS * r < count:
            # All threads of a quad store the same.
            partials.factor[at_factor] = factor[r]
            if const_expr(columns % GROUP_COLUMNS == 0):
                for i in cutlass.range_constexpr(columns // GROUP_COLUMNS):
                    at = row + (part * columns + i * GROUP_COLUMNS) * _ROWS
                    vector = [words[QUAD * i + w, r] for w in range(QUAD)]
                    # Marked to leave L2 first: partial results are larger than L2.
                    store_v4(partials.values.iterator + at, *vector, cop="cs")
            else:
                # A part starts or ends within a group of columns.
                halves = const_expr(2 * columns // GROUP_COLUMNS)
                for i in cutlass.range_constexpr(halves):
                    half = part * halves + i
                    at = row + (half // 2 * (_ROWS * GROUP_COLUMNS) + half % 2 * (VECTOR // 2))
                    pointer = partials.values.iterator + cute.assume(at, divby=VECTOR // 2)
                    target = cute.make_tensor(pointer, cute.make_layout(VECTOR // 2))
                    source = cute.make_rmem_tensor(VECTOR // 2, Float16)
                    cute.recast_tensor(source, Int32)[0] = words[2 * i, r]
                    cute.recast_tensor(source, Int32)[1] = words[2 * i + 1, r]
                    cute.autovec_copy(source, target)


@mlir_namedtuple
class AddSizes(NamedTuple):
    """Units of the inverted index: the wave's places in the list start at ``wave_start``, and there
    is room for ``wave_pairs``. ``stride`` are the elements from token to token of the result. An
    entry of the batch has ``length`` tokens, and other sums of ``blocks`` of 16."""

    wave_start: Int32
    wave_pairs: Int32
    first_unit: Int32
    units: Int32
    chunk_tokens: Int32
    num_tokens: Int32
    kv_heads: Int32
    stride: Int32
    length: Int32
    blocks: Int32


class AddPartials:
    """Gradients of the queries of a wave, times a factor; 0 for a token with no pair. With others,
    which are what the gradient has beside that of the selected branch, the whole gradient.

    Each of ``tiles`` tiles of keys of a block has a partial gradient. A warp has 8 rows, and 32
    columns or, of packed rows, a part. All that a thread loads at a time is under way together, so
    that few threads keep memory busy.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        head_dim: int,
        part: int,
        group: int,
        slots: int,
        tiles: int,
    ):
        self.dtype = dtype
        self.head_dim = head_dim
        self.part = part
        self.format = PartialFormat(dtype, head_dim, part)
        self.group = group
        self.slots = slots
        self.tiles = tiles
        self.addends = slots * tiles
        # Vectors of 8 numbers that a thread adds, in places of 16 bytes.
        self.vectors, self.places, most = 1, 1, _LOADS
        if self.format.rows is not None:
            self.vectors, self.places = part // GROUP_COLUMNS, self.format.rows.vectors
            most = _PACKED_LOADS
        self.loads = min(most, self.addends)
        # Warps that share 8 rows.
        self.groups = head_dim // (GROUP_COLUMNS * self.vectors)
        # Where parts end within a thread's vector, its halves have a factor each.
        self.factors = 1 if part % GROUP_COLUMNS == 0 else 2

    @cute.jit
    def __call__(
        self,
        partials: Partials,
        position: cute.Tensor,
        dq: cute.Tensor,
        others: OtherTensors | None,
        sizes: AddSizes,
        scale: Float32,
        stream,
    ):
        self.kernel(partials, position, dq, others, sizes, scale).launch(
            grid=[self._tiles_of_unit(sizes.chunk_tokens) * sizes.units, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        partials: Partials,
        mPosition: cute.Tensor,
        mdQ: cute.Tensor,
        others: OtherTensors | None,
        sizes: AddSizes,
        scale: Float32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        tiles = self._tiles_of_unit(sizes.chunk_tokens)
        unit = sizes.first_unit + bidx // tiles
        lane = tidx % WARP
        warp = bidx % tiles * (_THREADS // WARP) + tidx // WARP
        row = warp // self.groups * _ROWS + lane // QUAD
        # The part of packed rows, or the group of columns.
        part = warp % self.groups
        local, head = row // self.group, row % self.group
        kv_head = unit % sizes.kv_heads
        token = unit // sizes.kv_heads * sizes.chunk_tokens + local
        # All threads of a warp take the same branches, also those with nothing to do.
        wanted = local < sizes.chunk_tokens and token < sizes.num_tokens
        token = cutlass.min(token, sizes.num_tokens - 1)
        token_row = Int64(token) * sizes.kv_heads + kv_head
        listed = load_slots(mPosition, token_row, self.slots)
        position = cute.make_rmem_tensor(self.addends, Int32)
        for i in cutlass.range_constexpr(self.addends):
            slot, tile = i // self.tiles, i % self.tiles
            present = wanted and listed[slot] >= 0
            place = listed[slot] - sizes.wave_start + tile * sizes.wave_pairs
            position[i] = place if present else Int32(-1)
        # Partial gradients pass through shared memory, and warps synchronise. Otherwise the
        # compiler delays loads until their results are needed, to save registers.
        shape = (self.loads, self.places, _THREADS, 4)
        layout = cute.make_ordered_layout(shape, order=(3, 2, 1, 0))
        smem = cutlass.memory.SmemAllocator()
        sPartial = smem.allocate_tensor(Int32, layout, 128)
        load_values = functools.partial(
            *(self._load_values, partials.values, sPartial[None, None, tidx, None]),
            *(position, head, part, lane),
        )
        load_values(0)
        cute.arch.sync_warp()
        factor = cute.make_rmem_tensor((self.factors, self.addends), Float32)
        if const_expr(self.format.rows is None):
            for i in cutlass.range_constexpr(self.addends):
                rows, within = self._place(position[i], head)
                for j in cutlass.range_constexpr(self.factors):
                    which = (part * 2 + j) * (GROUP_COLUMNS // 2) // self.part
                    # Without a pair, that of another one.
                    by = partials.factor[(rows * self.format.parts + which) * _ROWS + within]
                    factor[j, i] = by if position[i] >= 0 else Float32(0.0)
        of_all, heads = kv_head * self.group + head, sizes.kv_heads * self.group
        # As accumulators have them, of the first of two rows.
        dq = cute.make_rmem_tensor(2 * VECTOR * self.vectors, Float32)
        dq.fill(0.0)
        dlogits = []
        if const_expr(others is not None):
            entry = token // sizes.length
            in_entry = token - entry * sizes.length
            for g in cutlass.range_constexpr(self.vectors):
                of_sums = (self.head_dim, entry * heads + of_all, in_entry)
                place = sums_place(*of_sums, part * self.vectors + g, sizes.blocks)
                sums = load_sums(others, place, lane)
                for e in cutlass.range_constexpr(VECTOR):
                    dq[self._element(g, e)] = sums[e]
            dlogits = load_dlogits(others, Int64(token) * heads + of_all)
        cute.arch.sync_warp()
        bias, one = cute.make_rmem_tensor(1, Float32), Int32(0)
        if const_expr(self.format.rows is not None):
            bias, one = self.format.rows.new_bias(sizes.kv_heads)
        for start in cutlass.range_constexpr(0, self.addends, self.loads):
            if const_expr(start > 0):
                load_values(start)
            cute.arch.cp_async_wait_group(0)
            for i in cutlass.range_constexpr(start, min(start + self.loads, self.addends)):
                sWords = sPartial[i - start, None, tidx, None]
                if const_expr(self.format.rows is not None):
                    self.format.rows.add(dq, bias, one, 0, sWords, Float32(1.0))
                else:
                    self._add(dq, sWords, factor[None, i])
        if const_expr(self.format.rows is not None):
            self.format.rows.subtract(dq, bias)
        for g in cutlass.range_constexpr(self.vectors):
            column_group = part * self.vectors + g
            vector = cute.make_rmem_tensor(VECTOR, Float32)
            for e in cutlass.range_constexpr(VECTOR):
                vector[e] = dq[self._element(g, e)] * scale
            if const_expr(others is not None):
                terms = gate_terms(others, dlogits, self.head_dim, of_all, column_group, lane)
                vector.store(vector.load() + terms)
            words = exchange_in_quad(cute.recast_tensor(cvt_f16(vector, self.dtype), Int32), lane)
            if wanted:
                column = column_group * GROUP_COLUMNS + lane % QUAD * VECTOR
                offset = Int64(token) * sizes.stride + (of_all * self.head_dim + column)
                offset = cute.assume(offset, divby=VECTOR)
                store_v4(mdQ.iterator + offset, *(words[w] for w in range(QUAD)))

    def _tiles_of_unit(self, chunk_tokens: Int32) -> Int32:
        warps = chunk_tokens * self.group // _ROWS * self.groups
        return cute.ceil_div(warps, _THREADS // WARP)

    def _element(self, group: int, e: int) -> int:
        """Where an accumulator has number ``e`` of the vector of a group of columns."""
        return 2 * row_words(0, group)[e // 2] + e % 2

    @cute.jit
    def _add(self, dq: cute.Tensor, sWords: cute.Tensor, factor: cute.Tensor):
        """Add a vector of float16 times its factors."""
        words = cute.make_rmem_tensor(VECTOR // 2, Int32)
        cute.autovec_copy(sWords[0, None], words)
        values = cute.recast_tensor(words, Float16).load().to(Float32)
        for e in cutlass.range_constexpr(VECTOR):
            dq[self._element(0, e)] += values[e] * factor[e * self.factors // VECTOR]

    @cute.jit
    def _place(self, position: Int32, head: Int32) -> tuple[Int32, Int32]:
        """The row of a pair's head: which 8 rows, and which of them. Without a pair, the first."""
        row = cutlass.max(position, 0) * self.group + head
        return row // _ROWS, row % _ROWS

    @cute.jit
    def _load_values(
        self,
        mValues: cute.Tensor,
        sPartial: cute.Tensor,
        position: cute.Tensor,
        head: Int32,
        part: Int32,
        lane: Int32,
        start: cutlass.Constexpr[int],
    ):
        """Start to load the addends from ``start`` on, 0 for no pair; a thread reads its own."""
        for i in cutlass.range_constexpr(start, min(start + self.loads, self.addends)):
            sWords, wanted = sPartial[i - start, None, None], position[i] >= 0
            if const_expr(self.format.rows is not None):
                row = cutlass.max(position[i], 0) * self.group + head
                place = self.format.rows.place(row, lane % QUAD)
                self.format.rows.load(mValues, place, sWords, wanted, part)
            else:
                rows, within = self._place(position[i], head)
                offset = (Int64(rows) * self.groups + part) * (_ROWS * GROUP_COLUMNS)
                offset += within * GROUP_COLUMNS + lane % QUAD * VECTOR
                sVector = cute.make_tensor(
                    cute.recast_ptr(sWords.iterator, dtype=Float16),
                    cute.make_layout(((VECTOR, 1),)),
                )
                copy_vector(mValues, offset, sVector, wanted)
        cute.arch.cp_async_commit_group()


@kept
def compile_add(
    dtype: torch.dtype,
    head_dim: int,
    part: int,
    group: int,
    slots: int,
    tiles: int,
    others: str | None = None,
) -> Callable:
    """``others``: "plain", or "weight" where gates depend on queries; None for none."""
    element = CUTE_DTYPES[dtype]
    kernel = AddPartials(element, head_dim, part, group, slots, tiles)
    return compile_kernel(
        kernel,
        kernel.format.fakes(),
        *(fake_flat(Int32), fake_flat(element)),
        None if others is None else fake_others(element, with_weight=others == "weight"),
        AddSizes(*(Int32(1) for _ in AddSizes._fields)),
        Float32(1.0),
    )


# Head dimension, columns of a part, heads of a KV head, slots and tiles, compiled as a test.
_SHAPES = (
    *((64, 64, 1, 7, 1), (96, 48, 3, 3, 1), (96, 96, 4, 16, 1)),
    *((128, 128, 16, 16, 1), (192, 64, 4, 5, 1), (256, 128, 6, 20, 2)),
)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        for shape in _SHAPES:
            name = "-".join(map(str, (str(dtype).removeprefix("torch."), *shape)))
            yield f"add-partials-{name}", functools.partial(compile_add, dtype, *shape)
            if shape[0] != 192:
                # Sums have head dimensions of FlashAttention-4.
                form = "weight" if shape[3] > 4 else "plain"
                compiled = functools.partial(compile_add, dtype, *shape, form)
                yield f"add-partials-{name}-{form}", compiled
