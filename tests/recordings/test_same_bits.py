"""Recorded calls give the same bits as calls step by step, and raise the same errors."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.tensor import DTensor

import nsa
from nsa import recordings
from nsa.fused import compressed_forms
from nsa.testing import make_cu_seqlens
from tests.helpers.recorded_layers import (
    HEADS,
    PRESETS,
    TOKENS,
    assert_recorded,
    make_layer,
    modes,
    new_input,
    recorded,
    run,
    with_gradients,
)


@modes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "q", "compressor": "mean"},
        {"separate_kv": True, "bias": True},
        {"value_head_dim": 64, "rope_theta": None},
    ],
    ids=["default", "q-mean", "separate", "values"],
)
def test_layer(mode, options, emulated):
    # Three calls, because the next is as the third (see test_batch).
    assert_recorded(make_layer(mode, **options), turns=3)


@modes
def test_batch(mode, emulated):
    assert_recorded(make_layer(mode), batch=2)


@modes
@pytest.mark.parametrize("few", [0, 512], ids=["folded", "masked"])
def test_packings_of_a_form_share_a_recording(mode, few, emulated, unread, monkeypatch):
    monkeypatch.setattr(compressed_forms, "FEW_PACKED_KEYS", few)
    layer = make_layer(mode)
    parameters = list(layer.parameters())
    packings = [[150, 1, 149], [0, 10, 255, 35], [140, 30, 130], [300 - 129, 128, 1, 0]]
    for turn, lengths in enumerate(packings):
        bounds = nsa.Packing(make_cu_seqlens(lengths))
        x = new_input()[0]
        wanted = with_gradients(partial(layer._forward, cu_seqlens=bounds), x, parameters)
        got = with_gradients(partial(layer, cu_seqlens=bounds), x, parameters)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        assert len(recorded()) == (turn > 0)


def test_a_packing_is_kept_where_calls_are_not_recorded(emulated, unread, monkeypatch):
    """Not its bare boundaries, with which each layer would make a plan of its own."""
    monkeypatch.setattr(recordings, "MAX_ELEMENTS", 0)
    layer = make_layer()
    bounds = nsa.Packing(make_cu_seqlens([100, 200]))
    given, forward = [], layer._forward

    def spy(x, cu_seqlens=None, *rest, **options):
        given.append(cu_seqlens)
        return forward(x, cu_seqlens, *rest, **options)

    layer._forward = spy
    layer(new_input()[0], bounds)
    assert given == [bounds]


def test_packings_of_other_tokens_raise(emulated, unread):
    layer = make_layer()
    for lengths in [100, 200], [150, 150], [299]:
        call = partial(layer, new_input()[0], nsa.Packing(make_cu_seqlens(lengths)))
        if sum(lengths) == TOKENS:
            call()
        else:
            with pytest.raises(ValueError, match="must end at the 300 tokens"):
                call()


@pytest.mark.parametrize(
    ("lengths", "bounds", "most"),
    [
        ([5], [0, 5], 5),
        ([3, 0, 6], [0, 3, 3, 9, 9], 8),
        ([1, 1, 1, 1, 13], [0, 1, 2, 3, 4, 17, 17, 17, 17], 16),
        ([0, 0, 0], [0, 0, 0, 0, 0], 0),
    ],
)
def test_rounded_packings(lengths, bounds, most, unread):
    given = nsa.Packing(make_cu_seqlens(lengths))
    found = given.unread(sum(lengths))
    (rounded,) = found.bounds
    assert (rounded.tolist(), rounded.dtype, found.max_seqlen) == (bounds, torch.int32, most)
    assert given.unread(sum(lengths) + 1) is None
    longer = nsa.Packing(make_cu_seqlens(lengths), make_cu_seqlens([x + 1 for x in lengths]))
    assert longer.unread(sum(lengths)) is None


def test_frozen_parameters(emulated):
    layer = make_layer()
    for name in ("q_proj", "compress_k"):
        getattr(layer, name).requires_grad_(False)
    assert_recorded(layer)


def test_a_form_of_one_step_is_not_recorded(emulated):
    """Layers of one form are called one after another; the next step may have other tokens."""
    layers = [make_layer() for _ in range(3)]
    for tokens in (300, 310, 310):
        assert not recorded()
        x = new_input(tokens=tokens).requires_grad_()
        for layer in layers:
            x = layer(x)
    assert len(recorded()) == 1


def test_layers_of_one_form_share_a_recording(emulated):
    stack = [make_layer() for _ in range(4)]
    for layer in stack[1:]:
        for p in layer.parameters():
            nn.init.normal_(p, std=0.1)
    parameters = [p for layer in stack for p in layer.parameters()]

    def forward(call, x):
        for layer in stack:
            x = x + call(layer)(x)
        return x

    for _ in range(2):
        x = new_input()
        wanted = with_gradients(lambda x: forward(lambda m: m._forward, x), x, parameters)
        got = with_gradients(lambda x: forward(lambda m: m, x), x, parameters)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert len(recorded()) == 1


@modes
def test_autocast(mode, emulated):
    layer = make_layer(mode, dtype=torch.float32)
    parameters = list(layer.parameters())
    for _ in range(4):
        x = new_input().float()
        results = []
        for call in (layer, layer._forward):
            hidden = x.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                # Not the leaf, of which autocast would keep a cast.
                y = call(hidden * 1)
            assert y.dtype == torch.bfloat16
            results.append(
                [y, *torch.autograd.grad(y.float().square().sum(), [hidden, *parameters])]
            )
        assert all(map(torch.equal, *results))
        with torch.no_grad():
            for p in parameters:
                p.add_(0.01)
    assert recorded()


@modes
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, grad_mode, emulated):
    layer = make_layer(mode)
    with grad_mode():
        for _ in range(4):
            x = new_input()
            assert torch.equal(layer(x), layer._forward(x))
    (found,) = recorded()
    assert found.run_backward is None
    assert not found.saved


@modes
def test_forward_of_slices(mode, emulated, monkeypatch):
    """Queries, keys and values may share memory in one call and not in the next."""
    config = PRESETS[mode]()
    kind = dict(dtype=torch.float64)
    weight = torch.randn(HEADS, 3, 64, **kind)

    def call(q, k, v, recording=True):
        monkeypatch.setattr(recordings, "ENABLED", recording)
        return nsa.forward(q, k, v, gate_proj_weight=weight, config=config, backend="fused")

    for turn in range(4):
        packed = torch.randn(1, TOKENS, HEADS + 2, 64, **kind)
        q, k, v = packed.split((HEADS, 1, 1), 2)
        if turn == 2:
            k = packed.clone()[:, :, HEADS : HEADS + 1]
        results = []
        for recording in (True, False):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = call(*leaves, recording)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert all(map(torch.equal, *results))
    assert len(recorded()) == 1


def test_expanded_keys_and_values_run(emulated):
    q, x = torch.randn(2, 64, HEADS, 64), torch.randn(1, 64, 1, 64)
    for _ in range(3):
        k = x.expand(2, -1, -1, -1)
        got = nsa.forward(q, k, k.view_as(k), backend="fused")
        torch.testing.assert_close(got, nsa.forward(q, k, k, backend="reference"))


def test_wrong_arguments_are_found_after_a_recording(emulated):
    q, k = torch.randn(1, 64, HEADS, 64), torch.randn(1, 64, 1, 64)
    for _ in range(3):
        nsa.forward(q, k, k.clone(), backend="fused")
    assert recorded()
    with pytest.raises(TypeError, match="recompute_window"):
        nsa.forward(q, k, k.clone(), backend="fused", recompute_window=0)
    with pytest.raises(ValueError, match="v must have shape"):
        nsa.forward(q, k[:, 1:], k.clone(), backend="fused")


WRONG = {
    "k of two": (lambda q, k: dict(k=(k, k)), ValueError, "k must be one tensor or three"),
    "k of none": (lambda q, k: dict(k=()), ValueError, "k must be one tensor or three"),
    "q in a tuple": (lambda q, k: dict(q=(q,)), TypeError, "q must be a tensor, got tuple"),
    "gates in a list": (
        lambda q, k: dict(gates=[q[..., :3]]), TypeError, "gates must be a tensor, got list",
    ),
    "sparse q": (lambda q, k: dict(q=q.to_sparse()), TypeError, "q must be a dense tensor"),
    "nested q": (
        lambda q, k: dict(q=torch.nested.nested_tensor([q[0]])), TypeError, "must be a dense",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_wrong_kinds_raise_as_step_by_step(case, emulated):
    change, error, message = WRONG[case]
    q, k = torch.randn(1, 64, HEADS, 64), torch.randn(1, 64, 1, 64)
    for _ in range(3):
        with pytest.raises(error, match=message):
            nsa.forward(**dict(q=q, k=k, v=k.clone()) | change(q, k), backend="fused")


def test_second_derivative_raises(emulated):
    layer = make_layer()
    for _ in range(3):
        x = new_input().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert recorded()
    with pytest.raises(nsa.UnsupportedError, match="differentiated once"):
        dx.sum().backward()


def test_input_that_is_changed_before_the_backward_raises(emulated):
    layer = make_layer()
    for _ in range(3):
        x = new_input().requires_grad_() * 1
        y = layer(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_uses_the_weights_of_the_forward(emulated):
    layer = make_layer()
    for _ in range(3):
        x, results = new_input().requires_grad_(), []
        for call in (layer, layer._forward):
            y = call(x)
            kept = [p.data for p in layer.parameters()]
            for p in layer.parameters():
                p.data = torch.zeros_like(p)
            results.append(torch.autograd.grad(y.sum(), x)[0])
            for p, data in zip(layer.parameters(), kept, strict=True):
                p.data = data
        assert torch.equal(*results)
    assert recorded()


def test_second_derivative_in_a_weight_raises(emulated):
    layer = make_layer()
    for _ in range(3):
        x = new_input().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        with pytest.raises(nsa.UnsupportedError, match="differentiated once"):
            torch.autograd.grad(dx.sum(), layer.o_proj.weight)


class Sub(torch.Tensor):
    pass


def test_gradient_of_the_output_of_a_subclass(emulated, mesh):
    layer = make_layer()
    for _ in range(3):
        x = new_input().requires_grad_()
        y = layer(x)
        dy = torch.randn_like(y)
        reduced = funcol.all_reduce(dy, "sum", mesh)
        assert type(reduced) is not torch.Tensor
        (wanted,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        for other in (dy.as_subclass(Sub), nn.Parameter(dy), reduced):
            (got,) = torch.autograd.grad(y, x, other, retain_graph=True)
            assert type(got) is torch.Tensor
            assert torch.equal(got, wanted)
    with pytest.raises(TypeError, match="plain tensor, got DTensor"):
        y.backward(DTensor.from_local(dy, mesh))


class Launched(torch.autograd.Function):
    """Its backward is a launch of ``kernel``."""

    @staticmethod
    def forward(_, x):
        return x + 1

    @staticmethod
    def backward(_, dy):
        dx = torch.empty_like(dy)
        recordings.launch(Launched.kernel, dy, dx)
        return dx


def test_launches_read_an_aligned_gradient_of_the_output(monkeypatch):
    addresses = []

    def kernel(dy, dx):
        addresses.append(dy.data_ptr())
        dx.copy_(dy)

    monkeypatch.setattr(Launched, "kernel", kernel, raising=False)
    for _ in range(3):
        x, dy = torch.ones(5, requires_grad=True), torch.randn(6)[1:]
        y = run("key", Launched.apply, (x,))
        addresses.clear()
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], dy)
    assert recordings._recordings
    assert [x % 16 for x in addresses] == [0]


def test_output_may_be_changed(emulated):
    layer = make_layer()
    for _ in range(3):
        y = layer(new_input().requires_grad_())
        y.mul_(2).sum().backward()


SOME = torch.randn(2, 6, 8, dtype=torch.float64)
OPERATIONS = {
    "mm": lambda x: x[0].mm(x[1].T),
    "addmm": lambda x: torch.addmm(x[0, :, :6], x[0], x[1].T, beta=2, alpha=3),
    "bmm": lambda x: x.bmm(x.mT),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :6], x, x.mT, alpha=0.5),
    "cat": lambda x: torch.cat((x, x * 2), 1),
    "stack": lambda x: torch.stack((x, x * 2), -1),
    "index_select": lambda x: x.index_select(1, torch.arange(4) + 1),
    "add": lambda x: torch.add(x, x, alpha=3) + 1,
    "ge": lambda x: x * (x >= 0) + (x >= x * 2),
    "where": lambda x: torch.where(x >= 0, x, torch.scalar_tensor(2, dtype=x.dtype)),
    "sum": lambda x: x.sum((0, 2)),
    "mean": lambda x: x.mean(1, keepdim=True),
    "silu": lambda x: torch.nn.functional.silu(x),
    "sigmoid": lambda x: x.mT.sigmoid().contiguous(),
    "clone": lambda x: x.mT.clone(memory_format=torch.contiguous_format),
    "to": lambda x: x.float().double(),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 2, 0, 3), value=5),
    "cut": lambda x: torch.nn.functional.pad(x, (-1, 2, -2, -3)),
    "linear": lambda x: torch.nn.functional.linear(x, x[0], x[0, :, 0]),
    "matmul": lambda x: x @ x[0].T,
    "topk": lambda x: x.topk(3).values.clone(),
    "cumsum": lambda x: x.cumsum(1),
}
"""Of those which write their results are some for which the recording does it, see ``INTO``."""


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("grad", [False, True])
def test_operations_write_what_they_make(name, grad):
    for turn in range(4):
        x = (SOME * (turn + 1)).requires_grad_(grad)
        got = run(name, OPERATIONS[name], [x])
        wanted = OPERATIONS[name](x)
        assert torch.equal(got, wanted)
        if grad:
            seed = torch.linspace(-1, 1, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
            assert torch.equal(*(torch.autograd.grad(y, x, seed)[0] for y in (got, wanted)))
    assert recordings._recordings
