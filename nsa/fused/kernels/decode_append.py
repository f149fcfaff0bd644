"""The start of a decoding step: new tokens into pages, completed blocks, and the work schedule.

A CTA has one new token and some channels, and the compressed block that the token completes, if
any. It reads older tokens of the block from the pages and new ones from the arguments, so that no
CTA reads what another writes. The last CTA computes where each sequence ends, and how the
compressed branch is split.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.decode_inputs import (
    MAX_TOKENS,
    DecodeRule,
    DecodeShape,
    Pool,
    Schedule,
)
from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments, prefetch
from nsa.fused.kernels.decode_schedule import PDL, num_tiles, tile_share, wait_for_previous
from nsa.fused.kernels.hopper import mlir_namedtuple, warp_prefix_sum
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    fake_flat,
    flat_rows,
    load_vector,
    store_vector,
)

_THREADS = 128
# Integers that are fetched together.
_LINE = 32
# Tokens of a block that a thread loads together.
_LOADS = 8


@mlir_namedtuple
class _Tensors(NamedTuple):
    """New keys and values, lengths, and the schedule."""

    k: cute.Tensor
    v: cute.Tensor
    cu_seqlens: cute.Tensor | None
    lengths: cute.Tensor
    overflowed: cute.Tensor
    starts: cute.Tensor
    ends: cute.Tensor
    tiles: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call and of the cache."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    sequence_units: Int32
    ctas: Int32
    whole_units: Int32
    num_pages: Int32
    max_length: Int32
    k_stride: Int64
    v_stride: Int64


class DecodeAppend:
    """Append with the mean as compression."""

    def __init__(self, head_dim: int, head_dim_v: int, rule: DecodeRule):
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.rule = rule

    @cute.jit
    def __call__(
        self, tensors: _Tensors, pages: PagedTensors, compressed: PagedTensors, sizes: _Sizes,
        stream,
    ):  # fmt: skip
        vectors = sizes.kv_heads * ((self.head_dim + self.head_dim_v) // VECTOR)
        self.kernel(tensors, pages, compressed, sizes).launch(
            grid=[sizes.batch * sizes.tokens + 1, cute.ceil_div(vectors, _THREADS), 1],
            block=[_THREADS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    @cute.kernel
    def kernel(
        self, tensors: _Tensors, pages: PagedTensors, compressed: PagedTensors, sizes: _Sizes
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, chunk, _ = cute.arch.block_idx()
        self._prefetch(tensors, pages, sizes, bidx // sizes.tokens, tidx)
        wait_for_previous()
        if bidx == sizes.batch * sizes.tokens:
            if chunk == 0 and tidx < WARP:
                self._schedule(tensors, pages, sizes, tidx)
        else:
            sequence, token = bidx // sizes.tokens, bidx % sizes.tokens
            row0, new = self._new_tokens(tensors, sizes, sequence)
            start = tensors.lengths[sequence]
            stored = self._stored(pages, sizes, sequence, start, new)
            vector = chunk * _THREADS + tidx
            k_vectors = sizes.kv_heads * (self.head_dim // VECTOR)
            v_vectors = sizes.kv_heads * (self.head_dim_v // VECTOR)
            if token < stored:
                row = Int64(row0)
                if vector < k_vectors:
                    self._append(
                        tensors.k, row * sizes.k_stride, sizes.k_stride, pages.k,
                        (pages.k_page, pages.k_row, pages.k_head), compressed.k,
                        (compressed.k_page, compressed.k_row, compressed.k_head),
                        pages, self.head_dim, vector, sequence, start, token,
                    )  # fmt: skip
                elif vector < k_vectors + v_vectors:
                    self._append(
                        tensors.v, row * sizes.v_stride, sizes.v_stride, pages.v,
                        (pages.v_page, pages.v_row, pages.v_head), compressed.v,
                        (compressed.v_page, compressed.v_row, compressed.v_head),
                        pages, self.head_dim_v, vector - k_vectors, sequence, start, token,
                    )  # fmt: skip

    @cute.jit
    def _prefetch(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, sequence: Int32, tidx: Int32
    ):
        """Bring lengths and a sequence's pages to L2, where all kernels of the step look first."""
        entry = tidx * _LINE
        if entry < sizes.batch:
            prefetch(tensors.lengths.iterator + entry)
        if sequence < sizes.batch and entry < pages.max_pages:
            prefetch(pages.table.iterator + (Int64(sequence) * pages.max_pages + entry))

    @cute.jit
    def _new_tokens(self, tensors: _Tensors, sizes: _Sizes, sequence: Int32) -> tuple[Int32, Int32]:
        """The first new token of a sequence, and how many there are."""
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0
        return row0, new

    @cute.jit
    def _stored(
        self, pages: PagedTensors, sizes: _Sizes, sequence: Int32, start: Int32, new: Int32
    ) -> Int32:
        """New tokens of a sequence before the first one without a place."""
        stored = cutlass.min(new, MAX_TOKENS)
        limit = cutlass.min(sizes.max_length, pages.max_pages * pages.page_rows)
        first, row = _index_and_row(pages, start)
        for i in cutlass.range_constexpr(MAX_TOKENS):
            # A page has more rows than there are new tokens.
            index = first + 1 if row + i >= pages.page_rows else first
            index = cutlass.min(index, pages.max_pages - 1)
            page = pages.table[Int64(sequence) * pages.max_pages + index]
            kept = start + i < limit and page >= 0 and page < sizes.num_pages
            stored = stored if kept else cutlass.min(stored, i)
        return stored

    @cute.jit
    def _schedule(self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, lane: Int32):
        """Write where sequences start and end, and their tiles."""
        before = Int32(0)
        for begin in cutlass.range(0, sizes.batch, WARP, unroll=1):
            sequence = begin + lane
            real = sequence < sizes.batch
            seen = cutlass.min(sequence, sizes.batch - 1)
            _, new = self._new_tokens(tensors, sizes, seen)
            start = tensors.lengths[seen]
            stored = self._stored(pages, sizes, seen, start, new)
            limit = cutlass.min(sizes.max_length, pages.max_pages * pages.page_rows)
            tiles = num_tiles(self.rule, start, new, limit)
            tiles = tiles if real else Int32(0)
            sum_to = warp_prefix_sum(tiles, lane)
            if real:
                tensors.starts[sequence] = start
                tensors.ends[sequence] = start + stored
                tensors.tiles[sequence + 1] = before + sum_to - tiles
                if stored < new:
                    tensors.overflowed[0] = Uint8(1)
            before += cute.arch.shuffle_sync(sum_to, WARP - 1)
        if lane == 0:
            tensors.tiles[0] = tile_share(
                before * sizes.sequence_units, sizes.ctas, sizes.whole_units
            )
            tensors.tiles[sizes.batch + 1] = before

    @cute.jit
    def _append(
        self, mNew: cute.Tensor, new0: Int64, new_stride: Int64, mX: cute.Tensor, strides,
        mCompressed: cute.Tensor, cmp_strides, pages: PagedTensors,
        head_dim: cutlass.Constexpr[int], vector: Int32, sequence: Int32, start: Int32,
        token: Int32,
    ):  # fmt: skip
        """Store a vector of a new token, and of the block that it completes.

        ``new0`` is where the first new token of the sequence is.
        """
        head, column = vector // (head_dim // VECTOR), vector % (head_dim // VECTOR) * VECTOR
        in_row = head * head_dim + column
        in_page = head * strides[2] + column
        position = start + token
        table = Int64(sequence) * pages.max_pages
        index, row = _index_and_row(pages, position)
        page = pages.table[table + index]
        x = load_vector(mNew, new0 + token * new_stride + in_row)
        place = Int64(page) * strides[0] + row * strides[1] + in_page
        store_vector(x.load(), mX, place)
        rule = self.rule
        if (position + 1) % rule.stride == 0 and position + 1 >= rule.compress_size:
            first = position + 1 - rule.compress_size
            rSum = cute.make_rmem_tensor(VECTOR, Float32)
            rSum.fill(0.0)
            for begin in cutlass.range(0, rule.compress_size, _LOADS, unroll=1):
                loaded = []
                for i in cutlass.range_constexpr(_LOADS):
                    # Older tokens are in pages, new ones not yet. Each load is of some token.
                    token_position = cutlass.min(first + begin + i, position)
                    old = cutlass.max(cutlass.min(token_position, start - 1), 0)
                    old_index, old_row = _index_and_row(pages, old)
                    old_page = Int64(pages.table[table + old_index])
                    offset = old_page * strides[0] + old_row * strides[1]
                    x = load_vector(mX, offset + in_page)
                    newer = cutlass.max(token_position - start, 0)
                    y = load_vector(mNew, new0 + newer * new_stride + in_row)
                    loaded.append((token_position < start, x, y))
                for i in cutlass.range_constexpr(_LOADS):
                    is_old, x, y = loaded[i]
                    if begin + i < rule.compress_size:
                        if is_old:
                            rSum.store(rSum.load() + x.load().to(Float32))
                        else:
                            rSum.store(rSum.load() + y.load().to(Float32))
            place = Int64(page) * cmp_strides[0] + row // rule.stride * cmp_strides[1]
            place += head * cmp_strides[2] + column
            store_vector(rSum.load() / Float32(rule.compress_size), mCompressed, place)


