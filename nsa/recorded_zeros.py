"""Fills of a recording, joined: each takes the host as long as a launch."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa.recorded_code import Base, Noted, Step, View
from nsa.recorded_memory import aligned

MOST_BYTES = 1 << 24
"""Of a memory that is filled with others. All live as long as the last, so large ones, such as sums
of queries, would take more memory at a time."""


def join_zeros(
    noted: Sequence[Noted], alone: Container[int], bases: list[Base]
) -> tuple[list[Noted], dict[int, tuple[int, int]]]:
    """The steps with fills in place of allocations, small ones all at once; and for each memory
    that is filled with others the memory which is all of them, and the bytes before it there.

    Args:
        noted: the steps of a part.
        alone: memories that do not lie with others.
        bases: of all memories; that of all small ones is added.
    """
    small, size = dict[int, int](), 0
    for x in noted:
        for number in x.made if x.fills else ():
            if number not in alone and bases[number].size <= MOST_BYTES:
                small[number] = size
                size += aligned(bases[number].size)
    whole = len(bases)
    view = View(whole, torch.Size([size]), (1,), 0)
    if small:
        kind: dict[str, Any] = dict(contiguous=True, given=False, size=size)
        bases.append(Base(view.shape, view.strides, 0, torch.uint8, **kind))
    found, is_filled = list[Noted](), False
    for x in noted:
        uses = frozenset(whole if number in small else number for number in x.uses)
        if x.fills is None:
            found.append(x._replace(uses=uses))
        elif x.fills and not small.keys() >= x.made:
            (made,) = x.step.made
            found.append(Noted(Step(Tensor.zero_, (made,), {}), uses))
        elif x.fills and not is_filled:
            found.append(Noted(Step(Tensor.zero_, (view,), {}), uses))
            is_filled = True
    return found, {number: (whole, start) for number, start in small.items()}
