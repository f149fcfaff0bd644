"""Recorded calls give the same bits as calls step by step; what may differ is not recorded."""

import contextlib
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import nsa
from nsa import boundaries, packing, recordings
from nsa.fused import compressed_forms
from nsa.recorded_call import Recording
from nsa.recorder import MARK, Recorder
from nsa.testing import make_cu_seqlens
from tests.helpers.noted_kernels import note_kernels

TOKENS, DIM, HEADS = 300, 128, 4
PRESETS = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}
modes = pytest.mark.parametrize("mode", PRESETS)


@pytest.fixture(autouse=True)
def _no_recordings(monkeypatch):
    monkeypatch.setattr(recordings, "ENABLED", True)
    recordings.clear()


@pytest.fixture
def emulated(fused_on_cpu, monkeypatch):
    """The fused backend on a CPU, whose kernels are steps of recordings."""
    note_kernels(monkeypatch.setattr)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)


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
    assert_recorded(make_layer(mode, **options))


@modes
def test_batch(mode, emulated):
    assert_recorded(make_layer(mode), batch=2)


@pytest.fixture
def unread(monkeypatch):
    """Boundaries that the host would wait for, as those on a GPU."""
    for module in (boundaries, packing):
        monkeypatch.setattr(module, "waits_to_read", lambda _: True)


@modes
def test_packings_of_a_form_share_a_recording(mode, emulated, unread):
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
    found, longest = given.unread(sum(lengths))
    assert (found.tolist(), found.dtype, longest) == (bounds, torch.int32, most)
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
    for _ in range(4):
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


def test_second_derivative_raises(emulated):
    layer = make_layer()
    for _ in range(3):
        x = new_input().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    assert recorded()
    with pytest.raises(RuntimeError, match="differentiated once"):
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
        with pytest.raises(RuntimeError, match="differentiated once"):
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


def test_output_may_be_changed(emulated):
    layer = make_layer()
    for _ in range(3):
        y = layer(new_input().requires_grad_())
        y.mul_(2).sum().backward()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x.sum().item(),
        lambda x: x + torch.rand_like(x),
        lambda x: x[x > 0],
        lambda x: x.view(-1),
        lambda x: (x * 2)[1:],
        lambda x: ((x * 2).view(torch.int32) + 1).view(torch.float32),
    ],
    ids=["item", "random", "shape", "view", "part", "dtype"],
)
def test_what_may_differ_is_not_recorded(function):
    for _ in range(3):
        x = torch.randn(4)
        torch.manual_seed(1)
        got = run("key", function, (x,))
        torch.manual_seed(1)
        assert torch.equal(got, function(x))
    assert not recorded()


def test_memory_is_freed_after_its_last_use():
    alive = []

    def kernel(*tensors):
        gc.collect()
        alive.append(sum(ref() is not None for ref in refs))
        refs.extend(weakref.ref(x.untyped_storage()) for x in tensors)
        tensors[-1].copy_(tensors[0] + 1)

    def function(x):
        for _ in range(4):
            y = torch.empty_like(x)
            recordings.launch(kernel, x, y)
            x = y
        return y

    for _ in range(3):
        refs: list = []
        alive.clear()
        x = torch.zeros(3)
        assert torch.equal(run("key", function, (x,)), x + 4)
    assert recorded()
    # The input, and in turn what a launch reads. The output of the step before is written.
    assert max(alive) <= 2


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


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(recordings, "MAX_RECORDINGS", 4)
    for size in range(1, 10):
        for _ in range(3):
            run("key", lambda x: x * 2, (torch.randn(size),))
    assert len(recordings._recordings) == 4


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
