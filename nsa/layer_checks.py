"""Checks of the layer's arguments."""

from typing import Any

import torch

from nsa.backends import check_no_transform
from nsa.config import check_positive
from nsa.linears import weight_dtype
from nsa.packing import Packing
from nsa.precision import autocast_dtype
from nsa.validation import check_dense, check_size


def check_sizes(dim, num_heads, num_kv_heads, head_dim, value_head_dim):
    for name, value in (
        ("dim", dim),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("head_dim", head_dim),
        ("value_head_dim", value_head_dim),
    ):
        if value is not None or not name.endswith("head_dim"):
            check_size(name, value)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
    if head_dim is None and dim % num_heads:
        raise ValueError(
            f"num_heads must divide dim={dim} where head_dim is not given, got {num_heads}"
        )


def check_choice(name: str, value, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_rope(theta, head_dim: int) -> float | None:
    check_positive("rope_theta", theta)
    if theta is None:
        return None
    if head_dim % 2:
        raise ValueError(f"head_dim must be even with rope_theta, got {head_dim}")
    return float(theta)


def check_input(layer: Any, x, cu_seqlens):
    """Check the hidden states of a :class:`nsa.NativeSparseAttention`."""
    check_dense("x", x)
    rank, form = (3, "(B, N, {})") if cu_seqlens is None else (2, "(T, {}) with cu_seqlens")
    if x.ndim != rank or x.shape[-1] != layer.dim:
        raise ValueError(f"x must have shape {form.format(layer.dim)}, got {tuple(x.shape)}")
    # torch.compile would guard the lengths.
    if isinstance(cu_seqlens, Packing) and not torch.compiler.is_compiling():
        _check_equal_lengths(cu_seqlens)
    # Before the projections, whose nodes on a GPU have no rules for transforms either.
    check_no_transform()
    wanted = weight_dtype(layer.q_proj)
    if wanted is None:
        return
    device = layer.q_proj.weight.device
    if x.device != device:
        raise ValueError(f"x must be on the device of the weights, {device}, got {x.device}")
    if x.dtype != wanted and not (autocast_dtype(x.device) and x.is_floating_point()):
        raise TypeError(f"x must have the dtype of the weights, {wanted}, got {x.dtype}")


def _check_equal_lengths(packing: Packing):
    if packing.cu_seqlens_k is packing.cu_seqlens:
        return
    pairs = zip(packing.lengths or (), packing.lengths_k or (), strict=True)
    for at, (queries, keys) in enumerate(pairs):
        if queries != keys:
            raise ValueError(
                "cu_seqlens must have as many keys as queries in each sequence, because a layer "
                f"computes both from x, got {queries} queries and {keys} keys in sequence {at}; "
                "for new tokens behind others pass a cache"
            )
