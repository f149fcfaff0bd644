"""Rounding that a 16-bit matrix product needs: its operands are 16-bit, its sums are not.

With it the reference run in 16 bits errs as a faithful 16-bit implementation does, so that its
error is a measure for one. Nothing is rounded where inputs are float32 or float64.
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
    """``x`` as an operand of a product in ``dtype``: it and its gradient are rounded."""
    return x if x.dtype == dtype else x.to(dtype).to(x.dtype)


def round_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` itself; its gradient is an operand of products in ``dtype`` and rounded."""
    return x if x.dtype == dtype else _RoundGradient.apply(x, dtype)
