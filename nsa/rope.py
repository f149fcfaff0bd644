"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate queries or keys by their positions, in the rotate-half form.

    Channels ``i`` and ``i + D/2`` rotate by ``position * theta ** (-2i/D)``, so the product of two
    rotated vectors depends only on the difference of their positions.

    Args:
        x: ``(..., H, D)``, ``D`` even.
        positions: in tokens, broadcastable to ``(...)``; fractions are allowed.
        theta: base of the wavelengths.

    Returns:
        The shape and dtype of ``x``.
    """
    half = x.shape[-1] // 2
    # float64, because at a million tokens a float32 angle is wrong by some hundredths of a radian.
    index = torch.arange(half, device=x.device, dtype=torch.float64)
    angle = positions.to(torch.float64)[..., None] * theta ** (-index / half)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (f(angle).to(dtype)[..., None, :] for f in (torch.cos, torch.sin))
    first, second = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
