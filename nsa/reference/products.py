"""Matrix products of the reference: not reached by autocast, and over visible pairs alone.

A masked pair has weight 0, but 0 times NaN or infinity is NaN, so a plain product would spread one
such value to queries and sequences that do not attend it. :func:`inner_products` and
:func:`weighted_sum` keep to the pairs of a mask, forward and backward; each gives the other's
derivative.
"""

import torch
from torch import Tensor

from nsa.precision import without_autocast


def inner_products(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x (..., R, D)`` times ``y (..., K, D)`` transposed, 0 where ``mask (..., R, K)`` is not."""
    return _InnerProducts.apply(x, y, mask)


def weighted_sum(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """``a (..., R, K) @ b (..., K, D)`` over the pairs where ``mask (..., R, K)``.

    ``a`` is 0 elsewhere. Without a mask every pair counts.
    """
    return _WeightedSum.apply(a, b, mask)


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, mask):
        ctx.save_for_backward(x, y, mask)
        with without_autocast(x.device):
            products = x @ y.mT
        return products if mask is None else products.masked_fill_(~mask, 0)

    @staticmethod
    def backward(ctx, grad):
        x, y, mask = ctx.saved_tensors
        if mask is not None:
            grad = grad.masked_fill(~mask, 0)
        transposed = None if mask is None else mask.mT
        dx = weighted_sum(grad, y, mask) if ctx.needs_input_grad[0] else None
        dy = weighted_sum(grad.mT, x, transposed) if ctx.needs_input_grad[1] else None
        return dx, dy, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, mask):
        ctx.save_for_backward(a, b, mask)
        with without_autocast(a.device):
            if mask is None or torch.isfinite(b).all():
                return a @ b
            return a @ torch.where(b.isfinite(), b, 0) + _non_finite_part(a, b, mask)

    @staticmethod
    def backward(ctx, grad):
        a, b, mask = ctx.saved_tensors
        transposed = None if mask is None else mask.mT
        da = inner_products(grad, b, mask) if ctx.needs_input_grad[0] else None
        db = weighted_sum(a.mT, grad, transposed) if ctx.needs_input_grad[1] else None
        return da, db, None


def _non_finite_part(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """What the NaN and infinities of ``b`` add to each sum: NaN, an infinity, or 0."""

    def met(left: Tensor, right: Tensor) -> Tensor:
        return left.to(a.dtype) @ right.to(a.dtype) > 0

    mask = mask.expand_as(a)
    positive, negative, zero = mask & (a > 0), mask & (a < 0), mask & (a == 0)
    plus = met(positive, b == torch.inf) | met(negative, b == -torch.inf)
    minus = met(positive, b == -torch.inf) | met(negative, b == torch.inf)
    undefined = met(mask, b.isnan()) | met(zero, b.isinf()) | (plus & minus)
    result = torch.zeros_like(plus, dtype=a.dtype)
    result.masked_fill_(plus, torch.inf).masked_fill_(minus, -torch.inf)
    return result.masked_fill_(undefined, torch.nan)