def _index_and_row(pages: PagedTensors, position: Int32) -> tuple[Int32, Int32]:
    """Which page of its sequence a token is in, and where there."""
    # Unsigned, because // of signed numbers takes more instructions.
    seen, rows = Uint32(position), Uint32(pages.page_rows)
    return Int32(seen // rows), Int32(seen % rows)


@kept
def compile_decode_append(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, rule: DecodeRule, packed: bool
) -> Callable:
    """The compiled kernel of these forms."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    vector = CUTE_DTYPES[dtype]
    return compile_kernel(
        DecodeAppend(head_dim, head_dim_v, rule),
        _Tensors(
            *(fake_flat(vector), fake_flat(vector), integers(packed), integers()),
            fake_flat(Uint8, alignment=1),
            *(integers(), integers(), integers()),
        ),
        *(fake_pages(vector), fake_pages(vector)),
        _Sizes(*(Int32(1) for _ in range(8)), Int64(8), Int64(8)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    paper = DecodeRule.of(NSAConfig.paper())
    for dtype in (torch.bfloat16, torch.float16):
        for dim, dim_v in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
            name = f"{str(dtype).removeprefix('torch.')}-{dim}-{dim_v}"
            yield (
                f"decode-append-{name}",
                functools.partial(compile_decode_append, dtype, dim, dim_v, paper, dim == 128),
            )


def decode_append(
    k: Tensor,
    v: Tensor,
    pool: Pool,
    compressed: Pool,
    table: Tensor,
    lengths: Tensor,
    overflowed: Tensor,
    max_length: int,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
) -> Schedule:
    """See :func:`nsa.fused.decode_calls.decode_append`."""
    integers = functools.partial(torch.empty, dtype=torch.int32, device=k.device)
    schedule = Schedule(integers(shape.batch), integers(shape.batch), integers(shape.batch + 2))
    (flat_k, k_stride), (flat_v, v_stride) = flat_rows(k), flat_rows(v)
    compile_decode_append(k.dtype, k.shape[-1], v.shape[-1], rule, cu_seqlens is not None)(
        _Tensors(
            *(flat_k, flat_v, cu_seqlens, lengths, overflowed.view(torch.uint8).view(-1)),
            *schedule,
        ),
        *(page_arguments(pool, table), page_arguments(compressed, table)),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.sequence_units),
            *(shape.ctas, shape.whole_units),
            *(pool.k.shape[0], max_length, k_stride, v_stride),
        ),
    )
    return schedule
