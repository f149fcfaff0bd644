"""Checks of the layer's arguments that are no tensors."""

from nsa.config import check_positive
from nsa.validation import check_size


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
