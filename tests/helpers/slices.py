"""Queries, keys and values that are slices of larger tensors."""

import torch
from torch import Tensor

import nsa

SLICES = {
    "heads": lambda x: x[:, :, 1:-1],
    "tokens": lambda x: x[:, 3:-2],
    "heads and tokens": lambda x: x[:, 3:-2, 2:],
    "one of three": lambda x: torch.stack((x.neg(), x, x.flip(1)), dim=2)[:, :, 1],
}
"""Parts of ``(1, T, H, D)`` that are views of it, or of a larger tensor that holds it."""

TOKENS, HEADS, DIM = 256, 4, 64
_MORE = {
    "heads": (0, 2),
    "tokens": (5, 0),
    "heads and tokens": (5, 2),
    "one of three": (0, 0),
}
"""Tokens and heads of the larger tensor beyond those of the slice."""


def forward_and_backward(
    form: str, config: nsa.NSAConfig, bounds: Tensor | None, dtype: torch.dtype, device: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the fused backend for slices, and for contiguous copies of them."""
    tokens, heads = _MORE[form]
    given = []
    for count in (HEADS, 2, 2):
        whole = torch.randn(1, TOKENS + tokens, count + heads, DIM, dtype=torch.float64)
        given.append(SLICES[form](whole.to(device, dtype)))
    weight = torch.randn(HEADS, 3, DIM, dtype=torch.float64).to(device, dtype) / 8
    if bounds is not None:
        given = [x[0] for x in given]
    results = []
    for inputs in (given, [x.contiguous() for x in given]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = nsa.forward(
            *leaves, config=config, gate_proj_weight=weight, cu_seqlens=bounds, backend="fused"
        )
        dout = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device)
        grads = torch.autograd.grad(out, leaves, dout.view(out.shape).to(dtype))
        results.append([out.detach(), *grads])
    return results[0], results[1]
