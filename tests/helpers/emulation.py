"""The fused backend on a CPU and in any dtype: its kernel calls answered by PyTorch."""

from collections.abc import Callable

from nsa.fused import constraints, decode_calls, decoding, fa4, kernel_calls
from tests.helpers import (
    emulated_decoding,
    emulated_fa4,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)


def emulate_kernels(replace: Callable):
    """Replace kernel calls and the limits of hardware by ``replace(module, name, value)``."""
    for name in emulated_fa4.NAMES:
        replace(fa4, name, getattr(emulated_fa4, name))
    for module in (emulated_kernels, emulated_token_kernels, emulated_plan):
        for name in module.NAMES:
            replace(kernel_calls, name, getattr(module, name))
    for name in emulated_decoding.NAMES:
        replace(decode_calls, name, getattr(emulated_decoding, name))
    replace(decoding, "_size_limit", lambda _: None)
    replace(constraints, "_tensor_limit", lambda *_: None)
    replace(constraints, "_device_limit", lambda *_: None)
    replace(fa4, "version_problem", lambda: None)
