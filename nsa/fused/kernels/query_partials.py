"""Partial gradients of queries, one for each pair of a token and a block, and their sum.

A pair's partial gradient is stored in 16-bit floats of 11 bits, scaled in each *part* of a row's
columns by a power of two, so that the largest stands between 2^14 and 2^15. bfloat16 has 8 bits and
would not do: a row of dS adds up to 0, so the partial gradients of keys with a mean cancel.

They lie in the order in which threads have them after a wgmma: in every 8 rows and 32 columns, a
warp stores, and loads, 512 neighbouring bytes at once. Row ``r`` is query head ``r % G`` of the
pair at position ``r // G`` of the wave. :class:`AddPartials` adds the pairs of each token in the
order of its slots, so the sum has the same bits each time.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float16, Float32, Int32, Int64, const_expr

from nsa.fused.hardware import QUAD, WARP, WGMMA_ROWS
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.forward_tiles import GROUP_COLUMNS
from nsa.fused.kernels.hopper import (
    cvt_f16,
    fmax,
    fmax_reduce,
    mlir_namedtuple,
    reshape_acc_to_mn,
    store_v4,
)
from nsa.fused.kernels.inverted_index import load_slots
from nsa.fused.kernels.query_sums import (
    OtherTensors,
    fake_others,
    gate_terms,
    load_others,
    sums_place,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    copy_vector,
    exchange_in_quad,
    fake_flat,
    load_shared,
)

_THREADS = 128
# Partial gradients that a thread loads together.
_LOADS = 16
# Rows whose partial gradients lie together.
_ROWS = 8
# The exponent of the largest number of a part, after scaling.
_EXPONENT = 14
_BIAS = 127
_MANTISSA = 23


@mlir_namedtuple
class Partials(NamedTuple):
    """float16 ``[row / 8][columns / 32][row % 8][32]``, and what to multiply them by: float32
    ``[row / 8][part][row % 8]``."""

    values: cute.Tensor
    factor: cute.Tensor


def new_partials(rows: int, head_dim: int, part: int, device: torch.device) -> Partials:
    """Room for ``rows``, a multiple of 8, in parts of ``part`` columns."""
    values = torch.empty(rows * head_dim, dtype=torch.float16, device=device)
    factor = torch.empty(rows * (head_dim // part), dtype=torch.float32, device=device)
    return Partials(values, factor)


def fake_partials() -> Partials:
    """Stand-ins, to compile with."""
    return Partials(fake_flat(Float16), fake_flat(Float32, alignment=4))


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

    Each of ``tiles`` tiles of keys of a block has a partial gradient. A warp has 8 rows and 32
    columns. All that a thread loads is under way together, so that few threads keep memory busy.
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
        self.parts = head_dim // part
        self.group = group
        self.slots = slots
        self.tiles = tiles
        self.addends = slots * tiles
        self.loads = min(_LOADS, self.addends)
        self.groups = head_dim // GROUP_COLUMNS
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
        column_group = warp % self.groups
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
        shape = (self.loads, _THREADS, (VECTOR, 1))
        layout = cute.make_ordered_layout(shape, order=(2, 1, 0))
        smem = cutlass.memory.SmemAllocator()
        sPartial = smem.allocate_tensor(Float16, layout, 128)
        sPartial = sPartial[None, tidx, None]
        load_values = functools.partial(
            self._load_values, partials.values, sPartial, position, head, column_group, lane
        )
        load_values(0)
        cute.arch.sync_warp()
        factor = cute.make_rmem_tensor((self.factors, self.addends), Float32)
        for i in cutlass.range_constexpr(self.addends):
            rows, within = self._place(position[i], head)
            for j in cutlass.range_constexpr(self.factors):
                part = (column_group * 2 + j) * (GROUP_COLUMNS // 2) // self.part
                factor[j, i] = partials.factor[(rows * self.parts + part) * _ROWS + within]
        of_all, heads = kv_head * self.group + head, sizes.kv_heads * self.group
        if const_expr(others is not None):
            entry = token // sizes.length
            in_entry = token - entry * sizes.length
            place = sums_place(
                self.head_dim, entry * heads + of_all, in_entry, column_group, sizes.blocks
            )
            other = load_others(
                others,
                self.head_dim,
                place,
                Int64(token) * heads + of_all,
                of_all,
                column_group,
                lane,
            )
        cute.arch.sync_warp()
        dq = cute.make_rmem_tensor(VECTOR, Float32)
        dq.fill(0.0)
        if const_expr(others is not None):
            dq.store(other.sums.load())
        for start in cutlass.range_constexpr(0, self.addends, _LOADS):
            if const_expr(start > 0):
                load_values(start)
            cute.arch.cp_async_wait_group(0)
            for i in cutlass.range_constexpr(start, min(start + _LOADS, self.addends)):
                values = cute.make_rmem_tensor(VECTOR, Float32)
                values.store(load_shared(sPartial[i - start, None]))
                for e in cutlass.range_constexpr(VECTOR):
                    by = factor[e * self.factors // VECTOR, i]
                    # Without a pair, the factor is that of another one.
                    dq[e] += values[e] * (by if position[i] >= 0 else Float32(0.0))
        dq.store(dq.load() * scale)
        if const_expr(others is not None):
            dq.store(dq.load() + gate_terms(other))
        words = exchange_in_quad(cute.recast_tensor(cvt_f16(dq, self.dtype), Int32), lane)
        if wanted:
            column = column_group * GROUP_COLUMNS + lane % QUAD * VECTOR
            offset = Int64(token) * sizes.stride + (of_all * self.head_dim + column)
            offset = cute.assume(offset, divby=VECTOR)
            store_v4(mdQ.iterator + offset, *(words[w] for w in range(QUAD)))

    def _tiles_of_unit(self, chunk_tokens: Int32) -> Int32:
        warps = chunk_tokens * self.group // _ROWS * self.groups
        return cute.ceil_div(warps, _THREADS // WARP)

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
        column_group: Int32,
        lane: Int32,
        start: cutlass.Constexpr[int],
    ):
        """Start to load the addends from ``start`` on, 0 for no pair; a thread reads its own."""
        for i in cutlass.range_constexpr(start, min(start + _LOADS, self.addends)):
            rows, within = self._place(position[i], head)
            offset = (Int64(rows) * self.groups + column_group) * (_ROWS * GROUP_COLUMNS)
            offset += within * GROUP_COLUMNS + lane % QUAD * VECTOR
            copy_vector(mValues, offset, sPartial[i - start, None], position[i] >= 0)
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
    return compile_kernel(
        AddPartials(element, head_dim, part, group, slots, tiles),
        fake_partials(),
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
