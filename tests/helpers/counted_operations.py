"""Counts of PyTorch operations: how much the host has to launch beside kernels of our own."""

from collections import Counter
from functools import wraps

from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nsa.fused import fa4, kernel_calls
from tests.helpers import (
    emulated_fa4,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)

# They launch nothing on a GPU.
VIEWS = frozenset((
    "view", "_unsafe_view", "_reshape_alias", "transpose", "t", "as_strided", "unsqueeze",
    "squeeze", "select", "slice", "expand", "split", "split_with_sizes", "unbind", "detach",
    "alias", "permute", "unfold", "promote_types", "unsafe_split_with_sizes",
))  # fmt: skip
ALLOCATIONS = frozenset((
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
))  # fmt: skip


class CountedOperations(TorchDispatchMode):
    """Counts operations outside of kernel calls, by name; ``launches`` are those on a GPU, and
    ``written`` are the bytes of their results.

    ``calls`` is the result of :func:`count_kernel_calls`.
    """

    def __init__(self, calls: dict):
        super().__init__()
        self.calls = calls
        self.launches, self.others = Counter(), Counter()
        self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.calls["depth"]:
            name = func._schema.name.removeprefix("aten::")
            launched = name not in VIEWS | ALLOCATIONS
            (self.launches if launched else self.others)[name] += 1
            # What a foreach operation writes, it returns nothing of.
            written = args[0] if name.startswith("_foreach") else result
            if launched:
                self.written += sum(x.nbytes for x in tree_leaves(written) if is_tensor(x))
        return result


def count_kernel_calls(monkeypatch) -> dict:
    """Make the emulated kernels say while they run: ``depth`` is then above 0."""
    calls = {"depth": 0}

    def watched(function):
        @wraps(function)
        def call(*args, **kwargs):
            calls["depth"] += 1
            try:
                # No mode needs to see the insides, which takes longer than they do.
                with _disable_current_modes():
                    return function(*args, **kwargs)
            finally:
                calls["depth"] -= 1

        return call

    names = [(fa4, name) for name in emulated_fa4.NAMES]
    for module in (emulated_kernels, emulated_token_kernels, emulated_plan):
        names += [(kernel_calls, name) for name in module.NAMES]
    for module, name in names:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return calls
