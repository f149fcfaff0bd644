"""What a backward has used up frees its memory before the branches run, as theirs is the most."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import nsa
from nsa import recordings
from nsa.fused import compressed_forms, pipeline
from nsa.testing import make_inputs
from tests.helpers.noted_kernels import note_kernels

CONFIGS = {"token": nsa.NSAConfig.paper(), "tile": nsa.NSAConfig()}
modes = pytest.mark.parametrize("mode", CONFIGS)


@pytest.fixture
def outputs(fused_on_cpu, monkeypatch):
    """Of each backward, which of the branches' outputs are freed when the window's begins."""
    found, seen = [], []

    def combine_backward(dout, branches, *args, function=pipeline.combine_branches_backward):
        seen[:] = [StorageWeakRef(x.untyped_storage()) for x in branches]
        return function(dout, branches, *args)

    def window_backward(*args, function=pipeline.window_attention_backward):
        found.append([x.expired() for x in seen])
        return function(*args)

    monkeypatch.setattr(pipeline, "combine_branches_backward", combine_backward)
    monkeypatch.setattr(pipeline, "window_attention_backward", window_backward)
    return found


def call(mode, **options):
    inputs = make_inputs((1, 300), 4, 2, 16, dtype=torch.float64, requires_grad=True)
    return inputs, nsa.forward(*inputs, config=CONFIGS[mode], backend="fused", **options)


@modes
@pytest.mark.parametrize(
    "options", [{}, {"recompute_window": True}, {"max_workspace_bytes": 1}], ids=str
)
def test_outputs_of_branches(mode, options, outputs):
    _, out = call(mode, **options)
    out.sum().backward()
    assert outputs
    assert all(map(all, outputs))
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()


@modes
@pytest.mark.parametrize("keep", ["retain_graph", "create_graph"])
def test_not_of_a_graph_that_is_kept(mode, keep, outputs):
    inputs, out = call(mode)
    first = torch.autograd.grad(out.sum(), inputs, **{keep: True})
    second = torch.autograd.grad(out.sum(), inputs)
    assert not any(outputs[0])
    assert all(outputs[1])
    assert all(map(torch.equal, first, second))


@modes
def test_of_recordings(mode, fused_on_cpu, monkeypatch):
    """A step frees what no later one uses; a kept graph keeps it."""
    note_kernels(monkeypatch.setattr)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    recordings.clear()
    monkeypatch.setattr(recordings, "ENABLED", True)
    for _ in range(2):
        inputs, out = call(mode)
        out.sum().backward()
    inputs, out = call(mode)
    recording = out.grad_fn.recording
    given = len(inputs)
    saved = out.grad_fn.saved_tensors
    own = [
        StorageWeakRef(x.untyped_storage())
        for x, number in zip(saved, recording.saved, strict=False)
        if number >= given
    ]
    del saved
    assert own
    alive = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            alive.append(sum(not x.expired() for x in own))
            return func(*args, **(kwargs or {}))

    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert not any(x.expired() for x in own)
    total = out.sum()
    with Spy():
        second = torch.autograd.grad(total, inputs)
    # The last operation uses none of them.
    assert alive[0] == len(own)
    assert alive[-1] == 0
    assert all(map(torch.equal, first, second))
    recordings.clear()
    assert not recordings._recordings
