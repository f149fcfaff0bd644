"""Arguments that are tensors, tuples of tensors or None, as one list of tensors, and back."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_PARTS = {"k": 3, "v": 3, "compressed_kv": 2}
"""Tensors of an argument that is a tuple."""


def flatten(floats: dict[str, Any]) -> tuple[tuple[str, ...], list[Tensor]] | None:
    """The tensors that are given, and a name for each. None if something else is, or as many
    tensors as no call takes.

    A tuple has its name as often as it has tensors, but once if all are the same.
    """
    names, tensors = [], []
    for name, value in floats.items():
        if value is None:
            continue
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if parts is value and len(parts) != _PARTS.get(name):
            return None
        if name in "kv" and all(x is parts[0] for x in parts):
            parts = parts[:1]
        for x in parts:
            if not isinstance(x, Tensor):
                return None
            names.append(name)
            tensors.append(x)
    return tuple(names), tensors


def unflatten(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of which :func:`flatten` made these."""
    floats: dict[str, Any] = {}
    for name, x in zip(names, tensors, strict=True):
        floats[name] = (*floats.get(name, ()), x)
    return {name: parts[0] if len(parts) == 1 else parts for name, parts in floats.items()}
