"""Rows of the learned compression: the tokens of each block with its positions added, and back.

Row ``(m, h)`` holds ``x[start(m) + i, h] + position[i]`` for the ``l`` tokens of block ``m``. Parts
of the heads may have positions of their own, and then rows of their own too. The kernels find
``start`` from the boundaries of the sequences. A thread handles VECTOR channels of one token of a
block; of a token in the backward.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.compressed_rows import CompressedRows
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.sequence_search import find_sequence, find_token
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    FLOAT_DTYPES,
    VECTOR,
    check_float,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

_THREADS = 128


@mlir_namedtuple
class _Bounds(NamedTuple):
    """Where the tokens and the blocks of each packed sequence start, then where the last end."""

    tokens: cute.Tensor | None
    blocks: cute.Tensor | None


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Tokens and blocks in all, heads, those of them with one position, sequences, and tokens and
    blocks of an entry of a batch."""

    tokens: Int32
    blocks: Int32
    heads: Int32
    part_heads: Int32
    sequences: Int32
    entry_tokens: Int32
    entry_blocks: Int32


class _BlockRows(CompressedRows):
    """The threads, and the launch."""

    def __init__(self, block_size: int, stride: int, head_dim: int):
        super().__init__(block_size, stride, head_dim)
        self.vectors = head_dim // VECTOR

    @cute.jit
    def __call__(self, tensors: tuple, bounds: _Bounds, stride: Int64, sizes: _Sizes, stream):
        self.kernel(tensors, bounds, stride, sizes).launch(
            grid=[Int32((self.num_threads(sizes) + (_THREADS - 1)) // _THREADS), 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.jit
    def split(self, sizes: _Sizes) -> tuple[Int64, Int32, Int32]:
        """This thread's (row of all heads' rows, head, column of the head)."""
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        thread = Int64(bidx) * _THREADS + tidx
        column = Int32(thread % self.vectors) * VECTOR
        row = thread // self.vectors
        return row // sizes.heads, Int32(row % sizes.heads), column


@mlir_namedtuple
class _Forward(NamedTuple):
    x: cute.Tensor
    position: cute.Tensor
    rows: cute.Tensor


class GatherBlocks(_BlockRows):
    @cute.jit
    def num_threads(self, sizes: _Sizes) -> Int64:
        return Int64(sizes.blocks) * sizes.heads * (self.block_size * self.vectors)

    @cute.kernel
    def kernel(self, tensors: _Forward, bounds: _Bounds, stride: Int64, sizes: _Sizes):
        token, head, column = self.split(sizes)
        block, index = Int32(token // self.block_size), Int32(token % self.block_size)
        if block < sizes.blocks:
            start, real = self._start(bounds, sizes, block)
            place = head // sizes.part_heads * self.block_size + index
            value = load_vector(tensors.position, Int64(place * self.head_dim + column)).load()
            total = cute.make_rmem_tensor(VECTOR, Float32)
            total.store(value.to(Float32))
            if real:
                source = Int64(start + index) * stride + (head * self.head_dim + column)
                total.store(total.load() + load_vector(tensors.x, source).load().to(Float32))
            row = self.row(sizes.blocks, sizes.part_heads, block, head) * self.block_size + index
            store_vector(total.load(), tensors.rows, row * self.head_dim + column)

    @cute.jit
    def _start(self, bounds: _Bounds, sizes: _Sizes, block: Int32):
        """The first token of the block, and whether it is a block of a sequence."""
        start = block // sizes.entry_blocks * sizes.entry_tokens
        start += block % sizes.entry_blocks * self.stride
        real = Int32(1)
        if const_expr(bounds.tokens is not None):
            sequence = find_sequence(bounds.blocks, block, sizes.sequences)
            start = bounds.tokens[sequence] + (block - bounds.blocks[sequence]) * self.stride
            real = Int32(1) if block < bounds.blocks[sizes.sequences] else Int32(0)
        return start, real == 1


@mlir_namedtuple
class _Backward(NamedTuple):
    drows: cute.Tensor
    dx: cute.Tensor


class ScatterBlocks(_BlockRows):
    """``dx[t] = sum of drows`` over the blocks of the token, in float32 and rounded once."""

    @cute.jit
    def num_threads(self, sizes: _Sizes) -> Int64:
        return Int64(sizes.tokens) * sizes.heads * self.vectors

    @cute.kernel
    def kernel(self, tensors: _Backward, bounds: _Bounds, stride: Int64, sizes: _Sizes):
        row, head, column = self.split(sizes)
        token = Int32(row)
        if token < sizes.tokens:
            sequence, index = find_token(bounds.tokens, token, sizes.sequences, sizes.entry_tokens)
            blocks = self.of_sequence(bounds.blocks, sequence, sizes.entry_blocks)
            total = cute.make_rmem_tensor(VECTOR, Float32)
            total.fill(0.0)
            counts = (sizes.blocks, sizes.part_heads)
            self.add(tensors.drows, counts, index, blocks, head, (column,), [[total]])
            store_vector(
                total.load(), tensors.dx, (row * sizes.heads + head) * self.head_dim + column
            )


def _compile(kernel: _BlockRows, tensors: tuple, packed: bool) -> Callable:
    bounds = (fake_flat(Int32, alignment=4) if packed else None for _ in range(2))
    sizes = _Sizes(*(Int32(1) for _ in _Sizes._fields))
    return compile_kernel(kernel, tensors, _Bounds(*bounds), Int64(1), sizes)


@kept
def compile_gather(
    dtype: torch.dtype, block_size: int, stride: int, head_dim: int, packed: bool
) -> Callable:
    """The compiled forward of a dtype, sizes of blocks and a head dimension."""
    tensors = _Forward(*(fake_flat(CUTE_DTYPES[dtype]) for _ in _Forward._fields))
    return _compile(GatherBlocks(block_size, stride, head_dim), tensors, packed)


@kept
def compile_scatter(
    dtype: torch.dtype, block_size: int, stride: int, head_dim: int, packed: bool
) -> Callable:
    """The compiled backward of a dtype, sizes of blocks and a head dimension."""
    tensors = _Backward(*(fake_flat(CUTE_DTYPES[dtype]) for _ in _Backward._fields))
    return _compile(ScatterBlocks(block_size, stride, head_dim), tensors, packed)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for head_dim in (64, 96, 128):
            for block_size, stride in ((32, 16), (64, 64)):
                for packed in (False, True):
                    arguments = (dtype, block_size, stride, head_dim, packed)
                    form = "packed" if packed else "batched"
                    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{block_size}-{form}"
                    yield (
                        f"block-rows-{name}-forward",
                        functools.partial(compile_gather, *arguments),
                    )
                    yield (
                        f"block-rows-{name}-backward",
                        functools.partial(compile_scatter, *arguments),
                    )


def gather_blocks(x: Tensor, position: Tensor, places: BlockPlaces) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.gather_blocks`."""
    _check("x", x)
    heads, head_dim = x.shape[-2:]
    *parts, _, _ = position.shape
    check_tensor("position", position, (*parts, places.block_size, head_dim), x.dtype, x.device)
    part_heads = heads // math.prod(parts)
    tokens = math.prod(x.shape[:-2])
    rows = x.new_empty(*parts, places.blocks, part_heads, places.block_size, head_dim)
    if rows.numel() == 0:
        return rows
    sizes = (x.dtype, places.block_size, places.stride, head_dim, places.token_bounds is not None)
    memory, stride = flat_rows(x)
    tensors = _Forward(memory, flat(position), rows.view(-1))
    compile_gather(*sizes)(
        tensors, _bounds(places), stride, _sizes(places, tokens, heads, part_heads)
    )
    return rows


def scatter_blocks(drows: Tensor, shape: tuple[int, ...], places: BlockPlaces) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.scatter_blocks`."""
    _check("drows", drows)
    *leading, heads, head_dim = shape
    parts = drows.shape[:-4]
    part_heads = heads // math.prod(parts)
    wanted = (*parts, places.blocks, part_heads, places.block_size, head_dim)
    check_tensor("drows", drows, wanted, drows.dtype, drows.device)
    if drows.numel() == 0:
        return drows.new_zeros(shape)
    dx = drows.new_empty(shape)
    sizes = (
        drows.dtype,
        places.block_size,
        places.stride,
        head_dim,
        places.token_bounds is not None,
    )
    tensors = _Backward(flat(drows), dx.view(-1))
    numbers = _sizes(places, math.prod(leading), heads, part_heads)
    compile_scatter(*sizes)(tensors, _bounds(places), heads * head_dim, numbers)
    return dx


def _bounds(places: BlockPlaces) -> _Bounds:
    return _Bounds(places.token_bounds, places.block_bounds)


def _sizes(places: BlockPlaces, tokens: int, heads: int, part_heads: int) -> _Sizes:
    sequences = 0 if places.token_bounds is None else places.token_bounds.shape[0] - 1
    of_entry = places.entry_tokens, places.entry_blocks
    return _Sizes(tokens, places.blocks, heads, part_heads, sequences, *of_entry)


def _check(name: str, x: Tensor) -> None:
    check_float(name, x)
    if x.ndim < 3 or x.shape[-1] % VECTOR:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (..., D) with D a multiple of {VECTOR}"
        )
