"""Rounding of the operands of 16-bit matrix products. The sums are not rounded.

With it, the reference in 16 bits has the error of a faithful 16-bit implementation, so tests can
measure one against it. float32 and float64 inputs are not rounded.
"""

import torch
from torch import Tensor


class _RoundGradient(torch.autograd.Function):
    """Identity whose gradient is rounded to ``dtype``."""

    @staticmethod
    def forward(ctx, x, dtype):
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


def round_operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as an operand of a product in ``dtype``: ``x`` and its gradient are rounded."""
    return x if x.dtype == dtype else x.to(dtype).to(x.dtype)


def round_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself. Its gradient is rounded, because it is an operand of products in ``dtype``."""
    return x if x.dtype == dtype else _RoundGradient.apply(x, dtype)
