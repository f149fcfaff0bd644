"""Decoding's selection in tile mode: the blocks of the tiles that begin in a step.

A CTA selects for one sequence and query head. It has nothing to do unless a new token begins a
tile, which is one step of many; then it multiplies the token's query with all compressed keys, a
block a thread.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.decode_inputs import DecodeShape, Pool, Schedule, TileRule
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_best import BestOfCta, block_rank
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments
from nsa.fused.kernels.decode_schedule import PDL, wait_for_previous
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    dot,
    fake_flat,
    flat_rows,
    load_vector,
)

_THREADS = 512


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Queries, where sequences start and end, and the lists of tiles."""

    q: cute.Tensor
    cu_seqlens: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    lists: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call and of the lists; ``limit`` is above all blocks that may be listed."""

    batch: Int32
    tokens: Int32
    heads: Int32
    group: Int32
    tile_size: Int32
    tile_slots: Int32
    width: Int32
    limit: Int32
    num_initial: Int32
    num_local: Int32
    q_stride: Int64


class DecodeTileSelect:
    """``count`` best blocks of ``per_select`` compressed blocks each."""

    def __init__(self, head_dim: int, rule: TileRule, count: int):
        self.head_dim = head_dim
        self.rule = rule
        self.best = BestOfCta(count, _THREADS, per_thread=1)

    @cute.jit
    def __call__(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale: Float32, stream
    ):
        self.kernel(tensors, pages, sizes, scale).launch(
            grid=[sizes.batch * sizes.heads, 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale: Float32):
        wait_for_previous()
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        sequence, head = bidx // sizes.heads, bidx % sizes.heads
        row0 = sequence * sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
        start, end = tensors.starts[sequence], tensors.ends[sequence]
        smem = cutlass.memory.SmemAllocator()
        memory = smem.allocate_tensor(Int64, cute.make_layout(self.best.words), 16)
        shared = self.best.views(memory.iterator)
        sQ = smem.allocate_tensor(Float32, cute.make_layout(self.head_dim), 16)
        tile = cute.ceil_div(start, sizes.tile_size)
        position = tile * sizes.tile_size
        if position < end:
            row = Int64(row0 + position - start) * sizes.q_stride + head * self.head_dim
            if tidx < self.head_dim:
                sQ[tidx] = tensors.q[row + tidx].to(Float32) * scale
            cute.arch.barrier()
            seen = (position + 1) // self.rule.compress_size
            own = (position + sizes.tile_size - 1) // self.rule.select_size
            self.best.reset(shared, tidx)
            cute.arch.barrier()
            for begin in cutlass.range(0, own + 1, _THREADS, unroll=1):
                block = begin + tidx
                score = -Float32.inf
                if block * self.rule.per_select < seen:
                    score = self._score(pages, sQ, sequence, head // sizes.group, seen, block)
                ranks = cute.make_rmem_tensor(1, Int64)
                ranks[0] = block_rank(
                    score, block, own, sizes.num_initial, sizes.num_local, Boolean(True)
                )
                self.best.add(shared, ranks, tidx)
            cute.arch.barrier()
            slot = sequence * sizes.tile_slots + tile % sizes.tile_slots
            place = (Int64(slot) * sizes.heads + head) * sizes.width
            block, entry, _ = self.best.place_in_list(shared[1], tidx, sizes.limit)
            if entry < sizes.width:
                tensors.lists[place + entry] = block

    @cute.jit
    def _score(
        self, pages: PagedTensors, sQ: cute.Tensor, sequence: Int32, kv_head: Int32, seen: Int32,
        block: Int32,
    ) -> Float32:  # fmt: skip
        """The largest product of a block, which has one key at least that is seen."""
        score = -Float32.inf
        for i in cutlass.range(self.rule.per_select, unroll=1):
            key = block * self.rule.per_select + i
            place = cutlass.min(key, seen - 1)
            index, row = place // pages.page_rows, place % pages.page_rows
            page = pages.table[Int64(sequence) * pages.max_pages + index]
            offset = Int64(page) * pages.k_page + row * pages.k_row + kv_head * pages.k_head
            product = Float32(0.0)
            for v in cutlass.range_constexpr(self.head_dim // VECTOR):
                rQ = cute.make_rmem_tensor(VECTOR, Float32)
                cute.autovec_copy(cute.local_tile(sQ, (VECTOR,), (v,)), rQ)
                rK = load_vector(pages.k, offset + v * VECTOR)
                product += dot(rQ.load(), rK.load().to(Float32))
            # The last key again where the block has no more that are seen.
            score = cute.arch.fmax(score, product)
        return score


@kept
def compile_decode_tile_select(
    dtype: torch.dtype, head_dim: int, rule: TileRule, count: int, packed: bool
) -> Callable:
    """The compiled kernel of these forms."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    return compile_kernel(
        DecodeTileSelect(head_dim, rule, count),
        _Tensors(
            fake_flat(CUTE_DTYPES[dtype]),
            *(integers(packed), integers(), integers(), integers()),
        ),
        fake_pages(CUTE_DTYPES[dtype]),
        _Sizes(*(Int32(1) for _ in range(10)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [
        (torch.bfloat16, 128, TileRule(64, 64), 16, False),
        (torch.float16, 64, TileRule(16, 64), 64, True),
        (torch.bfloat16, 96, TileRule(32, 32), 1, True),
        (torch.bfloat16, 256, TileRule(64, 128), 16, False),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-tile-select-{name}", functools.partial(compile_decode_tile_select, *form)


def decode_tile_select(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: TileRule,
    scale: float,
    tile_size: int,
    lists: Tensor,
    count: int,
    limit: int,
    num_initial: int,
    num_local: int,
) -> None:
    """See :func:`nsa.fused.decode_calls.decode_tile_select`."""
    heads = shape.kv_heads * shape.group
    flat_q, q_stride = flat_rows(q)
    compile_decode_tile_select(q.dtype, q.shape[-1], rule, count, cu_seqlens is not None)(
        _Tensors(flat_q, cu_seqlens, schedule.starts, schedule.ends, lists.view(-1)),
        page_arguments(pool, table),
        _Sizes(
            *(shape.batch, shape.tokens, heads, shape.group),
            *(tile_size, lists.shape[1], lists.shape[-1], limit, num_initial, num_local, q_stride),
        ),
        scale,
    )
