"""Emulated kernels as steps of a recording, as the launches of real ones are."""

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from nsa.fused import fa4, kernel_calls
from nsa.host import RecordingMode, launches_of_plan
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


def count_plan_kernels(replace: Callable) -> Counter:
    """How often each kernel of plans runs from now on, in recordings too."""
    found: Counter = Counter()

    def counted(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            found[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    for name in emulated_plan.NAMES:
        replace(kernel_calls, name, _noted(counted(getattr(emulated_plan, name))))
    return found


def note_folded_calls(replace: Callable, tokens: int) -> list[tuple[str, bool]]:
    """Each call of FlashAttention from now on, in recordings too, and whether its queries, or their
    gradients, lie in other rows than the ``tokens`` of the layer."""
    found: list[tuple[str, bool]] = []

    def noted(function: Callable) -> Callable:
        @wraps(function)
        def call(x, *args, **kwargs):
            found.append((function.__name__, x.shape[0] != tokens))
            return function(x, *args, **kwargs)

        return call

    for name in ("dense_forward", "dense_backward"):
        replace(fa4, name, _noted(noted(getattr(emulated_fa4, name))))
    return found


def _saying(function: Callable) -> AbstractContextManager:
    """A kernel of plans says that it is one, as the real one does."""
    return launches_of_plan() if function.__name__ in emulated_plan.NAMES else nullcontext()


def _in_recordings(function: Callable, note: Callable) -> Callable:
    """``function``, which gives ``note(recorder, result, args, kwargs)`` while a call is recorded:
    its result, of which a step was noted."""

    @wraps(function)
    def call(*args, **kwargs):
        recorder = RecordingMode.current()
        if recorder is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        return note(recorder, result, args, kwargs)

    return call


def _noted(function: Callable) -> Callable:
    def results(*args, **kwargs) -> list:
        return list(tensors_in(function(*args, **kwargs)))

    def note(recorder: RecordingMode, result, args: tuple, kwargs: dict):
        with _saying(function):
            recorder.note(results, args, kwargs, list(tensors_in(result)))
        return result

    return _in_recordings(function, note)


def _allocated_and_noted(function: Callable) -> Callable:
    def new_results(result, args, kwargs) -> list[torch.Tensor]:
        """Those that are no memory of the arguments."""
        given = {x.untyped_storage()._cdata for x in tensors_in((*args, *kwargs.values()))}
        return [x for x in tensors_in(result) if x.untyped_storage()._cdata not in given]

    def write(targets: list, *args, **kwargs):
        result = function(*args, **kwargs)
        for target, x in zip(targets, new_results(result, args, kwargs), strict=True):
            target.copy_(x)

    def note(recorder: RecordingMode, result, args: tuple, kwargs: dict):
        new = new_results(result, args, kwargs)
        targets = {id(x): torch.empty(x.shape, dtype=x.dtype) for x in new}
        with _disable_current_modes():
            for x in new:
                targets[id(x)].copy_(x)
        with _saying(function):
            recorder.note(write, ([targets[id(x)] for x in new], *args), kwargs, None)
        return tree_map_only(torch.Tensor, lambda x: targets.get(id(x), x), result)

    return _in_recordings(function, note)
