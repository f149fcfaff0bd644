"""Rotary position embedding of queries and keys, and its inverse, in one pass and without a table.

A thread rotates 8 pairs of channels, ``c`` and ``c + D/2``, of up to four heads of a row.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.rotary_angles import (
    MAX_HEAD_DIM,
    ROTATED_DTYPES,
    cos_sin,
    fake_powers,
    frequency_powers,
    rotates_head_dim,
)
from nsa.fused.kernels.sequence_search import find_sequence
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

_THREADS = 128


@mlir_namedtuple
class _Tensors(NamedTuple):
    """``x`` and the result, the same of another tensor, boundaries and origins of sequences."""

    x: cute.Tensor
    out: cute.Tensor
    other: cute.Tensor | None
    other_out: cute.Tensor | None
    bounds: cute.Tensor | None
    origin: cute.Tensor | None


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Rows, heads of a row of both tensors, sequences, and for a batch the rows of an entry."""

    rows: Int32
    heads: Int32
    other_heads: Int32
    sequences: Int32
    length: Int32


@mlir_namedtuple
class _Angles(NamedTuple):
    """Twice the position is ``start + step * index``; ``sign`` is -1 for the inverse."""

    start: Int32
    step: Int32
    sign: Float32


class Rotation:
    """``heads_at_once`` heads of a row, of either tensor, share the sines of a thread."""

    def __init__(self, head_dim: int, heads_at_once: tuple[int, int]):
        self.head_dim = head_dim
        self.half = head_dim // 2
        self.vectors = self.half // VECTOR
        self.heads_at_once = heads_at_once

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        strides: tuple[Int64, Int64],
        sizes: _Sizes,
        angles: _Angles,
        powers: tuple,
        stream,
    ):
        parts, other_parts = self._parts(sizes)
        threads = Int64(sizes.rows) * (parts + other_parts) * self.vectors
        self.kernel(tensors, strides, sizes, angles, powers).launch(
            grid=[Int32((threads + (_THREADS - 1)) // _THREADS), 1, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.jit
    def _parts(self, sizes: _Sizes) -> tuple[Int32, Int32]:
        """Threads that share a row of each tensor and a vector of channels."""
        first, second = self.heads_at_once
        return sizes.heads // first, sizes.other_heads // second

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        strides: tuple[Int64, Int64],
        sizes: _Sizes,
        angles: _Angles,
        powers: tuple,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        thread = Int64(bidx) * _THREADS + tidx
        vector = Int32(thread % self.vectors)
        item = thread // self.vectors
        parts, other_parts = self._parts(sizes)
        row, part = Int32(item // (parts + other_parts)), Int32(item % (parts + other_parts))
        if row < sizes.rows:
            common = (tensors.bounds, tensors.origin, row, vector, sizes, angles, powers)
            if const_expr(tensors.other is None):
                self._rotate(0, tensors.x, tensors.out, strides[0], part, *common)
            else:
                if part < parts:
                    self._rotate(0, tensors.x, tensors.out, strides[0], part, *common)
                else:
                    other = (tensors.other, tensors.other_out, strides[1], part - parts)
                    self._rotate(1, *other, *common)

    @cute.jit
    def _rotate(
        self,
        which: cutlass.Constexpr,
        mX: cute.Tensor,
        mOut: cute.Tensor,
        stride: Int64,
        part: Int32,
        mBounds: cute.Tensor | None,
        mOrigin: cute.Tensor | None,
        row: Int32,
        vector: Int32,
        sizes: _Sizes,
        angles: _Angles,
        powers: tuple,
    ):
        """Rotate the heads of a part of a row of one of the tensors."""
        heads_at_once, heads = self.heads_at_once[which], sizes[1 + which]
        first = part * heads_at_once * self.head_dim + vector * VECTOR
        loaded = []
        for h in cutlass.range_constexpr(heads_at_once):
            start = Int64(row) * stride + (first + h * self.head_dim)
            loaded.append([load_vector(mX, start + i * self.half) for i in range(2)])
        # While the loads are under way.
        twice = self._twice_position(mBounds, mOrigin, row, sizes, angles)
        cos, sin = cos_sin(twice, vector, powers)
        sin = sin * angles.sign
        for h in cutlass.range_constexpr(heads_at_once):
            a, b = (x.load().to(Float32) for x in loaded[h])
            start = Int64(row) * (heads * self.head_dim) + (first + h * self.head_dim)
            store_vector(a * cos - b * sin, mOut, start)
            store_vector(b * cos + a * sin, mOut, start + self.half)

    @cute.jit
    def _twice_position(
        self,
        mBounds: cute.Tensor | None,
        mOrigin: cute.Tensor | None,
        row: Int32,
        sizes: _Sizes,
        angles: _Angles,
    ) -> Int64:
        index = row % sizes.length
        if const_expr(mBounds is not None):
            sequence = find_sequence(mBounds, row, sizes.sequences)
            index = row - mOrigin[sequence]
        return Int64(angles.start) + Int64(angles.step) * index


@kept
def compile_rotation(
    dtype: torch.dtype, head_dim: int, heads_at_once: tuple[int, int], packed: bool
) -> Callable:
    """The compiled kernel of a dtype and head dimension, for batched or packed rows.

    The second of ``heads_at_once`` is 0 if there is one tensor.
    """
    element = CUTE_DTYPES[dtype]
    pair = heads_at_once[1] > 0
    return compile_kernel(
        Rotation(head_dim, (heads_at_once[0], max(1, heads_at_once[1]))),
        _Tensors(
            fake_flat(element),
            fake_flat(element),
            fake_flat(element if pair else None),
            fake_flat(element if pair else None),
            *(fake_flat(Int32 if packed else None, alignment=4) for _ in range(2)),
        ),
        (Int64(1),) * 2,
        _Sizes(*(Int32(1) for _ in _Sizes._fields)),
        _Angles(Int32(0), Int32(1), Float32(1.0)),
        fake_powers(),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in ROTATED_DTYPES:
        for head_dim in (64, 96, 128, 256):
            for heads in ((1, 0), (2, 0), (4, 1), (4, 4)):
                for packed in (False, True):
                    form = "packed" if packed else "batched"
                    name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{heads}-{form}"
                    compiled = functools.partial(compile_rotation, dtype, head_dim, heads, packed)
                    yield f"rope-{name}", compiled


def rotate(
    x: Tensor,
    other: Tensor | None,
    bounds: Tensor | None,
    origin: Tensor | None,
    start: float,
    step: int,
    theta: float,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`nsa.fused.kernel_calls.rotate`."""
    _check(x, other, bounds, origin, start, theta)
    out, other_out = (None if t is None else t.new_empty(t.shape) for t in (x, other))
    if x.numel() == 0:
        return out, other_out
    *leading, heads, head_dim = x.shape
    other_heads = 0 if other is None else other.shape[-2]
    heads_at_once = math.gcd(heads, 4), math.gcd(other_heads, 4) if other_heads else 0
    kernel = compile_rotation(x.dtype, head_dim, heads_at_once, bounds is not None)
    (memory, stride), (other_memory, other_stride) = flat_rows(x), flat_rows(other)
    origin = bounds if origin is None else origin
    tensors = _Tensors(memory, flat(out), other_memory, flat(other_out), bounds, origin)
    sequences = 0 if bounds is None else bounds.shape[0] - 1
    sizes = _Sizes(math.prod(leading), heads, other_heads, sequences, leading[-1])
    angles = _Angles(int(2 * start), 2 * step, -1.0 if inverse else 1.0)
    kernel(tensors, (stride, other_stride), sizes, angles, frequency_powers(theta, head_dim))
    return out, other_out


def _check(
    x: Tensor,
    other: Tensor | None,
    bounds: Tensor | None,
    origin: Tensor | None,
    start: float,
    theta: float,
) -> None:
    """Raise on what the kernel cannot take."""
    if x.dtype not in ROTATED_DTYPES or not x.is_cuda:
        raise ValueError(
            f"x is {x.dtype} on {x.device}; it must be one of {ROTATED_DTYPES} on a GPU"
        )
    if x.ndim < 3 or not rotates_head_dim(x.shape[-1]):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (..., H, D) with D a multiple of "
            f"{2 * VECTOR} up to {MAX_HEAD_DIM}"
        )
    if other is not None:
        wanted = (*x.shape[:-2], other.shape[-2], x.shape[-1])
        check_tensor("other", other, wanted, x.dtype, x.device)
    if int(2 * start) != 2 * start or theta < 1:
        raise ValueError(
            f"start is {start} and theta {theta}; start must be a multiple of 1/2, and theta at "
            "least 1"
        )
    if bounds is not None:
        check_tensor("bounds", bounds, bounds.shape, torch.int32, x.device)
    if origin is not None:
        sequences = 0 if bounds is None else bounds.shape[0] - 1
        check_tensor("origin", origin, (sequences,), torch.int32, x.device)
