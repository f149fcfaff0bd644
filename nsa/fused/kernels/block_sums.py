"""Float32 sums of blocks of 64 keys in global memory, which many CTAs add to.

A block's sums lie as a warp group has them after a wgmma: for each warp and 8 columns, 4 numbers of
each lane. So an instruction of a warp adds 512 adjacent bytes, which the L2 cache takes 1.2 times
as fast as 64 bytes of each of 8 rows. The conversion to the result's dtype restores the order.
"""

import functools
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import QUAD, WARP, WARP_ROWS
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import atomic_add_fp32x4
from nsa.fused.kernels.rows import TILE_KEYS
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    fake_flat,
    load_vector,
    store_vector,
)

_THREADS = 256
_ROWS = 8  # of a warp that hold adjacent columns: a lane has numbers of one of them and of 8 after
_ADDED = 4  # numbers that a thread adds at once


@cute.jit
def add_block(acc: cute.Tensor, mSum: cute.Tensor, start: Int64, warp: Int32, lane: Int32):
    """Add a wgmma accumulator of 64 rows to the sums of a block, which begin at ``start``."""
    vectors = const_expr(cute.size(acc) // _ADDED)
    pointer = mSum.iterator + (start + (warp * vectors * WARP + lane) * _ADDED)
    for i in cutlass.range_constexpr(vectors):
        values = tuple(acc[_ADDED * i + j] for j in range(_ADDED))
        atomic_add_fp32x4(*values, pointer + i * _ADDED * WARP)


class ConvertBlockSums:
    """Writes sums of blocks, times a factor, in a dtype and in the order of keys and columns."""

    def __init__(self, head_dim: int):
        self.head_dim = head_dim

    @cute.jit
    def __call__(
        self,
        mSum: cute.Tensor,
        mX: cute.Tensor,
        pieces: Int32,
        kv_heads: Int32,
        factor: Float32,
        stream,
    ):
        self.kernel(mSum, mX, pieces, kv_heads, factor).launch(
            grid=[cute.ceil_div(pieces, _THREADS), 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mSum: cute.Tensor,
        mX: cute.Tensor,
        pieces: Int32,
        kv_heads: Int32,
        factor: Float32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        piece = bidx * _THREADS + tidx
        if piece < pieces:
            vectors = const_expr(self.head_dim // VECTOR)
            halves = [load_vector(mSum, Int64(piece) * 2 * VECTOR + i * VECTOR) for i in range(2)]
            row, rest = piece % _ROWS, piece // _ROWS
            vector, rest = rest % vectors, rest // vectors
            row += rest % (TILE_KEYS // WARP_ROWS) * WARP_ROWS
            slot = rest // (TILE_KEYS // WARP_ROWS)
            key, kv_head = Int64(slot // kv_heads) * TILE_KEYS + row, slot % kv_heads
            for r in cutlass.range_constexpr(2):
                # Lane t of a quad has columns 2 t and 2 t + 1 of a row, then those of the row 8
                # after.
                out = cute.make_rmem_tensor(VECTOR, Float32)
                for t in cutlass.range_constexpr(QUAD):
                    for c in cutlass.range_constexpr(2):
                        out[2 * t + c] = halves[t // 2][t % 2 * _ADDED + 2 * r + c]
                offset = ((key + r * _ROWS) * kv_heads + kv_head) * self.head_dim
                store_vector(out.load() * factor, mX, offset + vector * VECTOR)


@kept
def compile_convert(dtype: torch.dtype, head_dim: int) -> Callable:
    tensors = fake_flat(Float32), fake_flat(CUTE_DTYPES[dtype])
    return compile_kernel(ConvertBlockSums(head_dim), *tensors, Int32(1), Int32(1), Float32(1.0))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim in (64, 96, 128):
            yield f"block-sums-{name}-{dim}", functools.partial(compile_convert, dtype, dim)


def round_listed_sums(sums: Tensor, out: Tensor, factor: float) -> None:
    """See :func:`nsa.fused.kernel_calls.round_listed_sums`; ``out (..., keys, H_kv, D)``.

    ``sums`` are those of the heads of one block of keys after another.
    """
    if out.numel():
        kv_heads, head_dim = out.shape[-2:]
        # A piece is 8 columns of two rows.
        pieces = out.numel() // (2 * VECTOR)
        kernel = compile_convert(out.dtype, head_dim)
        kernel(sums.view(-1), out.view(-1), pieces, kv_heads, factor)
