"""Float32 sums of blocks of 64 keys in global memory, which many CTAs add to.

A block's sums lie as a warp group has them after a wgmma: for each warp and 8 columns, 4 numbers of
each lane. So an instruction of a warp adds 512 adjacent bytes, which the L2 cache takes 1.2 times
as fast as 64 bytes of each of 8 rows. The conversion to the result's dtype restores the order.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import QUAD, WARP, WARP_ROWS
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import atomic_add_fp32x4, mlir_namedtuple
from nsa.fused.kernels.rows import TILE_KEYS
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_added,
    fake_flat,
    flat,
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


@mlir_namedtuple
class _Sums(NamedTuple):
    """Sums of keys or of values, and what is made of them.

    Attributes:
        total: the sums.
        out: where the gradients are written.
        last: gradients of the last keys of each entry, which are added.
        mean: gradients of means over blocks of keys, which are added.
        factor: multiplies the sums.
    """

    total: cute.Tensor
    out: cute.Tensor
    last: cute.Tensor | None
    mean: cute.Tensor | None
    factor: Float32


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Numbers of the conversion.

    Attributes:
        pieces: 8 columns of two rows each.
        kv_heads: heads of a key.
        blocks: blocks of 64 keys in an entry.
        last: gradients of the last keys of an entry.
        means: gradients of means of an entry.
        mean: keys of a mean.
    """

    pieces: Int32
    kv_heads: Int32
    blocks: Int32
    last: Int32
    means: Int32
    mean: Int32


