"""Means over blocks of tokens, and their gradient (paper section 3.3.1).

A token is a row of ``H_kv * D`` elements and heads need no distinction; rows of ``x`` and ``dx``
start ``stride`` elements apart. CTAs tile blocks (backward: tokens) by columns: 16 threads read
16 * VECTOR consecutive elements of a row. Where keys and values are computed together, the second
dimension of the grid chooses between them.
"""

import functools
import math
from collections.abc import Callable, Iterator

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernel_inputs import Pair
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    FLOAT_DTYPES,
    VECTOR,
    check_float,
    check_output,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    is_aligned,
    load_vector,
    store_vector,
)

_TensorPair = tuple[cute.Tensor, cute.Tensor]

_THREADS = 128
_ROW_THREADS = 16
_GROUPS = _THREADS // _ROW_THREADS
_COLUMNS = _ROW_THREADS * VECTOR
# 16-byte loads (of a 16-bit dtype) that a thread issues together, before it uses the first.
_FORWARD_LOADS = 8
_BACKWARD_TOKENS = 4


class MeanForward:
    """``splits`` groups of 16 threads share the tokens of a block and add up in shared memory.

    With ``in_order``, one group adds token by token.
    """

    def __init__(self, block_size: int, in_order: bool):
        self.block_size = block_size
        splits = 1 if in_order else math.gcd(block_size, _GROUPS)
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
        mOther: cute.Tensor | None,
        mStart: cute.Tensor,
        mMean: cute.Tensor,
        num_blocks: Int32,
        width: Int32,
        strides: cute.Stride,
        stream,
    ):
        tiles = cute.ceil_div(width, _COLUMNS)
        ctas = cute.ceil_div(num_blocks, self.blocks_per_cta) * tiles
        count = 1 if const_expr(mOther is None) else 2
        self.kernel(mX, mOther, mStart, mMean, num_blocks, width, strides, tiles).launch(
            grid=[ctas, count, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mOther: cute.Tensor | None,
        mStart: cute.Tensor,
        mMean: cute.Tensor,
        num_blocks: Int32,
        width: Int32,
        strides: cute.Stride,
        tiles: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, which, _ = cute.arch.block_idx()
        group = tidx // _ROW_THREADS
        split = group % self.splits
        block = bidx // tiles * self.blocks_per_cta + group // self.splits
        column = bidx % tiles * _COLUMNS + tidx % _ROW_THREADS * VECTOR
        inside = block < num_blocks and column < width
        stride = strides[0]
        if const_expr(mOther is not None):
            mX, stride = _choose(which, (mX, mOther), strides)

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
            smem = cutlass.memory.SmemAllocator()
            layout = cute.make_layout((_THREADS, VECTOR), stride=(VECTOR, 1))
            sSum = smem.allocate_tensor(Float32, layout, byte_alignment=16)
            cute.autovec_copy(rSum, sSum[tidx, None])
            cute.arch.barrier()
            if split == 0:
                for other in cutlass.range_constexpr(1, self.splits):
                    rSum.store(rSum.load() + sSum[tidx + other * _ROW_THREADS, None].load())
        if inside and split == 0:
            mean = rSum.load() * (1.0 / self.block_size)
            row = Int64(which) * num_blocks + block
            store_vector(mean, mMean, row * width + column)


class MeanBackward:
    """``dx[t] = sum_i dmean[blocks[t, i]] / block_size`` of two tensors, 4 tokens of a column of
    one of them a thread; with ``addends`` ``dx[t] += first[t] + last[t]``.

    ``strides`` are of the tokens of ``dxs``, of the first addends' tokens and heads, and of the
    tokens of the last ones, which the last ``rows[1]`` of an entry's ``rows[0]`` tokens have.
    """

    def __init__(self, block_size: int, overlap: int):
        self.block_size = block_size
        self.overlap = overlap
        self.tokens_per_cta = _GROUPS * _BACKWARD_TOKENS

    @cute.jit
    def __call__(
        self,
        dxs: _TensorPair,
        addends: tuple[_TensorPair, _TensorPair] | None,
        dmeans: _TensorPair,
        mBlocks: cute.Tensor,
        num_tokens: Int32,
        width: Int32,
        head_dim: Int32,
        strides: tuple[cute.Stride, cute.Stride, cute.Stride, cute.Stride],
        rows: tuple[Int32, Int32],
        stream,
    ):
        tiles = cute.ceil_div(width, _COLUMNS)
        ctas = cute.ceil_div(num_tokens, self.tokens_per_cta) * tiles
        self.kernel(
            dxs, addends, dmeans, mBlocks, num_tokens, width, head_dim, strides, rows, tiles
        ).launch(grid=[ctas, 2, 1], block=[_THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(
        self,
        dxs: _TensorPair,
        addends: tuple[_TensorPair, _TensorPair] | None,
        dmeans: _TensorPair,
        mBlocks: cute.Tensor,
        num_tokens: Int32,
        width: Int32,
        head_dim: Int32,
        strides: tuple[cute.Stride, cute.Stride, cute.Stride, cute.Stride],
        rows: tuple[Int32, Int32],
        tiles: Int32,
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, which, _ = cute.arch.block_idx()
        first = bidx // tiles * self.tokens_per_cta + tidx // _ROW_THREADS
        column = bidx % tiles * _COLUMNS + tidx % _ROW_THREADS * VECTOR
        mdX, stride = _choose(which, dxs, strides[0])
        mFirst, step, place = mdX, stride, Int64(column)
        mLast, apart = mdX, stride
        if const_expr(addends is not None):
            mFirst, step = _choose(which, addends[0], strides[1])
            _, head_step = _choose(which, addends[0], strides[2])
            place = Int64(column // head_dim) * head_step + column % head_dim
            mLast, apart = _choose(which, addends[1], strides[3])
        of_entry, last = rows
        mdMean, _ = _choose(which, dmeans, (width, width))
        if column < width:
            loaded = []
            for u in cutlass.range_constexpr(_BACKWARD_TOKENS):
                token = first + u * _GROUPS
                # Loads without a condition go out together; what is not wanted is not stored.
                inside = Int64(cutlass.min(token, num_tokens - 1))
                blocks = [mBlocks[inside * self.overlap + i] for i in range(self.overlap)]
                added = []
                if const_expr(addends is not None):
                    entry = cutlass.min(token, num_tokens - 1) // of_entry
                    late = cutlass.min(token, num_tokens - 1) - entry * of_entry - (of_entry - last)
                    row = Int64(entry) * last + cutlass.max(late, 0)
                    added = [
                        (Int32(0), load_vector(mFirst, inside * step + place)),
                        (late, load_vector(mLast, row * apart + column)),
                    ]
                loaded.append((token < num_tokens, inside, added, blocks))
            shares = [
                [load_vector(mdMean, Int64(cutlass.max(x, 0)) * width + column) for x in blocks]
                for *_, blocks in loaded
            ]
            for u in cutlass.range_constexpr(_BACKWARD_TOKENS):
                wanted, token, added, blocks = loaded[u]
                rSum = cute.make_rmem_tensor(VECTOR, Float32)
                rSum.fill(0.0)
                for i in cutlass.range_constexpr(self.overlap):
                    if blocks[i] >= 0:
                        rSum.store(rSum.load() + shares[u][i].load().to(Float32))
                rSum.store(rSum.load() * (1.0 / self.block_size))
                for i in cutlass.range_constexpr(len(added)):
                    since, addend = added[i]
                    if since >= 0:
                        rSum.store(rSum.load() + addend.load().to(Float32))
                if wanted:
                    store_vector(rSum.load(), mdX, token * stride + column)


@cute.jit
def _choose(which: Int32, tensors: _TensorPair, strides: cute.Stride) -> tuple[cute.Tensor, Int64]:
    """One of two tensors, and its stride."""
    mX, stride = tensors[0], strides[0]
    if which == 1:
        mX, stride = tensors[1], strides[1]
    return mX, stride


@kept
def compile_forward(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    block_size: int,
    pair: bool = False,
    in_order: bool = False,
) -> Callable:
    """The compiled forward kernel of two dtypes and a block size, for one tensor or two."""
    element = CUTE_DTYPES[dtype]
    return compile_kernel(
        MeanForward(block_size, in_order),
        fake_flat(element),
        fake_flat(element if pair else None),
        fake_flat(Int32, alignment=4),
        fake_flat(CUTE_DTYPES[out_dtype]),
        *(Int32(1), Int32(1), (Int64(1),) * 2),
    )


@kept
def compile_backward(
    dtype: torch.dtype,
    dmean_dtype: torch.dtype,
    block_size: int,
    overlap: int = 1,
    with_addends: bool = False,
) -> Callable:
    """The compiled backward kernel of two dtypes, a block size and the blocks of a token.

    ``with_addends`` adds two more pairs.
    """

    def pair(dtype: torch.dtype) -> tuple:
        return tuple(fake_flat(CUTE_DTYPES[dtype]) for _ in range(2))

    return compile_kernel(
        MeanBackward(block_size, overlap),
        pair(dtype),
        (pair(dtype), pair(dtype)) if with_addends else None,
        pair(dmean_dtype),
        fake_flat(Int32, alignment=4),
        *(Int32(1), Int32(1), Int32(1), ((Int64(1),) * 2,) * 4, (Int32(1),) * 2),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in FLOAT_DTYPES:
        for other in dict.fromkeys((dtype, torch.float32)):
            for block_size in (1, 16, 32, 64, 128):  # 1 gathers rows
                names = (str(x).removeprefix("torch.") for x in (dtype, other, block_size))
                name = "-".join(names)
                arguments = (dtype, other, block_size)
                for pair in (False, True):
                    for form in ("", "-in-order") if block_size in (32, 64) else ("",):
                        options = (*arguments, pair, bool(form))
                        forward = functools.partial(compile_forward, *options)
                        yield f"mean-forward-{name}-{1 + pair}{form}", forward
                for overlap in (1, 2) if block_size == 32 else (1,):
                    for form, adds in (("new", False), ("add", True)):
                        backward = functools.partial(compile_backward, *arguments, overlap, adds)
                        yield f"mean-backward-{name}-{overlap}-{form}", backward


def mean_forward(
    x: Tensor,
    start: Tensor,
    block_size: int,
    out_dtype: torch.dtype,
    other: Tensor | None = None,
    in_order: bool = False,
) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.mean_forward`."""
    _check("x", x, block_size)
    if other is not None:
        check_tensor("other", other, x.shape, x.dtype, x.device)
    num_blocks = start.numel()
    check_tensor("start", start, (num_blocks,), torch.int32, x.device)
    if out_dtype not in FLOAT_DTYPES:
        raise ValueError(f"out_dtype is {out_dtype}; it must be one of {FLOAT_DTYPES}")
    shape = _with_rows(x, num_blocks)
    width = shape[-2] * shape[-1]
    if other is not None:
        shape = (2, *shape)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=out_dtype, device=x.device)
    mean = x.new_empty(shape, dtype=out_dtype)
    if mean.numel() == 0:
        return mean
    kernel = compile_forward(x.dtype, out_dtype, block_size, other is not None, in_order)
    (x, stride), (other, other_stride) = flat_rows(x), flat_rows(other)
    strides = (stride, other_stride)
    kernel(x, other, start.contiguous(), mean.view(-1), num_blocks, width, strides)
    return mean


def mean_backward(
    dmeans: Pair,
    blocks: Tensor,
    block_size: int,
    dtype: torch.dtype,
    addends: tuple[Pair, Pair] | None = None,
) -> Pair:
    """See :func:`nsa.fused.kernel_calls.mean_backward`."""
    _check("dmean", dmeans[0], block_size)
    (num_tokens, overlap), device = blocks.shape, blocks.device
    shape = _with_rows(dmeans[0], num_tokens)
    _check_backward(dmeans, blocks, dtype, addends, shape)
    apart = addends is not None and all(map(_has_heads_apart, addends[0]))
    if addends is None or apart:
        dxs = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    else:
        dxs = addends[0]
    if dxs[0].numel() == 0:
        return dxs
    if dmeans[0].numel() == 0:
        # No token is in a block, but the kernel loads one all the same.
        dmeans = [torch.zeros(shape[-2:], dtype=dtype, device=device)] * 2
    kernel = compile_backward(dtype, dmeans[0].dtype, block_size, overlap, addends is not None)
    targets, strides = zip(*map(flat_rows, dxs), strict=True)
    tokens, heads, head_dim = shape[-3:]
    firsts, others, last = targets, targets, 0
    first_strides, head_strides, other_strides = strides, (head_dim,) * 2, strides
    if addends is not None:
        if apart:
            firsts = tuple(x.transpose(-2, -3).reshape(-1) for x in addends[0])
            first_strides, head_strides = (head_dim,) * 2, (tokens * head_dim,) * 2
        last = addends[1][0].shape[-3]
        if last:
            # Else what is read without being wanted is memory all the same.
            others, other_strides = zip(*map(flat_rows, addends[1]), strict=True)
    kernel(
        targets, None if addends is None else (firsts, others), tuple(map(flat, dmeans)),
        blocks.contiguous().view(-1), num_tokens, heads * head_dim, head_dim,
        (strides, first_strides, head_strides, other_strides), (tokens, last),
    )  # fmt: skip
    return dxs


def _has_heads_apart(x: Tensor) -> bool:
    """Whether ``(1, T, H, D)`` has the rows of each head one after another."""
    one = math.prod(x.shape[:-3]) == 1 and not x.is_contiguous()
    return one and x.transpose(-2, -3).is_contiguous() and is_aligned(x)


def _with_rows(x: Tensor, rows: int) -> tuple[int, ...]:
    """The shape of ``x (..., R, H_kv, D)`` with so many rows in all."""
    *leading, _, heads, head_dim = x.shape
    entries = max(1, math.prod(leading))
    if rows % entries:
        raise ValueError(f"{rows} rows cannot be divided among {entries} entries of the batch")
    return (*leading, rows // entries, heads, head_dim)


def _check(name: str, x: Tensor, block_size: int) -> None:
    check_float(name, x)
    if x.ndim < 3 or x.shape[-1] % VECTOR:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (..., T, H_kv, D) with D a multiple of "
            f"{VECTOR}"
        )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")


def _check_backward(
    dmeans: Pair,
    blocks: Tensor,
    dtype: torch.dtype,
    addends: tuple[Pair, Pair] | None,
    shape: tuple[int, ...],
) -> None:
    """Raise on what the kernel cannot take."""
    dmean, other = dmeans
    if dtype not in FLOAT_DTYPES or dmean.dtype not in (dtype, torch.float32):
        raise ValueError(
            f"dtype is {dtype} and dmean {dmean.dtype}; dtype must be one of {FLOAT_DTYPES}, and "
            f"dmean of that or {torch.float32}"
        )
    check_tensor("dmean", other, dmean.shape, dmean.dtype, dmean.device)
    check_tensor("blocks", blocks, blocks.shape, torch.int32, dmean.device)
    if addends is not None:
        for x in addends[0]:
            check_tensor("addend", x, shape, dtype, dmean.device)
        *leading, tokens, heads, head_dim = shape
        last = addends[1][0].shape[-3]
        if last > tokens:
            raise ValueError(f"the second addends have {last} rows; they may have {tokens}")
        for x in addends[1]:
            check_tensor("addend", x, (*leading, last, heads, head_dim), dtype, dmean.device)
        for x in addends[0]:
            if not _has_heads_apart(x):
                check_output("addend", x)
