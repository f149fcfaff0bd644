"""Gathered rows in the order in which queries attend them, and their gradients back."""

import torch
from torch import Tensor

from nsa.distributed.layout import Layout
from nsa.precision import accumulation_dtype


def take_rows(received: Tensor, layout: Layout) -> Tensor:
    """The rows of :attr:`Layout.keys`, of those of all ranks one after another."""
    if layout.keys is None:
        return received
    if layout.key_runs is None:
        return received.index_select(0, layout.keys)
    # Copies of slices run at the speed of memory, which index_select does not reach.
    return torch.cat([received[at : at + count] for at, count in layout.key_runs])


def return_rows(grad: Tensor, layout: Layout) -> Tensor:
    """The gradient of the rows of all ranks, from that of :func:`take_rows`, in the dtype of sums.

    Rows that are taken more than once get the sum.
    """
    dtype = accumulation_dtype(grad.dtype)
    if layout.keys is None:
        return grad.to(dtype)
    shape = (layout.ranks * layout.rows, *grad.shape[1:])
    if layout.key_runs is None:
        return grad.new_zeros(shape, dtype=dtype).index_add_(0, layout.keys, grad.to(dtype))
    total = grad.new_empty(shape, dtype=dtype)
    begin, written = 0, set()
    for at, count in layout.key_runs:
        part, target = grad[begin : begin + count], total[at : at + count]
        target.add_(part) if at in written else target.copy_(part)
        written.add(at)
        begin += count
    for at, count in layout.all_runs:
        if at not in written:
            total[at : at + count].zero_()
    return total
