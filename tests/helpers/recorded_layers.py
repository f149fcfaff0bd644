"""Layers whose calls are recorded, and what they give step by step."""

import pytest
import torch

import nsa
from nsa import recordings
from nsa.recorded_call import Recording

TOKENS, DIM, HEADS = 300, 128, 4


PRESETS = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}


modes = pytest.mark.parametrize("mode", PRESETS)


def recorded() -> list[Recording]:
    """The recordings, but those that a layer's steps made of :func:`nsa.forward`."""
    found = recordings._recordings
    forms = [*found, *recordings._seen]
    if any(form[0][0] is nsa.NativeSparseAttention for form in forms):
        forms = [form for form in forms if form[0][0] is nsa.NativeSparseAttention]
    return [found[form] for form in forms if form in found]


def make_layer(mode="token", **options):
    torch.manual_seed(0)
    options = dict(backend="fused", dtype=torch.float64) | options
    return nsa.NativeSparseAttention(DIM, HEADS, 1, PRESETS[mode](), **options)


def new_input(batch=1, tokens=TOKENS) -> torch.Tensor:
    return torch.randn(batch, tokens, DIM, dtype=torch.float64)


def run(key, function, tensors, parameters=()) -> torch.Tensor:
    """As a caller runs ``function``: step by step where no recording does."""
    out = recordings.run(key, function, tensors, parameters)
    return function(*tensors) if out is None else out


def with_gradients(call, x, parameters) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    inputs = [x, *(p for p in parameters if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def assert_recorded(layer, batch=1, turns=4):
    """The layer gives the same bits as step by step, without steps from its third call on."""
    parameters, calls = list(layer.parameters()), []
    by_steps = layer._forward

    def counted(*args):
        calls.append(args)
        return by_steps(*args)

    layer._forward = counted
    for turn in range(turns):
        x = new_input(batch)
        wanted = with_gradients(by_steps, x, parameters)
        calls.clear()
        got = with_gradients(layer, x, parameters)
        assert all(map(torch.equal, got, wanted))
        # The second call rehearses and records.
        assert len(calls) == (1, 2, 0, 0)[turn]
