"""Means over blocks of tokens, and their gradient (paper section 3.3.1).

A token is a row of ``H_kv * D`` elements and heads need no distinction; rows of ``x`` and ``dx``
start ``stride`` elements apart. CTAs tile blocks (backward: tokens) by columns: 16 threads read
16 * VECTOR consecutive elements of a row.
"""

import functools
import math
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    FLOAT_DTYPES,
    VECTOR,
    check_float,
    check_output,
    check_tensor,
    compile_kernel,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

_THREADS = 128
_LANES = 16
_GROUPS = _THREADS // _LANES
_COLUMNS = _LANES * VECTOR
# 16-byte loads (of a 16-bit dtype) that a thread issues together, before it uses the first.
_FORWARD_LOADS = 8
_BACKWARD_TOKENS = 4


class MeanForward:
    """``splits`` groups of 16 threads share the tokens of a block and add up in shared memory."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        splits = math.gcd(block_size, _GROUPS)
        # Fewer than 4 loads for a thread would be too little beside the reduction.
        while splits > 1 and block_size // splits < 4:
            splits //= 2
        self.splits = splits
        self.blocks_per_cta = _GROUPS // splits
        self.tokens_per_thread = block_size // splits
        # The largest divisor, so that no load needs a condition.
        divisors = range(1, min(_FORWARD_LOADS, self.tokens_per_thread) + 1)
        self.loads = max(n for n in divisors if self.tokens_per_thread % n == 0)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mStart: cute.Tensor,
        mMean: cute.Tensor,
        num_blocks: Int32,
        width: Int32,
        stride: Int64,
        stream,
    ):
        tiles = cute.ceil_div(width, _COLUMNS)
        ctas = cute.ceil_div(num_blocks, self.blocks_per_cta) * tiles
        self.kernel(mX, mStart, mMean, num_blocks, width, stride, tiles).launch(
            grid=[ctas, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mStart: cute.Tensor,
        mMean: cute.Tensor,
        num_blocks: Int32,
        width: Int32,
        stride: Int64,
        tiles: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        group = tidx // _LANES
        split = group % self.splits
        block = bidx // tiles * self.blocks_per_cta + group // self.splits
        column = bidx % tiles * _COLUMNS + tidx % _LANES * VECTOR
        inside = block < num_blocks and column < width

        start = Int32(-1)
        if inside:
            start = mStart[block]
        rSum = cute.make_rmem_tensor(VECTOR, Float32)
        rSum.fill(0.0)
        if start >= 0:
            for step in cutlass.range(self.tokens_per_thread // self.loads, unroll=1):
                loaded = []
                for u in cutlass.range_constexpr(self.loads):
                    token = start + (step * self.loads + u) * self.splits + split
                    loaded.append(load_vector(mX, Int64(token) * stride + column))
                for u in cutlass.range_constexpr(self.loads):
                    rSum.store(rSum.load() + loaded[u].load().to(Float32))

        if const_expr(self.splits > 1):
            smem = cutlass.utils.SmemAllocator()
            layout = cute.make_layout((_THREADS, VECTOR), stride=(VECTOR, 1))
            sSum = smem.allocate_tensor(Float32, layout, byte_alignment=16)
            cute.autovec_copy(rSum, sSum[tidx, None])
            cute.arch.barrier()
            if split == 0:
                for other in cutlass.range_constexpr(1, self.splits):
                    rSum.store(rSum.load() + sSum[tidx + other * _LANES, None].load())
        if inside and split == 0:
            mean = rSum.load() * (1.0 / self.block_size)
            store_vector(mean, mMean, Int64(block) * width + column)


class MeanBackward:
    """``dx[t] += sum_i dmean[blocks[t, i]] / block_size``, 4 tokens of a column a thread."""

    def __init__(self, block_size: int, overlap: int):
        self.block_size = block_size
        self.overlap = overlap
        self.tokens_per_cta = _GROUPS * _BACKWARD_TOKENS

    @cute.jit
    def __call__(
        self,
        mdX: cute.Tensor,
        mdMean: cute.Tensor,
        mBlocks: cute.Tensor,
        num_tokens: Int32,
        width: Int32,
        stride: Int64,
        stream,
    ):
        tiles = cute.ceil_div(width, _COLUMNS)
        ctas = cute.ceil_div(num_tokens, self.tokens_per_cta) * tiles
        self.kernel(mdX, mdMean, mBlocks, num_tokens, width, stride, tiles).launch(
            grid=[ctas, 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mdX: cute.Tensor,
        mdMean: cute.Tensor,
        mBlocks: cute.Tensor,
        num_tokens: Int32,
        width: Int32,
        stride: Int64,
        tiles: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        first = bidx // tiles * self.tokens_per_cta + tidx // _LANES
        column = bidx % tiles * _COLUMNS + tidx % _LANES * VECTOR
        if column < width:
            loaded = []
            for u in cutlass.range_constexpr(_BACKWARD_TOKENS):
                token = first + u * _GROUPS
                # Loads without a condition go out together; what is not wanted is not stored.
                inside = cutlass.min(token, num_tokens - 1)
                offset = Int64(inside) * stride + column
                blocks = [mBlocks[Int64(inside) * self.overlap + i] for i in range(self.overlap)]
                loaded.append((token < num_tokens, offset, load_vector(mdX, offset), blocks))
            dmeans = [
                [load_vector(mdMean, Int64(cutlass.max(x, 0)) * width + column) for x in blocks]
                for *_, blocks in loaded
            ]
            for u in cutlass.range_constexpr(_BACKWARD_TOKENS):
                inside, offset, rdX, blocks = loaded[u]
                share = cute.make_rmem_tensor(VECTOR, Float32)
                share.fill(0.0)
                wanted = Boolean(False)
                for i in cutlass.range_constexpr(self.overlap):
                    if blocks[i] >= 0:
                        share.store(share.load() + dmeans[u][i].load().to(Float32))
                        wanted = inside
                if wanted:
                    dx = rdX.load().to(Float32) + share.load() * (1.0 / self.block_size)
                    store_vector(dx, mdX, offset)


@functools.lru_cache(maxsize=None)
def compile_forward(dtype: torch.dtype, out_dtype: torch.dtype, block_size: int) -> Callable:
    """The compiled forward kernel of two dtypes and a block size."""
    return compile_kernel(
        MeanForward(block_size),
        fake_flat(CUTE_DTYPES[dtype]),
        fake_flat(Int32, alignment=4),
        fake_flat(CUTE_DTYPES[out_dtype]),
        *(Int32(1), Int32(1), Int64(1)),
    )


@functools.lru_cache(maxsize=None)
def compile_backward(
    dtype: torch.dtype, dmean_dtype: torch.dtype, block_size: int, overlap: int = 1
) -> Callable:
    """The compiled backward kernel of two dtypes, a block size and the blocks of a token."""
    return compile_kernel(
        MeanBackward(block_size, overlap),
        fake_flat(CUTE_DTYPES[dtype]),
        fake_flat(CUTE_DTYPES[dmean_dtype]),
        fake_flat(Int32, alignment=4),
        *(Int32(1), Int32(1), Int64(1)),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for other in dict.fromkeys((dtype, torch.float32)):
            for block_size in (1, 16, 32, 64, 128):  # 1 gathers rows
                names = (str(x).removeprefix("torch.") for x in (dtype, other, block_size))
                name = "-".join(names)
                arguments = (dtype, other, block_size)
                yield f"mean-forward-{name}", functools.partial(compile_forward, *arguments)
                yield f"mean-backward-{name}", functools.partial(compile_backward, *arguments)
                if block_size == 32:
                    overlapping = functools.partial(compile_backward, *arguments, 2)
                    yield f"mean-backward-{name}-2", overlapping


def mean_forward(x: Tensor, start: Tensor, block_size: int, out_dtype: torch.dtype) -> Tensor:
    """``mean[m] = mean(x[start[m] : start[m] + block_size])``, summed in float32.

    Args:
        x: ``(T, H_kv, D)``, bfloat16, float16 or float32; D a multiple of 8. A slice of heads is
            read where it is; other strides are copied.
        start: int32 ``(M,)``, the first token of each block, -1 for a row that is 0. Not checked:
            a block must end within ``x``. Blocks may overlap.
        block_size: tokens in a block.
        out_dtype: one of the dtypes of ``x``.

    Returns:
        ``(M, H_kv, D)`` in ``out_dtype``.
    """
    _check("x", x, block_size)
    check_tensor("start", start, (start.numel(),), torch.int32, x.device)
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; it must be one of {FLOAT_DTYPES}")
    shape = (start.shape[0], *x.shape[1:])
    if x.numel() == 0:
        return torch.zeros(shape, dtype=out_dtype, device=x.device)
    mean = torch.empty(shape, dtype=out_dtype, device=x.device)
    if mean.numel() == 0:
        return mean
    kernel = compile_forward(x.dtype, out_dtype, block_size)
    width = x.shape[1] * x.shape[2]
    source, stride = flat_rows(x)
    kernel(source, start.contiguous(), mean.view(-1), start.shape[0], width, stride)
    return mean


def mean_backward_(dx: Tensor, dmean: Tensor, blocks: Tensor, block_size: int) -> None:
    """``dx[t] += sum_i dmean[blocks[t, i]] / block_size`` where these are not negative, in place.

    Args:
        dx: ``(T, H_kv, D)``, bfloat16, float16 or float32, a slice of heads at most, and 16-byte
            aligned; D a multiple of 8. The sum is in float32 and rounded once.
        dmean: ``(M, H_kv, D)`` in float32 or the dtype of ``dx``. Copied if it is not contiguous.
        blocks: int32 ``(T, overlap)``, the blocks of each token, -1 for none. Not checked
            against M.
        block_size: tokens in a block.
    """
    _check("dx", dx, block_size)
    check_output("dx", dx)
    if dmean.dtype not in (dx.dtype, torch.float32):
        raise ValueError(f"dmean is {dmean.dtype}; it must be {dx.dtype} or {torch.float32}")
    check_tensor("dmean", dmean, (dmean.shape[0], *dx.shape[1:]), dmean.dtype, dx.device)
    check_tensor("blocks", blocks, (dx.shape[0], blocks.shape[-1]), torch.int32, dx.device)
    if dx.numel() == 0 or dmean.numel() == 0:
        return
    kernel = compile_backward(dx.dtype, dmean.dtype, block_size, blocks.shape[1])
    width = dx.shape[1] * dx.shape[2]
    target, stride = flat_rows(dx)
    kernel(target, flat(dmean), blocks.contiguous().view(-1), dx.shape[0], width, stride)


def _check(name: str, x: Tensor, block_size: int) -> None:
    check_float(name, x)
    if x.ndim != 3 or x.shape[2] % VECTOR:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (T, H_kv, D) with D a multiple of "
            f"{VECTOR}"
        )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
