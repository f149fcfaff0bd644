"""Compressed keys and values: means over blocks of tokens (paper section 3.3.1)."""

import torch
from torch import Tensor

from nsa.blocks import Geometry, Segments, prefix_sum
from nsa.precision import accumulation_dtype


def compress(x: Tensor, weight: Tensor | None, geometry: Geometry) -> Tensor:
    """``x_cmp[j] = mean(x[j*d : j*d + l])``, then ``@ weight[kv]`` where given.

    Args:
        x: keys or values ``(T, H_kv, D)``.
        weight: ``(H_kv, D, D)`` or None.
        geometry: the sequences of the ``T`` tokens.

    Returns:
        ``(sum of N_cmp, H_kv, D)`` in the dtype of ``x``.
    """
    config, compressed = geometry.config, geometry.compressed
    stride = config.compress_stride
    parts = config.compress_block_size // stride
    x32 = x.to(accumulation_dtype(x.dtype))

    # Blocks overlap in whole strides, so each is a sum of consecutive stride sums.
    used = compressed.count + (parts - 1) * (compressed.count > 0)
    offset = prefix_sum(used)
    strides = Segments(offset, int(offset[-1]))
    start = geometry.tokens.offset[strides.owner] + strides.local * stride
    index = start[:, None] + torch.arange(stride, device=geometry.device)
    sums = x32.index_select(0, index.flatten()).unflatten(0, index.shape).sum(dim=1)

    first = strides.offset[compressed.owner] + compressed.local
    total = sum(sums.index_select(0, first + part) for part in range(parts))
    mean = total / config.compress_block_size
    if weight is not None:
        mean = torch.einsum("mhd,hde->mhe", mean, weight.to(mean.dtype))
    return mean.to(x.dtype)
