"""Compressed keys and values (paper section 3.3.1), forward and backward."""

import torch
from torch import Tensor

from nsa.fused import own_kernels
from nsa.fused.layout import Plan, over_batch
from nsa.precision import accumulation_dtype


def compress(x: Tensor, weight: Tensor | None, plan: Plan) -> Tensor:
    """``x_cmp[j] = mean(x[j*d : j*d + l])``, then ``@ weight[kv]`` where given.

    Args:
        x: keys or values ``(B, T, H_kv, D)``.
        weight: ``(H_kv, D, D)`` or None.
        plan: the sequences in each ``T`` tokens.

    Returns:
        ``(B, M, H_kv, D)`` in the dtype of ``x``; rows past the last block are 0.
    """
    if weight is None:
        return _mean(x, x.dtype, plan)
    mean = _mean(x, accumulation_dtype(x.dtype), plan)
    return torch.einsum("bmhd,hde->bmhe", mean, weight.to(mean.dtype)).to(x.dtype)


def compress_backward_(
    dx: Tensor, dx_cmp: Tensor, x: Tensor, weight: Tensor | None, plan: Plan
) -> Tensor | None:
    """Add the gradient of :func:`compress` to ``dx`` in place and return that of the weight."""
    compressed, dweight = plan.geometry.compressed, None
    dmean = dx_cmp
    if weight is not None:
        dtype = accumulation_dtype(x.dtype)
        mean = _mean(x, dtype, plan)
        dout = dx_cmp.to(dtype)
        dweight = torch.einsum("bmhd,bmhe->hde", mean, dout).to(weight.dtype)
        dmean = torch.einsum("bmhe,hde->bmhd", dout, weight.to(dtype))
    if compressed.total == 0:
        return dweight
    blocks = plan.blocks_of_token
    blocks = over_batch(blocks.flatten(), dx.shape[0], compressed.total).view(-1, blocks.shape[1])
    size = plan.config.compress_block_size
    own_kernels.mean_backward_(dx.flatten(0, 1), dmean.flatten(0, 1), blocks, size)
    return dweight


def _mean(x: Tensor, dtype: torch.dtype, plan: Plan) -> Tensor:
    compressed = plan.geometry.compressed
    if compressed.total == 0:
        return x.new_empty(x.shape[0], 0, *x.shape[2:], dtype=dtype)
    start = over_batch(plan.block_start, x.shape[0], plan.geometry.tokens.total)
    size = plan.config.compress_block_size
    mean = own_kernels.mean_forward(x.flatten(0, 1), start, size, dtype)
    return mean.unflatten(0, (x.shape[0], compressed.total))
