"""Emulated kernels as steps of a recording, as the launches of real ones are."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

from torch.utils._python_dispatch import _disable_current_modes

from nsa.fused import fa4, kernel_calls
from nsa.host import RecordingMode, launches_of_plan
from nsa.recorder import tensors_in
from tests.helpers import (
    emulated_fa4,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)


def note_kernels(replace: Callable):
    """Replace the emulated kernels by ``replace(module, name, value)``."""
    names = [(fa4, name) for name in emulated_fa4.NAMES]
    for module in (emulated_kernels, emulated_token_kernels, emulated_plan):
        names += [(kernel_calls, name) for name in module.NAMES]
    for module, name in names:
        replace(module, name, _noted(getattr(module, name)))


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


def _noted(function: Callable) -> Callable:
    """``function`` as a step. A kernel says that it is of a plan as the real one does."""
    of_plan = function.__name__ in emulated_plan.NAMES

    def results(*args, **kwargs) -> list:
        return list(tensors_in(function(*args, **kwargs)))

    @wraps(function)
    def call(*args, **kwargs):
        recorder = RecordingMode.current()
        if recorder is None:
            return function(*args, **kwargs)
        with _disable_current_modes():
            result = function(*args, **kwargs)
        with launches_of_plan() if of_plan else nullcontext():
            recorder.note(results, args, kwargs, list(tensors_in(result)))
        return result

    return call
