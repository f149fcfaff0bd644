"""Matrix products of the reference, without autocast and over visible pairs only.

A masked pair has weight 0, but 0 times NaN or infinity is NaN, so a plain product would spread one
such value to queries and sequences that do not attend it. :func:`inner_products` and
:func:`weighted_sum` use only the pairs in a mask, forward and backward. The derivative of each uses
the other.
"""

import torch
from torch import Tensor

from nsa.precision import without_autocast


def inner_products(x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    """``x (..., R, D)`` times ``y (..., K, D)`` transposed.

    With ``mask (..., R, K)``, the result outside the mask is undefined. The caller must drop it in
    the next step, so that no gradient comes from there.
    """
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
        ctx.save_for_forward(x, y, mask)
        with without_autocast(x.device):
            return x @ y.mT

    @staticmethod
    def jvp(ctx, dx, dy, _):
        x, y, mask = ctx.saved_tensors
        tangents = [] if dx is None else [inner_products(dx, y, mask)]
        tangents += [] if dy is None else [inner_products(x, dy, mask)]
        return sum(tangents)

    @staticmethod
    def backward(ctx, grad):
        x, y, mask = ctx.saved_tensors
        transposed = None if mask is None else mask.mT
        dx = weighted_sum(grad, y, mask) if ctx.needs_input_grad[0] else None
        dy = weighted_sum(grad.mT, x, transposed) if ctx.needs_input_grad[1] else None
        return dx, dy, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, mask):
        ctx.save_for_backward(a, b, mask)
        ctx.save_for_forward(a, b, mask)
        with without_autocast(a.device):
            product = a @ b
            # A sum is finite only if all its terms are. Testing the smaller tensor takes less time.
            tested = min(product, b, key=Tensor.numel)
            if mask is None or tested.sum().isfinite() or b.isfinite().all():
                return product
            return a @ torch.where(b.isfinite(), b, 0) + _non_finite_part(a, b, mask)

    @staticmethod
    def jvp(ctx, da, db, _):
        a, b, mask = ctx.saved_tensors
        tangents = [] if da is None else [weighted_sum(da, b, mask)]
        tangents += [] if db is None else [weighted_sum(a, db, mask)]
        return sum(tangents)

    @staticmethod
    def backward(ctx, grad):
        a, b, mask = ctx.saved_tensors
        transposed = None if mask is None else mask.mT
        da = inner_products(grad, b, mask) if ctx.needs_input_grad[0] else None
        db = weighted_sum(a.mT, grad, transposed) if ctx.needs_input_grad[1] else None
        return da, db, None


def _non_finite_part(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """The NaN, infinity or 0 that the non-finite values of ``b`` add to each sum."""

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
