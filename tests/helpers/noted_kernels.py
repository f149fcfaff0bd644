"""Emulated kernels as steps of a recording, as the launches of real ones are."""

from collections.abc import Callable
from functools import wraps

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from nsa.fused import fa4, kernel_calls
from nsa.host import RecordingMode
from nsa.recorder import tensors_in
from tests.helpers import (
    emulated_fa4,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)


def note_kernels(replace: Callable, *, allocate: bool = False):
    """Replace the emulated kernels by ``replace(module, name, value)``.

    With ``allocate``, their results are allocated by steps of their own, as kernels' are.
    """
    names = [(fa4, name) for name in emulated_fa4.NAMES]
    for module in (emulated_kernels, emulated_token_kernels, emulated_plan):
        names += [(kernel_calls, name) for name in module.NAMES]
    note = _allocated_and_noted if allocate else _noted
    for module, name in names:
        replace(module, name, note(getattr(module, name)))


def _noted(function: Callable) -> Callable:
    def results(*args, **kwargs) -> list:
        return list(tensors_in(function(*args, **kwargs)))

    @wraps(function)
    def call(*args, **kwargs):
        recorder = RecordingMode.current()
        if recorder is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        recorder.note(results, args, kwargs, list(tensors_in(result)))
        return result

    return call


def _allocated_and_noted(function: Callable) -> Callable:
    def new_results(result, args, kwargs) -> list[torch.Tensor]:
        """Those that are no memory of the arguments."""
        given = {x.untyped_storage()._cdata for x in tensors_in((*args, *kwargs.values()))}
        return [x for x in tensors_in(result) if x.untyped_storage()._cdata not in given]

    def write(targets: list, *args, **kwargs):
        result = function(*args, **kwargs)
        for target, x in zip(targets, new_results(result, args, kwargs), strict=True):
            target.copy_(x)

    @wraps(function)
    def call(*args, **kwargs):
        recorder = RecordingMode.current()
        if recorder is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        new = new_results(result, args, kwargs)
        targets = {id(x): torch.empty(x.shape, dtype=x.dtype) for x in new}
        with _disable_current_modes():
            for x in new:
                targets[id(x)].copy_(x)
        recorder.note(write, ([targets[id(x)] for x in new], *args), kwargs, None)
        return tree_map_only(torch.Tensor, lambda x: targets.get(id(x), x), result)

    return call
