"""Custom ops for torch.compile whose calls on a GPU take the host less time."""

from collections.abc import Callable

import torch
from torch.library import CustomOpDef

_NAMESPACE = "nsa"
_LIBRARY = torch.library.Library(_NAMESPACE, "FRAGMENT")


def custom_op(name: str, schema: str | None = None) -> Callable[[Callable], CustomOpDef]:
    """As :func:`torch.library.custom_op` for an op ``nsa::name`` that mutates nothing.

    What a custom op checks in each call, that no result shares memory with an argument, takes the
    host about as long as a launch. On a GPU it is left out; on a CPU, as in tests, it is checked.
    """

    def register(function: Callable) -> CustomOpDef:
        op = torch.library.custom_op(
            f"{_NAMESPACE}::{name}", function, mutates_args=(), schema=schema
        )
        _LIBRARY.impl(name, function, "CUDA")
        return op

    return register
