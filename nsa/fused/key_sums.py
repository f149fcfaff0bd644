"""Gradients of keys and values, added up before they are rounded.

The selected branch can leave its float32 sums. One pass then adds what the other branches have, and
rounds. Several calls that share keys may add to the same sums. So the keys that a call does not
attend are neither cleared nor rounded for it. The window branch sees few of the keys, so it leaves
its gradients to be added at the end.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.block_lists import goes_by_query
from nsa.fused.fa4_variants import choose_key_block
from nsa.fused.kernel_inputs import Pair, kernel_head_dim
from nsa.fused.plan import Plan
from nsa.precision import accumulation_dtype


class CallSums(NamedTuple):
    """What one call adds to.

    Attributes:
        selected: sums of the call's keys ``(Tk, H_kv, D)`` without the scale, and of its values,
            both in the layout of the kernels.
        windows: gradients of its last keys and values, ``(T', H_kv, D)``, are appended.
    """

    selected: Pair
    windows: list[Pair]


class KeySums:
    """Float32 sums for keys ``(T, H_kv, D)`` and values that all branches share.

    ``runs`` are the lengths of consecutive runs of keys.
    """

    def __init__(self, k: Tensor, runs: Sequence[int], config: NSAConfig):
        self._sums = new_sums(k)
        ends = list(accumulate(runs))
        self._start_of_run = {end: end - count for end, count in zip(ends, runs, strict=True)}
        self._by_token = config.selection == "token"
        self._factors = (config.softmax_scale(k.shape[-1]), 1.0)
        self._calls: list[tuple[int, CallSums]] = []

    def of_call(self, keys: slice) -> CallSums:
        """For a call that attends some consecutive keys."""
        dk, dv = (x[keys] for x in self._sums)
        call = CallSums((dk, dv), [])
        self._calls.append((keys.stop, call))
        return call

    def round_into(self, which: int, keys: slice, out: Tensor):
        """Write the gradient of a run of keys (0) or values (1), without :meth:`windows`."""
        sums, factor = self._sums[which][keys], self._factors[which]
        if self._by_token:
            kernel_calls.round_sums((sums,), (out,), (factor,))
            return
        last = next((grad for end, grad in self._windows(which) if end == keys.stop), None)
        if last is not None:
            last = last[max(0, last.shape[0] - sums.shape[0]) :]
        added = None if last is None else (last,)
        kernel_calls.round_listed_sums((sums,), (out,), (factor,), added)

    def windows(self, which: int) -> Iterator[tuple[int, Tensor]]:
        """What must still be added: the window branch's gradients of consecutive keys (0) or values
        (1), and where the first of them lies."""
        added = set()
        for end, grad in self._windows(which):
            first = end - grad.shape[0]
            if not self._by_token and end in self._start_of_run and end not in added:
                added.add(end)
                grad = grad[: max(0, self._start_of_run[end] - first)]
            if grad.shape[0]:
                yield first, grad

    def _windows(self, which: int) -> Iterator[tuple[int, Tensor]]:
        """What calls left, and where it ends."""
        return ((end, pair[which]) for end, call in self._calls for pair in call.windows)


def leaves_sums(plan: Plan, *, given: bool, deterministic: bool) -> bool:
    """Whether the selected branch can leave sums of all keys, which :func:`round_sums` reads.

    ``given`` says whether compressed keys are: then there are no gradients of means.
    """
    if plan.config.selection == "token":
        # Means may overlap, and another kernel adds their gradients.
        return given
    keys = plan.geometry.keys
    by_block = not deterministic and goes_by_query(plan.key_block, plan.head_dim)
    return by_block and keys.single and plan.keys.rows == keys.total


def new_sums(k: Tensor) -> Pair:
    """Sums of keys like ``k (..., T, H_kv, D)`` and of their values: zeros."""
    shape, dtype = (2, *k.shape), accumulation_dtype(k.dtype)
    dk, dv = torch.zeros(shape, dtype=dtype, device=k.device)
    return dk, dv


def round_sums(
    sums: Pair, window: Pair, dmeans: Pair | None, dtype: torch.dtype, plan: Plan
) -> Pair:
    """Gradients of keys and values of all branches, in ``dtype``, where :func:`leaves_sums`.

    Args:
        sums: :func:`new_sums`, to which the selected branch has added.
        window: gradients of the last keys and values, ``(B, T', H_kv, D)``.
        dmeans: gradients of their means ``(B, M, H_kv, D)``; None if there are none.
    """
    config = plan.config
    factors = (config.softmax_scale(plan.head_dim), 1.0)
    dk, dv = (torch.empty_like(total, dtype=dtype) for total in sums)
    if config.selection == "token":
        assert dmeans is None  # as for these no sums are left
        kernel_calls.round_sums(sums, (dk, dv), factors, window)
    else:
        size = config.compress_block_size
        kernel_calls.round_listed_sums(sums, (dk, dv), factors, window, dmeans, size)
    return dk, dv


def make_key_sums(
    k: Tensor, v: Tensor, runs: Sequence[int], config: NSAConfig, *, deterministic: bool
) -> KeySums | None:
    """Sums for keys and values that calls of :func:`nsa.fused.forward` share, and may add to.

    None if the kernels cannot do this: they need one head dimension, add in no fixed order, and in
    tile mode add to whole blocks of keys.

    Args:
        k, v: ``(T, H_kv, D)``.
        runs: lengths of consecutive runs of keys; a call attends whole runs.
        config: block sizes.
        deterministic: whether gradients must have the same bits each time.
    """
    dim = k.shape[-1]
    if deterministic or k.shape != v.shape or kernel_head_dim(dim, dim) != dim:
        return None
    if config.selection == "tile":
        key_block = choose_key_block(config.select_block_size, config, dim)
        if not goes_by_query(key_block, dim) or any(count % key_block for count in runs):
            return None
    return KeySums(k, runs, config)