class ConvertBlockSums:
    """Writes sums of blocks, times a factor, in a dtype and in the order of keys and columns.

    Gradients of the last keys of each entry, and of means over blocks of ``sizes.mean`` keys, are
    added before the sums are rounded, where they are given.
    """

    def __init__(self, head_dim: int):
        self.head_dim = head_dim

    @cute.jit
    def __call__(self, first: _Sums, second: _Sums | None, sizes: _Sizes, stream):
        self.kernel(first, second, sizes).launch(
            grid=[cute.ceil_div(sizes.pieces, _THREADS), 1 if second is None else 2, 1],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, first: _Sums, second: _Sums | None, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, tensor, _ = cute.arch.block_idx()
        piece = bidx * _THREADS + tidx
        if const_expr(second is None):
            self._convert(first, sizes, piece)
        else:
            if tensor == 0:
                self._convert(first, sizes, piece)
            else:
                self._convert(second, sizes, piece)

    @cute.jit
    def _convert(self, sums: _Sums, sizes: _Sizes, piece: Int32):
        if piece < sizes.pieces:
            vectors = const_expr(self.head_dim // VECTOR)
            start = Int64(piece) * 2 * VECTOR
            halves = [load_vector(sums.total, start + i * VECTOR) for i in range(2)]
            row, rest = piece % _ROWS, piece // _ROWS
            vector, rest = rest % vectors, rest // vectors
            row += rest % (TILE_KEYS // WARP_ROWS) * WARP_ROWS
            slot = rest // (TILE_KEYS // WARP_ROWS)
            block, kv_head = slot // sizes.kv_heads, slot % sizes.kv_heads
            column = kv_head * self.head_dim + vector * VECTOR
            width = Int64(sizes.kv_heads * self.head_dim)
            entry = block // sizes.blocks
            local = (block - entry * sizes.blocks) * TILE_KEYS + row
            added = [[], []]  # of each row: whether, times what, and what
            for r in cutlass.range_constexpr(2):
                key = local + r * _ROWS
                # Loads without a condition go out together; what is not wanted is not added.
                if const_expr(sums.last is not None):
                    at = key - (sizes.blocks * TILE_KEYS - sizes.last)
                    last = Int64(entry) * sizes.last + cutlass.max(at, 0)
                    added[r].append((at >= 0, 1.0, load_vector(sums.last, last * width + column)))
                if const_expr(sums.mean is not None):
                    at = key // sizes.mean
                    mean = Int64(entry) * sizes.means + cutlass.min(at, sizes.means - 1)
                    share = 1.0 / Float32(sizes.mean)
                    wanted = at < sizes.means
                    added[r].append((wanted, share, load_vector(sums.mean, mean * width + column)))
            for r in cutlass.range_constexpr(2):
                # Lane t of a quad has columns 2 t and 2 t + 1 of a row, then those of the row 8
                # after.
                out = cute.make_rmem_tensor(VECTOR, Float32)
                for t in cutlass.range_constexpr(QUAD):
                    for c in cutlass.range_constexpr(2):
                        out[2 * t + c] = halves[t // 2][t % 2 * _ADDED + 2 * r + c]
                out.store(out.load() * sums.factor)
                for i in cutlass.range_constexpr(len(added[r])):
                    wanted, share, addend = added[r][i]
                    if wanted:
                        out.store(out.load() + addend.load().to(Float32) * share)
                key = Int64(block) * TILE_KEYS + row + r * _ROWS
                store_vector(out.load(), sums.out, key * width + column)


@kept
def compile_convert(
    dtype: torch.dtype,
    head_dim: int,
    tensors: int,
    last: bool = False,
    mean_dtype: torch.dtype | None = None,
) -> Callable:
    """The kernel of a dtype, for keys and values, or for one of them; with gradients of last keys,
    and with those of means of a dtype."""
    element, mean = CUTE_DTYPES[dtype], None if mean_dtype is None else CUTE_DTYPES[mean_dtype]

    def fakes() -> _Sums:
        elements = (Float32, element, element if last else None, mean)
        return _Sums(*map(fake_flat, elements), Float32(1.0))

    return compile_kernel(
        ConvertBlockSums(head_dim),
        *(fakes(), fakes() if tensors == 2 else None),
        _Sizes(*(Int32(1) for _ in _Sizes._fields)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for dim in (64, 96, 128):
            form = f"block-sums-{name}-{dim}"
            for tensors in (1, 2):
                plain = functools.partial(compile_convert, dtype, dim, tensors)
                yield f"{form}-{tensors}", plain
                yield f"{form}-{tensors}-last", functools.partial(plain, True)
            for mean_dtype in (dtype, torch.float32):
                added = functools.partial(compile_convert, dtype, dim, 2, True, mean_dtype)
                yield f"{form}-means-{str(mean_dtype).removeprefix('torch.')}", added


def round_listed_sums(
    sums: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: Sequence[float],
    last: Sequence[Tensor] | None = None,
    dmeans: Sequence[Tensor] | None = None,
    block_size: int = 1,
) -> None:
    """See :func:`nsa.fused.kernel_calls.round_listed_sums`.

    ``sums`` are those of the heads of one block of keys after another.
    """
    out = outs[0]
    if not out.numel():
        return
    keys, kv_heads, head_dim = out.shape[-3:]
    last = _given("last", last, out, (out.dtype,))
    dmeans = _given("dmeans", dmeans, out, (out.dtype, torch.float32))
    rows = [0 if x is None else x[0].shape[-3] for x in (last, dmeans)]
    mean_dtype = None if dmeans is None else dmeans[0].dtype
    kernel = compile_convert(out.dtype, head_dim, len(outs), last is not None, mean_dtype)
    # A piece is 8 columns of two rows.
    pieces = out.numel() // (2 * VECTOR)
    sizes = _Sizes(pieces, kv_heads, keys // TILE_KEYS, *rows, block_size)
    lasts, means = ([None] * len(outs) if x is None else map(flat, x) for x in (last, dmeans))
    flats = [[x.view(-1) for x in tensors] for tensors in (sums, outs)]
    first, second = (*map(_Sums, *flats, lasts, means, factors), None)[:2]
    kernel(first, second, sizes)


def _given(
    name: str, added: Sequence[Tensor] | None, out: Tensor, dtypes: tuple[torch.dtype, ...]
) -> Sequence[Tensor] | None:
    """What the kernel adds; None if that is nothing."""
    if added is None:
        return None
    for x in added:
        check_added(name, x, out, dtypes)
    return added if added[0].numel() else None
