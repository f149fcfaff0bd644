"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.host import may_keep
from nsa.segments import locate_items


class Positions(NamedTuple):
    """Positions of the rows of a tensor, in tokens: ``start + step * index``.

    Attributes:
        start: a multiple of 1/2.
        step: positions from row to row.
        bounds: int32 ``(S + 1,)``, where the rows of each packed sequence start, then where the
            last end. ``index`` counts the rows of a sequence from 0; without ``bounds``, those of
            an entry of a batch.
        locate: gives the ``index`` of packed rows, if it is kept.
        origin: int32 ``(S,)``, where the row of ``index`` 0 of each packed sequence would lie, if
            rows begin within sequences; by default where the rows start. With ``locate``.
        length: with ``origin``, more than any ``index``.
    """

    start: float = 0
    step: int = 1
    bounds: Tensor | None = None
    locate: Callable[[], Tensor] | None = None
    origin: Tensor | None = None
    length: int | None = None


def rotate(x: Tensor, positions: Positions, theta: float) -> Tensor:
    """Rotate queries or keys ``(..., R, H, D)`` by their positions, as :func:`apply_rope` does.

    The sines of the last few lengths are kept, so that layers and steps share them.
    """
    bounds, locate = positions.bounds, positions.locate
    rows = x.shape[-3] if positions.length is None else positions.length
    dtype = torch.promote_types(x.dtype, torch.float32)
    make = _kept_table if may_keep(x) else _table
    cos, sin = make(rows, positions.start, positions.step, x.shape[-1], theta, dtype, x.device)
    if bounds is not None:
        index = locate_items(bounds.long(), x.shape[-3])[1] if locate is None else locate()
        cos, sin = cos[index], sin[index]
    return _rotated(x, cos, sin)


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
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _rotated(x, *_cos_sin(positions.double(), x.shape[-1], theta, dtype))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x (..., H, D)`` rotated by angles ``(..., D/2)``, computed in their dtype."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def _cos_sin(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(..., D/2)`` for float64 positions ``(...)``."""
    half = head_dim // 2
    # float64, because at a million tokens a float32 angle is wrong by some hundredths of a radian.
    index = torch.arange(half, device=positions.device, dtype=torch.float64)
    angle = positions[..., None] * theta ** (-index / half)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _table(
    rows: int,
    start: float,
    step: int,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(rows, D/2)`` of consecutive positions."""
    index = torch.arange(rows, device=device, dtype=torch.float64)
    return _cos_sin(start + step * index, head_dim, theta, dtype)


@lru_cache(maxsize=4)
def _kept_table(rows: int, *arguments) -> tuple[Tensor, Tensor]:
    # A tensor made in inference mode cannot be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        return _table(rows, *arguments)
