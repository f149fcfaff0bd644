"""The window last, whose kernel adds the branches up, as for long inputs: in float64, emulated."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.fused import fa4, kernel_calls, pipeline
from nsa.testing import make_inputs
from tests.helpers import emulated_fa4
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.small_configs import tile_config, token_config
from tests.helpers.strategies import leaves, tile_problems, token_problems

CONFIGS = {"tile": tile_config(), "token": token_config()}


@pytest.fixture(autouse=True)
def window_last(fused_on_cpu, monkeypatch):
    """Of short inputs too."""
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 0)


@pytest.mark.unmeasured
@settings(max_examples=examples(80), **WITH_FIXTURES)
@given(problem=st.one_of(tile_problems(), token_problems()))
def test_output_and_gradients_equal_reference(problem):
    inputs = [x.requires_grad_() for x in leaves(problem)]
    given = {}
    if problem.config.selection == "token":
        # Ties may be broken otherwise.
        given = dict(block_indices=problem.select_blocks(backend="fused"))
    results = []
    for call in (dict(backend="reference", **given), dict(backend="fused")):
        out = problem.forward(**call)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
        results.append((out, *grads))
    for expected, actual in zip(*results, strict=True):
        if expected is None or actual is None:
            assert all(x is None or not x.any() for x in (expected, actual))
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", CONFIGS)
def test_the_windows_kernel_comes_last_and_writes_its_output_where_it_is_kept(
    mode, recompute, gradients, monkeypatch
):
    calls = []

    def note(module, name, function):
        def call(*args, **kwargs):
            calls.append((name, kwargs.get("keep")))
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module in (fa4, kernel_calls):
        for name in ("dense_forward", "sparse_forward", "selected_forward", "closing_forward"):
            if hasattr(module, name):
                note(module, name, getattr(module, name))
    q, k, v = make_inputs((1, 200), 2, 1, 8, dtype=torch.float64, requires_grad=gradients)
    nsa.forward(q, k, v, config=CONFIGS[mode], backend="fused", recompute_window=recompute)
    assert calls[-1] == ("closing_forward", gradients and not recompute)
    assert calls.count(calls[-1]) == 1
    selected = "sparse_forward" if mode == "tile" else "selected_forward"
    assert [name for name, _ in calls].count(selected) == 1


@pytest.mark.parametrize("mode", CONFIGS)
def test_short_inputs_have_the_window_first(mode, monkeypatch):
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 200)
    called = []
    monkeypatch.setattr(fa4, "closing_forward", lambda *a, **k: called.append(a))
    monkeypatch.setattr(fa4, "dense_forward", emulated_fa4.dense_forward)
    q, k, v = make_inputs((1, 200), 2, 1, 8, dtype=torch.float64)
    nsa.forward(q, k, v, config=CONFIGS[mode], backend="fused")
    assert not called


@pytest.mark.parametrize("mode", CONFIGS)
def test_chunks_of_heads_take_the_path_of_the_whole(mode, monkeypatch):
    """Else their results would have other bits: one kernel does not round before it adds up."""
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 199)
    added = []

    def closing_forward(q, *args, **kwargs):
        added.append(q.shape[2])
        return emulated_fa4.closing_forward(q, *args, **kwargs)

    monkeypatch.setattr(fa4, "closing_forward", closing_forward)
    q, k, v = make_inputs((1, 200), 4, 2, 8, dtype=torch.float64)
    call = dict(config=CONFIGS[mode], backend="fused")
    whole = nsa.forward(q, k, v, **call)
    assert torch.equal(nsa.forward(q, k, v, **call, max_workspace_bytes=1), whole)
    assert added == [4, 2, 2]
