"""Compressed keys and values (paper section 3.3.1), forward and backward.

One kernel launch handles both keys and values, because their shapes are equal.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.cache.append import transform_means
from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import Pair
from nsa.fused.key_sums import round_sums
from nsa.fused.plan import Plan
from nsa.fused.row_layouts import over_batch
from nsa.fused.sizes import Sizes
from nsa.precision import accumulation_dtype

Weights = tuple[Tensor | None, Tensor | None]


def compress(x: Tensor, weight: Tensor | None, plan: Plan) -> Tensor:
    """``x_cmp[j] = mean(x[j*d : j*d + l])``, then ``@ weight[kv]`` if given.

    Args:
        x: keys or values ``(B, Tk, H_kv, D)``.
        weight: ``(H_kv, D, D)`` or None.
        plan: the sequences of each entry's ``Tk`` keys.

    Returns:
        ``(B, M, H_kv, D)`` in the dtype of ``x``; rows past the last block are 0.
    """
    mean = _mean(x, _mean_dtype(x, weight), plan)
    return _transformed(mean, weight, x.dtype)


def compress_pair(k: Tensor, v: Tensor, weights: Weights, plan: Plan) -> Pair:
    """:func:`compress` for keys and values."""
    k_mean, v_mean = _mean(k, _mean_dtype(k, *weights), plan, v).unbind()
    k_weight, v_weight = weights
    return _transformed(k_mean, k_weight, k.dtype), _transformed(v_mean, v_weight, k.dtype)


def compress_in_order(k: Tensor, v: Tensor, start: Tensor, size: int, weights: Weights) -> Pair:
    """Compressed keys and values ``(M, H_kv, C)`` of a cache.

    Tokens are added one by one as :func:`nsa.cache.append.compress_candidates` adds them, so that a
    block has the same bits whichever call completes it.

    Args:
        k, v: ``(B, T, H_kv, D)`` or ``(T, H_kv, D)``, and so on.
        start: the first of all rows of each block of ``size`` tokens, int32 ``(M,)``.
        weights: ``(H_kv, D, D)`` and so on, or None.
    """
    dtype, dims = _mean_dtype(k, *weights), (k.shape[-1], v.shape[-1])
    # The kernel reads 8 channels at a time.
    rows = [pad(x, (0, -dim % 8)) if dim % 8 else x for x, dim in zip((k, v), dims, strict=True)]
    with torch.cuda.device_of(k):
        if rows[0].shape == rows[1].shape:
            both = kernel_calls.mean_forward(rows[0], start, size, dtype, rows[1], in_order=True)
            means = both.unbind()
        else:
            means = tuple(
                kernel_calls.mean_forward(x, start, size, dtype, in_order=True) for x in rows
            )
    k_cmp, v_cmp = (
        transform_means(mean.flatten(0, -3)[..., :dim], weight).to(k.dtype)
        for mean, weight, dim in zip(means, weights, dims, strict=True)
    )
    return k_cmp, v_cmp


def compress_pair_backward(
    dk_cmp: Tensor,
    dv_cmp: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    plan: Plan,
    addends: tuple[Pair, Pair] | None = None,
    summed: bool = False,
) -> tuple[Pair, Weights]:
    """Gradients of ``k`` and ``v``, and of the weights.

    ``addends`` are two more pairs of gradients: of ``k`` and ``v``, and of their last tokens. They
    are added as :func:`nsa.fused.kernel_calls.mean_backward` says. If ``summed``, that pair is
    :func:`nsa.fused.key_sums.new_sums` instead, and the result is new.
    """
    dmeans, dweights = (dk_cmp, dv_cmp), (None, None)
    if any(weight is not None for weight in weights):
        # Without weights only the rows that belong to blocks are read.
        clear_unused(dmeans, plan)
        means = _mean(k, _mean_dtype(k, *weights), plan, v)
        parts = map(_transformed_backward, dmeans, means, weights)
        dmeans, dweights = zip(*parts, strict=True)
    if summed:
        assert addends is not None
        return round_sums(*addends, dmeans, k.dtype, plan), dweights
    total = plan.geometry.compressed.total
    blocks = over_batch(plan.blocks_of_token, k.shape[0], total)
    size = plan.config.compress_block_size
    return kernel_calls.mean_backward(dmeans, blocks, size, k.dtype, addends), dweights


def clear_unused(gradients: Pair, plan: Plan) -> None:
    """Write 0 to rows ``(1, M, H_kv, D)`` of no compressed block, which kernels do not write.

    If there are fewer rows than the bound, each has a block.
    """
    rows = gradients[0].shape[1]
    if not plan.packed or rows < plan.geometry.compressed.total:
        return
    index = torch.arange(rows, dtype=torch.int32, device=gradients[0].device)
    unused = (index >= plan.compressed_bounds[-1])[:, None, None]
    for x in gradients:
        x.masked_fill_(unused, 0)


def _mean_dtype(x: Tensor, *weights: Tensor | None) -> torch.dtype:
    """The dtype of the means of ``x``, which are rounded if no weight follows."""
    weighted = any(weight is not None for weight in weights)
    return accumulation_dtype(x.dtype) if weighted else x.dtype


def _transformed(mean: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    if weight is not None:
        mean = torch.einsum("bmhd,hde->bmhe", mean, weight.to(mean.dtype))
    # A cast that changes nothing takes the host as long as an operation.
    return mean if mean.dtype == dtype else mean.to(dtype)


def _transformed_backward(
    dout: Tensor, mean: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``mean``, in its dtype, and of ``weight``."""
    dout = dout.to(mean.dtype)
    if weight is None:
        return dout, None
    dweight = torch.einsum("bmhd,bmhe->hde", mean, dout).to(weight.dtype)
    return torch.einsum("bmhe,hde->bmhd", dout, weight.to(mean.dtype)), dweight


def _mean(x: Tensor, dtype: torch.dtype, plan: Plan, other: Tensor | None = None) -> Tensor:
    """Means ``(B, M, H_kv, D)``; with ``other``, of both: ``(2, B, M, H_kv, D)``."""
    start = over_batch(plan.block_start, x.shape[0], plan.geometry.keys.total)
    size = plan.config.compress_block_size
    return kernel_calls.mean_forward(x, start, size, dtype, other)


def compress_bytes(sizes: Sizes) -> int:
    """Bytes of compressed keys and values."""
    return 2 * sizes.key_cmp
