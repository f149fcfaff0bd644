"""Calls run step by step where modules, modes or wrappers change or watch what they do."""

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import nsa
from nsa import recordings
from nsa.recorder import Recorder
from tests.helpers.recorded_layers import (
    DIM,
    HEADS,
    assert_recorded,
    make_layer,
    new_input,
    recorded,
    run,
    with_gradients,
)


class Wrapped(nn.Linear):
    pass


def hook(module, *_):
    pass


CHANGES = {
    "module hook": lambda layer: layer.q_proj.register_forward_hook(hook),
    "module in a module": lambda layer: layer.gate_mlp[0].register_full_backward_hook(hook),
    "parameter hook": lambda layer: layer.q_proj.weight.register_hook(lambda g: None),
    "another type": lambda layer: setattr(layer, "o_proj", Wrapped(DIM, DIM, dtype=torch.float64)),
    "a forward": lambda layer: setattr(layer.k_proj, "forward", layer.k_proj.forward),
    "parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer.v_proj),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_run_step_by_step(change, emulated):
    layer, calls = make_layer(), []
    for _ in range(3):
        layer(new_input())
    assert recorded()
    CHANGES[change](layer)
    by_steps = layer._forward
    layer._forward = lambda *args: calls.append(1) or by_steps(*args)
    for _ in range(3):
        layer(new_input().requires_grad_()).sum().backward()
    assert len(calls) == 3


def with_bare_weight(module, name, make):
    weight = getattr(module, name).detach().clone()
    delattr(module, name)
    make(module, name, weight)


BARE = {
    "buffer": lambda module, name, x: module.register_buffer(name, x),
    "attribute": setattr,
    "leaf": lambda module, name, x: setattr(module, name, x.requires_grad_()),
}


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize("path", ["q_proj.weight", "o_proj.bias", "compress_k.position"])
def test_weights_that_are_no_parameters(kind, path, emulated):
    layer = make_layer(bias=True)
    owner, name = path.split(".")
    module = getattr(layer, owner)
    with_bare_weight(module, name, BARE[kind])
    for _ in range(3):
        inputs = [getattr(module, name)] if kind == "leaf" else []
        x = new_input()
        got, wanted = (with_gradients(call, x, inputs) for call in (layer, layer._forward))
        assert all(map(torch.equal, got, wanted))
        setattr(module, name, torch.randn_like(getattr(module, name)).requires_grad_(bool(inputs)))


def without_silu(layer):
    layer.gate_mlp = type(layer.gate_mlp)(layer.gate_mlp[0], layer.gate_mlp[2])


def in_another_order(layer):
    first = layer.compress_k
    del layer.compress_k
    layer.compress_k = first


@pytest.mark.parametrize("change", [without_silu, in_another_order])
def test_layers_of_other_modules_have_other_recordings(change, emulated):
    layer = make_layer()
    for _ in range(3):
        layer(new_input())
    assert recorded()
    change(layer)
    x = new_input()
    assert torch.equal(layer(x), layer._forward(x))


class Mode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


CONTEXTS = {
    "dispatch mode": Mode,
    "function mode": torch.overrides.BaseTorchFunctionMode,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    "dual numbers": torch.autograd.forward_ad.dual_level,
    "anomalies": torch.autograd.detect_anomaly,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", CONTEXTS)
def test_who_looks_at_operations_sees_them(context):
    seen = []

    def function(x):
        seen.append(1)
        return x * 2

    with CONTEXTS[context]():
        for _ in range(3):
            run("key", function, (torch.ones(3, requires_grad=True),))
    assert len(seen) == 3


@pytest.mark.parametrize("enter", ["set", "with"])
def test_a_default_device_sees_nothing(enter, emulated):
    """Scripts set it for the whole training."""
    layer = make_layer()
    with contextlib.ExitStack() as stack:
        if enter == "set":
            torch.set_default_device("cpu")
            stack.callback(torch.set_default_device, None)
        else:
            stack.enter_context(torch.device("cpu"))
        assert_recorded(layer)


def test_threads_that_record_one_layer(emulated, monkeypatch):
    layer, other = make_layer(), make_layer()
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    for frozen in (layer, other):
        frozen.requires_grad_(False)
    xs = [new_input(tokens=tokens) for tokens in (64, 96)]
    for x in xs:
        layer(x)
    both, start = threading.Barrier(2), Recorder.__init__

    def start_together(*args):
        start(*args)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "__init__", start_together)
        threads = [threading.Thread(target=layer, args=(x,)) for x in xs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for x in xs:
        assert torch.equal(other(x), other._forward(x))


def test_checkpoint(emulated):
    layer = make_layer()
    for _ in range(3):
        x = new_input()
        got, wanted = (
            with_gradients(call, x, list(layer.parameters()))
            for call in (lambda x: checkpoint(layer, x, use_reentrant=False), layer._forward)
        )
        assert all(map(torch.equal, got, wanted))


def sharded(layer, mesh):
    return fully_shard(layer, mesh=mesh)


def in_units(layer, mesh):
    for name in ("q_proj", "compress_k"):
        fully_shard(getattr(layer, name), mesh=mesh)
    return fully_shard(layer, mesh=mesh)


def distributed_data_parallel(layer, _):
    return nn.parallel.DistributedDataParallel(layer)


# PyTorch's own, of FSDP2 and DDP on a CPU.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [sharded, in_units, distributed_data_parallel])
def test_wrapped_layers_train_alike(wrap, emulated, mesh, monkeypatch):
    xs, losses = [new_input() for _ in range(5)], []
    for enabled in (True, False):
        monkeypatch.setattr(recordings, "ENABLED", enabled)
        model = wrap(make_layer(), mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for x in xs:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


def test_transforms_of_functions_raise_as_before(emulated):
    q, k = torch.randn(1, 64, HEADS, 64), torch.randn(1, 64, 1, 64)
    for _ in range(3):
        nsa.forward(q, k, k.clone(), backend="fused")
    with pytest.raises(nsa.UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda q: nsa.forward(q, k, k.clone(), backend="fused").sum())(q)
