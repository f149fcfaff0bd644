"""What a backward has used up frees its memory before the branches run, as theirs is the most."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import nsa
from nsa.fused import pipeline
from nsa.testing import make_inputs

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
