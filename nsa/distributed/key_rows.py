"""Gathered rows in the order in which queries attend them, and their gradients back."""

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from nsa.distributed.backend_calls import BackendCall
from nsa.distributed.rank_layout import Layout
from nsa.precision import accumulation_dtype


def runs_to_take(layout: Layout) -> list[tuple[int, int]] | None:
    """The rows of :attr:`Layout.keys` as runs. None if all rows are taken, or if the runs are
    many."""
    return None if layout.keys is None else layout.key_runs


def in_place(layout: Layout) -> bool:
    """Whether :func:`take_rows` copies nothing."""
    return layout.keys is None or layout.key_runs is not None


def take_rows(rows: Tensor, layout: Layout) -> Tensor:
    """The rows of :attr:`Layout.keys`, of those of all ranks or of :func:`runs_to_take`."""
    if layout.keys is None or in_place(layout):
        return rows
    return rows.index_select(0, layout.keys)


class RowSums:
    """The gradient of the rows of all ranks, added up in the dtype of sums.

    Args:
        layout: this rank's part.
        like: rows of the dtype and shape of those received.
        rounded: whether most was added up elsewhere, so that what is added here may be rounded.
    """

    def __init__(self, layout: Layout, like: Tensor, *, rounded: bool):
        self._layout, self._like = layout, like
        self._dtype = like.dtype if rounded else accumulation_dtype(like.dtype)
        self._written: set[int] = set()

    @cached_property
    def _total(self) -> Tensor:
        # Made when first needed, because before a single call there may be no memory for it.
        layout, like = self._layout, self._like
        shape = (layout.ranks * layout.rows, *like.shape[1:])
        make = like.new_empty if layout.key_runs is not None else like.new_zeros
        return make(shape, dtype=self._dtype)

    def add_from(self, write: Callable[[slice, Tensor], None]):
        """Add the gradient of all keys. ``write(keys, out)`` writes that of consecutive keys."""
        for begin, at, count in self._places():
            target = addend = self._total[at : at + count]
            if at in self._written:
                addend = torch.empty_like(target)
            write(slice(begin, begin + count), addend)
            if addend is not target:
                target.add_(addend)
            self._written.add(at)

    def add_some(self, grad: Tensor, first: int):
        """Add the gradient of consecutive keys from ``first`` on, after :meth:`add_from`."""
        for begin, at, count in self._places():
            low, high = max(first - begin, 0), min(first + grad.shape[0] - begin, count)
            if low < high:
                self._total[at + low : at + high].add_(grad[begin + low - first :][: high - low])

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """The first key of each run of keys, where it lies in the rows of all ranks, and its
        length."""
        begin = 0
        assert self._layout.key_runs is not None
        for at, count in self._layout.key_runs:
            yield begin, at, count
            begin += count

    def add(self, grad: Tensor, call: BackendCall):
        """Add the gradient of the keys of a call, as :func:`take_rows` orders them."""
        total = self._total
        if call.runs is None:
            keys = self._layout.keys
            grad = grad.to(total.dtype)
            if keys is None:
                total[call.keys].add_(grad)
            else:
                total.index_add_(0, keys[call.keys], grad)
            return
        begin = 0
        for at, count in call.runs:
            part, target = grad[begin : begin + count], total[at : at + count]
            target.add_(part) if at in self._written else target.copy_(part)
            self._written.add(at)
            begin += count

    def result(self) -> Tensor:
        """The sums, 0 where nothing was added, in the dtype of the rows."""
        if self._layout.key_runs is not None:
            for at, count in self._layout.all_runs:
                if at not in self._written:
                    self._total[at : at + count].zero_()
        return self._total.to(self._like.dtype)
