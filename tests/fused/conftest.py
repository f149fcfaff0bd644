"""The emulated kernels in place of the kernels, for tests without a GPU."""

import emulated_kernels
import emulated_own_kernels
import emulated_token_kernels
import poison
import pytest

from nsa.fused import compressed_forms, constraints, fa4, kernel_calls
from nsa.fused.attention import folded


@pytest.fixture
def fused_on_cpu(monkeypatch):
    """The fused backend on a CPU and in any dtype: its kernel calls answered by PyTorch."""
    for name in emulated_kernels.NAMES:
        monkeypatch.setattr(fa4, name, getattr(emulated_kernels, name))
    for module in (emulated_own_kernels, emulated_token_kernels):
        for name in module.NAMES:
            monkeypatch.setattr(kernel_calls, name, getattr(module, name))
    monkeypatch.setattr(constraints, "_tensor_limit", lambda *_: None)
    monkeypatch.setattr(constraints, "_device_limit", lambda *_: None)
    monkeypatch.setattr(fa4, "version_problem", lambda: None)


@pytest.fixture(params=["one tile", "folded", "shared keys"])
def compressed_calls(monkeypatch, request):
    """All ways to compute the compressed branch of a batch: as of few, more and many tokens."""
    if request.param != "one tile":
        monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    if request.param == "shared keys":
        monkeypatch.setattr(folded, "SHARED_BYTES", 0)


@pytest.fixture
def poisoned_memory():
    """What is not written is NaN, or the largest integer."""
    with poison.poisoned_memory():
        yield
