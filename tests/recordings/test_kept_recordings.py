"""Which calls are recorded, and which recordings and memory are kept."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from nsa import recorded_zeros, recordings
from nsa.recorder import MARK
from tests.helpers.recorded_layers import (
    recorded,
    run,
)


def test_large_calls_and_a_switch(monkeypatch):
    seen = []

    def function(x):
        seen.append(1)
        return x * 2

    monkeypatch.setattr(recordings, "MAX_ELEMENTS", 3)
    for _ in range(3):
        run("key", function, (torch.ones(4),))
    assert len(seen) == 3
    for _ in range(3):
        run("key", function, (torch.ones(3),))
    assert len(seen) == 5
    monkeypatch.setattr(recordings, "ENABLED", False)
    run("key", function, (torch.ones(3),))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + torch.rand_like(x),
        lambda x: x[x > 0],
        lambda x: x.view(-1),
        lambda x: (x * 2)[1:],
        lambda x: ((x * 2).view(torch.int32) + 1).view(torch.float32),
        lambda x: torch.mul(x, 2, out=torch.empty(0)) * torch.add(x, 1, out=torch.empty(0)),
        lambda x: x * torch.empty(3, device="meta").add(1).numel(),
    ],
    ids=["item", "random", "shape", "view", "part", "dtype", "size", "device"],
)
def test_what_may_differ_is_not_recorded(function):
    for _ in range(3):
        x = torch.randn(4)
        torch.manual_seed(1)
        got = run("key", function, (x,))
        torch.manual_seed(1)
        assert torch.equal(got, function(x))
    assert not recorded()


def test_forms_are_told_apart():
    def function(x, y):
        return x @ y

    cases = [
        (torch.randn(3, 4), torch.randn(4, 5)),
        (torch.randn(3, 4), torch.randn(5, 4).T),
        (torch.randn(6, 4)[::2], torch.randn(4, 5)),
        (torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)),
    ]
    for _ in range(3):
        for x, y in cases:
            for needs in (False, True):
                got = run("key", function, (x.requires_grad_(needs), y))
                assert torch.equal(got, x @ y)
                assert got.requires_grad == needs


def test_autocast_is_told_apart():
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    for _ in range(3):
        for dtype in (None, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                got, wanted = run("key", torch.mm, (x, y)), x @ y
            assert torch.equal(got, wanted)
            assert got.dtype == wanted.dtype
    assert len(recorded()) == 3


def test_numbers_of_tensors_are_told_apart():
    """As of layers of which one has biases."""
    tensors = [torch.randn(3, requires_grad=True) for _ in range(3)]
    for _ in range(3):
        for count in (1, 3, 2):
            got = run("key", lambda *given: sum(given) * 2, tensors[:count])
            assert torch.equal(got, sum(tensors[:count]) * 2)
    assert len(recorded()) == 3


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(recordings, "MAX_RECORDINGS", 4)
    for size in range(1, 10):
        for _ in range(3):
            run("key", lambda x: x * 2, (torch.randn(size),))
    assert len(recordings._recordings) == 4
    assert [entry.form for entry in kept_entries()] == list(recordings._recordings)


def kept_entries() -> list:
    return [entry for entries in recordings._entries.values() for entry in entries]


def test_tensors_of_one_form_are_known_by_what_they_require(monkeypatch):
    """Where no gradient is wanted, which is one form; but one recording for all."""
    monkeypatch.setattr(recordings, "MAX_ENTRIES", 3)
    x, y = torch.randn(3), torch.randn(3)
    with torch.no_grad():
        for _ in range(3):
            for needs in ((False, False), (True, False), (False, True), (True, True)):
                x.requires_grad_(needs[0])
                y.requires_grad_(needs[1])
                assert torch.equal(run("key", torch.mul, (x, y)), x * y)
    assert len(recordings._recordings) == 1
    assert len(kept_entries()) == 3
    got = run("key", torch.mul, (x, y))  # by its own form
    assert got.requires_grad


@pytest.mark.parametrize("large", [False, True])
def test_zeros_are_filled_at_once(large, monkeypatch):
    """Small ones that are no results: each in its place, though written to between."""
    if large:
        monkeypatch.setattr(recorded_zeros, "MOST_BYTES", 12)
    filled = []

    def zero(x):
        filled.append(x.nbytes)
        return x.zero_()

    monkeypatch.setattr(recorded_zeros, "Tensor", SimpleNamespace(zero_=zero))

    def add(x, *targets):
        with _disable_current_modes():  # as a kernel, whose work no mode sees
            for y in targets:
                y += x

    def function(x, y):
        first, second = torch.zeros(3, 5), torch.zeros(7)
        recordings.launch(add, x, first, second)
        whole, third = torch.zeros(4, dtype=torch.int32), x.new_zeros(2, 5)
        recordings.launch(add, y, first, third)
        recordings.launch(add, 1, whole)
        out = torch.zeros(1)
        recordings.launch(add, first.sum() + second.sum() + third.sum() + whole.sum(), out)
        return out

    x, y = torch.ones(1), torch.full((1,), 10.0)
    for turn in range(4):
        filled.clear()
        got = run("key", function, (x, y))
        assert got.item() == 1 * 22 + 10 * 25 + 4
        if turn > 0:
            assert filled == ([60, 28, 16, 40, 4] if large else [4 * 512, 4])


def test_those_called_last_are_kept(monkeypatch):
    monkeypatch.setattr(recordings, "MAX_RECORDINGS", 4)
    seen = []

    def function(x):
        seen.append(x.shape)
        return x * 2

    for size in range(2, 20):
        for x in (torch.randn(1), torch.randn(size)):
            run("key", function, (x,))
    # In the first call, and to rehearse and record in the second.
    assert seen.count((1,)) <= 3


def test_forms_without_a_recording_take_no_place(monkeypatch):
    """As where each step has another length: what is recorded stays, though it is called rarely."""
    monkeypatch.setattr(recordings, "MAX_RECORDINGS", 2)
    monkeypatch.setattr(recordings, "MAX_SEEN", 5)
    seen = []

    def function(x):
        seen.append(x.shape)
        return x * 2

    def refused(x):
        return x * x.sum().item()

    for _ in range(2):
        run("key", function, (torch.randn(1),))
    seen.clear()
    for size in range(2, 20):
        run("key", function, (torch.randn(size),))
        for _ in range(2):
            run("refused", refused, (torch.randn(size),))
    assert (1,) not in seen
    seen.clear()
    run("key", function, (torch.randn(1),))
    assert not seen
    assert len(recordings._recordings) == 1
    assert len(recordings._seen) == 5


def test_constants_are_kept_and_parameters_are_not():
    table = torch.randn(3)
    weight = nn.Parameter(torch.randn(3))
    for _ in range(3):
        x = torch.randn(3)
        got = run("key", lambda x: x * weight + table, (x,), (weight,))
        assert torch.equal(got, x * weight + table)
        with torch.no_grad():
            weight.add_(1)
    assert recorded()
    with contextlib.suppress(AttributeError):
        assert not hasattr(weight.untyped_storage(), MARK)
