"""The fused backend on a CPU and in any dtype: its kernel calls answered by PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import strategies as st

from nsa.fused import compressed_forms, constraints, decode_calls, decoding, fa4, kernel_calls
from tests.helpers import (
    emulated_decoding,
    emulated_fa4,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)
from tests.helpers.compressed_calls import COMPRESSED_CALLS


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


drawn_compressed_calls = st.sampled_from(COMPRESSED_CALLS)
"""For tests that draw problems, so that each problem meets one way and not all the same ones."""


def compute_compressed(replace: Callable, calls: str):
    """Compute the compressed branch in a way of ``COMPRESSED_CALLS``."""
    if calls != "masked":
        replace(compressed_forms, "ONE_TILE", 0)
        replace(compressed_forms, "FEW_PACKED_KEYS", 0)
    least = 0 if calls == "sums of queries" else 1 << 60
    for name in ("UNFOLDED_CTAS", "SINGLE_CTAS"):
        replace(compressed_forms, name, least)


@contextmanager
def compressed(calls: str) -> Iterator[None]:
    """The same for a time."""
    with pytest.MonkeyPatch.context() as patch:
        compute_compressed(patch.setattr, calls)
        yield


def batched_in_all_ways_and_packed(test: Callable) -> Callable:
    """Give a test the parameter ``packed``: batches meet all ways, and packs have two."""
    batched = [(calls, False) for calls in COMPRESSED_CALLS]
    cases = [*batched, ("masked", True), ("folded", True)]
    names = [*COMPRESSED_CALLS, "masked packed", "folded packed"]
    parametrize = pytest.mark.parametrize(
        ("compressed_calls", "packed"), cases, ids=names, indirect=["compressed_calls"]
    )
    return pytest.mark.usefixtures("compressed_calls")(parametrize(test))
