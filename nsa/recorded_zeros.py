"""Fills of a recording, joined: each takes the host as long as a launch."""

from collections.abc import Container, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

from nsa.recorded_code import Base, Step, View

MOST_ELEMENTS = 1 << 22
"""Of a memory that is filled with others. All live as long as the last, so large ones, such as sums
of queries, would take more memory at a time."""

_ALIGNMENT = 512
"""Bytes to which PyTorch aligns memory on a GPU."""


def join_zeros(
    steps: Sequence[Step], memories: Container[Any], bases: list[Base], device: torch.device
) -> list[Step]:
    """Steps that fill these memories at once, those of one dtype, which lie in one tensor.

    Args:
        steps: among them those that each allocate one of ``memories``.
        memories: that are no results of the call.
        bases: of all memories; those of the tensors are added.
        device: of the memories.
    """
    places: dict[torch.dtype, list[int]] = {}
    for at, step in enumerate(steps):
        number: Any = step.made
        if number in memories and bases[number].shape.numel() <= MOST_ELEMENTS:
            places.setdefault(bases[number].dtype, []).append(at)
    joined = {at: [step] for at, step in enumerate(steps)}
    for dtype, found in places.items():
        if len(found) > 1:
            _place_in_one([joined[at] for at in found], dtype, bases, device)
    return [step for at in range(len(steps)) for step in joined[at]]


def _place_in_one(
    places: list[list[Step]], dtype: torch.dtype, bases: list[Base], device: torch.device
) -> None:
    """Replace each place's step, which allocates zeros, by one that takes a part of a tensor; the
    first place allocates it."""
    parts = [bases[step.made] for [step] in places]  # type: ignore[index]
    aligned = _ALIGNMENT // dtype.itemsize
    ends = [0, *accumulate(-(-part.shape.numel() // aligned) * aligned for part in parts)]
    whole = Base(torch.Size(ends[-1:]), (1,), 0, dtype, contiguous=True, given=False)
    number = len(bases)
    bases.append(whole)
    view = View(number, whole.shape, whole.strides, 0)
    for place, part, start in zip(places, parts, ends, strict=False):
        arguments = (view, tuple(part.shape), tuple(part.strides), start)
        place[0] = place[0]._replace(function=_reinterpret_tensor, arguments=arguments)
    places[-1][0] = places[-1][0]._replace(done=(*places[-1][0].done, number))
    fill = partial(torch.zeros, whole.shape, dtype=dtype, device=device)
    places[0].insert(0, Step(fill, (), {}, number, ()))
