"""Means of blocks."""

import torch
from torch import Tensor

from nsa.fused import kernels
from nsa.fused.kernel_inputs import Pair


def mean_forward(
    x: Tensor,
    start: Tensor,
    block_size: int,
    out_dtype: torch.dtype,
    other: Tensor | None = None,
    in_order: bool = False,
) -> Tensor:
    """``mean[m] = mean(x[start[m] : start[m] + block_size])``, summed in float32.

    Args:
        x: ``(..., T, H_kv, D)``, bfloat16, float16 or float32; D a multiple of 8. A slice of heads
            is read where it is; other strides are copied.
        start: int32 ``(M,)``, the first token of each block among all rows of ``x``, negative for
            a block that is 0. Not checked: a block must end within ``x``. Blocks may overlap.
        block_size: tokens in a block.
        out_dtype: one of the dtypes of ``x``.
        other: a second tensor like ``x``, but for its strides.
        in_order: add token by token, as code that compresses one block at a time does; it takes
            longer where blocks are few.

    Returns:
        ``(..., M', H_kv, D)`` in ``out_dtype`` with the M blocks in order, as many for each of the
        leading dimensions; with ``other`` ``(2, ...)``.
    """
    return kernels.load("means").mean_forward(**locals())


def mean_backward(
    dmeans: Pair,
    blocks: Tensor,
    block_size: int,
    dtype: torch.dtype,
    addends: tuple[Pair, Pair] | None = None,
) -> Pair:
    """``dx[t] = sum_i dmean[blocks[t, i]] / block_size`` for keys and values, rounded once.

    Args:
        dmeans: ``(..., M, H_kv, D)`` each, in float32 or ``dtype``. Copied if not contiguous.
        blocks: int32 ``(T, overlap)``, the blocks of each token among all rows of a ``dmean``, -1
            for none. Not checked against them.
        block_size: tokens in a block.
        dtype: bfloat16, float16 or float32.
        addends: two pairs of gradients of keys and values to add, ``(..., T', H_kv, D)`` each in
            ``dtype``. The first pair is overwritten if it is contiguous or slices of heads. Else it
            must be one entry with the rows of each head one after another. The second pair is read
            in place if it is contiguous or slices of heads, else copied; it may have only the last
            tokens of each entry, or none.

    Returns:
        ``(..., T', H_kv, D)`` each in ``dtype``: the first pair of ``addends`` if that is
        overwritten, or new tensors.
    """
    return kernels.load("means").mean_backward(**locals())
