"""Compressed keys and values: means over blocks of tokens (paper section 3.3.1)."""

import torch
from torch import Tensor

from nsa.geometry import Geometry
from nsa.precision import accumulation_dtype
from nsa.reference.products import weighted_sum
from nsa.segments import Segments, prefix_sum


def compress(x: Tensor, weight: Tensor | None, geometry: Geometry) -> Tensor:
    """``x_cmp[j] = mean(x[j*d : j*d + l])``, then ``@ weight[kv]`` where given.

    Args:
        x: keys or values ``(T, H_kv, D)``.
        weight: ``(H_kv, D, D)`` or None.
        geometry: the sequences of the ``T`` keys.

    Returns:
        ``(sum of N_cmp, H_kv, D)`` in the dtype of ``x``.
    """
    config, compressed = geometry.config, geometry.compressed
    stride = config.compress_stride
    parts = config.compress_block_size // stride
    x32 = x.to(accumulation_dtype(x.dtype))

    # Blocks overlap in whole strides, so each block is a sum of consecutive stride sums.
    used = compressed.count + (parts - 1) * (compressed.count > 0)
    offset = prefix_sum(used)
    strides = Segments(offset, int(offset[-1]))
    start = geometry.keys.offset[strides.owner] + strides.local * stride
    # A stride longer than the sequences belongs to no block, so its size does not matter.
    within = torch.arange(min(stride, x.shape[0]), device=geometry.device)
    index = start[:, None] + within
    sums = x32.index_select(0, index.flatten()).unflatten(0, index.shape).sum(dim=1)

    first = strides.offset[compressed.owner] + compressed.local
    # With no block one part is enough; the number of parts may be huge.
    total = sum(sums.index_select(0, first + part) for part in range(parts if len(first) else 1))
    mean = total / config.compress_block_size
    if weight is not None:
        mean = weighted_sum(mean.transpose(0, 1), weight.to(mean.dtype)).transpose(0, 1)
    return mean.to(x.dtype)
