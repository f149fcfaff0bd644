"""Scores of few tiles: products of float64, rounded once to float32.

A CTA computes the scores of 8 tiles of a head with 128 compressed keys, a thread those of one key.
Every thread adds up in the same order, so equal keys score equally.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Float64, Int32, Int64
from torch import Tensor

from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_float,
    check_tensor,
    fake_flat,
    is_aligned,
    load_vector,
)

KEY_DTYPES = (torch.bfloat16, torch.float16)
_THREADS = 128
_TILES = 8


@mlir_namedtuple
class _Tensors(NamedTuple):
    """One query a tile and head, compressed keys, and the scores."""

    summary: cute.Tensor
    keys: cute.Tensor
    scores: cute.Tensor


@mlir_namedtuple
class _Strides(NamedTuple):
    """Elements from one entry of the batch, row and head to the next."""

    entry: Int64
    row: Int64
    head: Int64


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Entries of the batch, heads, heads of a KV head, tiles and compressed keys of an entry."""

    batch: Int32
    heads: Int32
    group: Int32
    tiles: Int32
    keys: Int32


class TileScores:
    """``scores[b, h, c, j] = summary[b, c, h] . keys[b, j, h // group]``."""

    def __init__(self, head_dim: int):
        self.head_dim = head_dim
        self.vectors = head_dim // VECTOR

    @cute.jit
    def __call__(
        self, tensors: _Tensors, strides: _Strides, key_strides: _Strides, sizes: _Sizes, stream
    ):
        grid = [
            cute.ceil_div(sizes.keys, _THREADS),
            cute.ceil_div(sizes.tiles, _TILES),
            sizes.batch * sizes.heads,
        ]
        self.kernel(tensors, strides, key_strides, sizes).launch(
            grid=grid, block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, strides: _Strides, key_strides: _Strides, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, bidy, row = cute.arch.block_idx()
        entry, head, first = row // sizes.heads, row % sizes.heads, bidy * _TILES
        smem = cutlass.memory.SmemAllocator()
        layout = cute.make_layout((_TILES, self.head_dim), stride=(self.head_dim, 1))
        sSummary = smem.allocate_tensor(Float64, layout, byte_alignment=16)
        for i in cutlass.range(tidx, _TILES * self.vectors, _THREADS, unroll=1):
            tile, column = i // self.vectors, i % self.vectors * VECTOR
            # Past the last tile, that one again: its scores are dropped.
            source = Int64(cutlass.min(first + tile, sizes.tiles - 1)) * strides.row
            source += entry * strides.entry + head * strides.head + column
            wide = cute.make_rmem_tensor(VECTOR, Float32)
            wide.store(load_vector(tensors.summary, source).load().to(Float32))
            for c in cutlass.range_constexpr(VECTOR):
                sSummary[tile, column + c] = wide[c].to(Float64)
        cute.arch.barrier()

        key = bidx * _THREADS + tidx
        if key < sizes.keys:
            start = Int64(key) * key_strides.row + entry * key_strides.entry
            start += head // sizes.group * key_strides.head
            totals = cute.make_rmem_tensor(_TILES, Float64)
            totals.fill(0.0)
            wide = cute.make_rmem_tensor(VECTOR, Float32)
            for v in cutlass.range(self.vectors, unroll=2):
                wide.store(load_vector(tensors.keys, start + v * VECTOR).load().to(Float32))
                for c in cutlass.range_constexpr(VECTOR):
                    value = wide[c].to(Float64)
                    for t in cutlass.range_constexpr(_TILES):
                        totals[t] = totals[t] + sSummary[t, v * VECTOR + c] * value
            for t in cutlass.range_constexpr(_TILES):
                if first + t < sizes.tiles:
                    place = (Int64(row) * sizes.tiles + (first + t)) * sizes.keys + key
                    tensors.scores[place] = totals[t].to(Float32)


@kept
def compile_scores(summary_dtype: torch.dtype, key_dtype: torch.dtype, head_dim: int) -> Callable:
    """The compiled kernel of two dtypes and a head dimension."""
    tensors = _Tensors(
        fake_flat(CUTE_DTYPES[summary_dtype]),
        fake_flat(CUTE_DTYPES[key_dtype]),
        fake_flat(Float32),
    )
    strides = (_Strides(*(Int64(1),) * 3) for _ in range(2))
    return compile_kernel(TileScores(head_dim), tensors, *strides, _Sizes(*(Int32(1),) * 5))


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in KEY_DTYPES:
        for summary_dtype in (dtype, torch.float32):
            for head_dim in (64, 96, 128, 256):
                names = (str(x).removeprefix("torch.") for x in (dtype, summary_dtype))
                compiled = functools.partial(compile_scores, summary_dtype, dtype, head_dim)
                yield f"tile-scores-{'-'.join(names)}-{head_dim}", compiled


def tile_scores(summary: Tensor, k_cmp: Tensor) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.tile_scores`."""
    _check(summary, k_cmp)
    (batch, tiles, heads, head_dim), (_, keys, num_kv_heads, _) = summary.shape, k_cmp.shape
    scores = torch.empty((batch, heads, tiles, keys), dtype=torch.float32, device=k_cmp.device)
    if scores.numel() == 0:
        return scores
    kernel = compile_scores(summary.dtype, k_cmp.dtype, head_dim)
    (summary, strides), (k_cmp, key_strides) = _memory(summary), _memory(k_cmp)
    sizes = _Sizes(batch, heads, heads // num_kv_heads, tiles, keys)
    kernel(_Tensors(summary, k_cmp, scores.view(-1)), strides, key_strides, sizes)
    return scores


def _memory(x: Tensor) -> tuple[Tensor, _Strides]:
    """The memory of ``x (B, R, H, D)`` as one dimension; copied if vectors are not aligned."""
    *strides, last = x.stride()
    if last != 1 or any(stride % VECTOR for stride in strides) or not is_aligned(x):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = x.stride()[:-1]
    extent = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((extent,), (1,)), _Strides(*strides)


def _check(summary: Tensor, k_cmp: Tensor) -> None:
    """Raise on what the kernel cannot take."""
    check_float("summary", summary)
    batch, _, heads, head_dim = summary.shape
    num_kv_heads = k_cmp.shape[2]
    check_tensor("k_cmp", k_cmp, (batch, k_cmp.shape[1], num_kv_heads, head_dim), k_cmp.dtype,
                 summary.device)  # fmt: skip
    if k_cmp.dtype not in KEY_DTYPES or summary.dtype not in (k_cmp.dtype, torch.float32):
        raise ValueError(
            f"k_cmp is {k_cmp.dtype} and summary {summary.dtype}; k_cmp must be one of "
            f"{KEY_DTYPES}, and summary of that or {torch.float32}"
        )
    if head_dim % VECTOR or num_kv_heads == 0 or heads % num_kv_heads:
        raise ValueError(
            f"summary has shape {tuple(summary.shape)} and k_cmp {tuple(k_cmp.shape)}; D must be a "
            f"multiple of {VECTOR}, and H of H_kv"
        )
