"""Custom ops for torch.compile whose calls on a GPU take the host less time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import _C
from torch._library.autograd import make_autograd_impl
from torch.library import CustomOpDef

from nsa.validation import SECOND_DERIVATIVE, UnsupportedError

_NAMESPACE = "nsa"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def custom_op(name: str, schema: str | None = None) -> Callable[[Callable], CustomOpDef]:
    """As :func:`torch.library.custom_op` for an op ``nsa::name`` that mutates nothing.

    What a custom op checks in each call, that no result shares memory with an argument, takes the
    host about as long as a launch. On a GPU it is left out; on a CPU, as in tests, it is checked.
    A call from what torch.compile made goes to the function at once there, instead of by PyTorch's
    autograd kernel in Python and a second dispatch, which convert all arguments once more.
    """

    def register(function: Callable) -> CustomOpDef:
        op = torch.library.custom_op(
            f"{_NAMESPACE}::{name}", function, mutates_args=(), schema=schema
        )
        op.register_autograd(_refuse)  # until it gets another derivative
        _LIBRARY.impl(name, function, "CUDA")
        differentiable = make_autograd_impl(op._opoverload, op)

        def call(*arguments):
            return call_directly(function, differentiable, _C.DispatchKey.CUDA, *arguments)

        _LIBRARY.impl(name, call, "AutogradCUDA", with_keyset=True)
        return op

    return register


def _refuse(*_):
    raise UnsupportedError(SECOND_DERIVATIVE)


def call_directly(
    function: Callable, differentiable: Callable, device: Any, keyset: Any, *arguments
) -> Any:
    """What the dispatcher calls first: ``function``, where it would be the next without gradients;
    else ``differentiable``, as of any op."""
    if not torch.is_grad_enabled():
        below = keyset & _C._after_ADInplaceOrView_keyset
        if below.highestPriorityTypeId() == device:
            with _C._AutoDispatchBelowAutograd():
                return function(*arguments)
    return differentiable(keyset, *arguments)
