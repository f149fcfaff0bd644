"""Compiled layers run recordings inside of their ops, with emulated kernels."""

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import nsa
from nsa import recordings
from nsa.fused import compressed_forms, plain_layer, plain_layer_ops, schedule
from nsa.testing import make_cu_seqlens
from tests.helpers.noted_kernels import count_plan_kernels, note_kernels

TOKENS, DIM = 200, 64
PRESETS = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}
OPS = (
    plain_layer_ops.run_op,
    plain_layer_ops.run_op_backward,
)

pytestmark = pytest.mark.unmeasured


@pytest.fixture(autouse=True)
def _emulated(fused_on_cpu, monkeypatch):
    note_kernels(monkeypatch.setattr)
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    recordings.clear()
    monkeypatch.setattr(recordings, "_steps", recordings._Steps())
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """Names of what runs step by step, as it does."""
    found = []

    def count(name):
        function = getattr(schedule, name)

        def counted(*args, **kwargs):
            found.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(plain_layer, name, counted)

    count("run_forward")
    count("run_backward")
    return found


def recorded() -> set:
    """The functions of which there are recordings."""
    return {form[0][0] for form in recordings._recordings}


def make_layers(mode="token", layers=1, **options):
    torch.manual_seed(0)
    options |= dict(backend="fused", dtype=torch.float64)
    make = nsa.NativeSparseAttention
    return Stack(make(DIM, 4, 2, PRESETS[mode](), **options) for _ in range(layers))


class Stack(torch.nn.ModuleList):
    def forward(self, x, *boundaries):
        for layer in self:
            x = x + layer(x, *boundaries)
        return x


def a_step(call, model, x, *boundaries) -> list[torch.Tensor]:
    """The output, and all gradients."""
    x = x.clone().requires_grad_()
    y = call(x, *boundaries)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def assert_same(compiled, model, x, *boundaries, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(recordings, "ENABLED", True)
        got = a_step(compiled, model, x, *boundaries)
    wanted = a_step(model, model, x, *boundaries)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", PRESETS)
def test_from_the_third_step_on_no_op_runs_step_by_step(mode, runs, monkeypatch):
    model = make_layers(mode, layers=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for turn in range(4):
        x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
        monkeypatch.setattr(recordings, "ENABLED", True)
        runs.clear()
        got = a_step(compiled, model, x)
        # Two layers step by step; the first of the second step is rehearsed and recorded.
        assert len(runs) == (4, 4, 0, 0)[turn]
        assert recorded() == (set(OPS) if turn else set())
        monkeypatch.setattr(recordings, "ENABLED", False)
        torch.testing.assert_close(got, a_step(model, model, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "form"), [("token", "packing"), ("tile", "bare")])
def test_boundaries_of_a_form_share_a_recording(mode, form, monkeypatch):
    """Also of other longest sequences; and of a Packing, of other numbers of sequences."""
    model = make_layers(mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    last = [175, 25, 0] + [0] * (form == "packing")
    for turn, lengths in enumerate(([150, 1, 49], [20, 140, 40], [0, 30, 170], last)):
        bounds = make_cu_seqlens(lengths)
        extra = (nsa.Packing(bounds),) if form == "packing" else (bounds, max(lengths))
        x = torch.randn(TOKENS, DIM, dtype=torch.float64)
        # The bound of bare tensors becomes dynamic in the second step.
        at_most = 0 if form == "packing" else 1
        with torch._dynamo.config.patch(error_on_recompile=turn > at_most):
            assert_same(compiled, model, x, *extra, monkeypatch=monkeypatch)
        assert recorded() == (set(OPS) if turn else set())
        assert len(recordings._recordings) == (len(OPS) if turn else 0)


class Twice(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


CHANGES = {
    "forward": lambda layer: setattr(layer.gate_mlp[1], "forward", torch.tanh),
    "forward of a linear": lambda layer: setattr(
        layer.k_proj, "forward", lambda x: 2 * torch.nn.Linear.forward(layer.k_proj, x)
    ),
    "activation": lambda layer: setattr(layer.gate_mlp, "1", torch.nn.Tanh()),
    "bias": lambda layer: setattr(layer, "k_proj", torch.nn.Linear(DIM, 32, dtype=torch.float64)),
    "wrapper": lambda layer: setattr(
        layer, "o_proj", torch.nn.Sequential(layer.o_proj, torch.nn.Tanh())
    ),
    "subclass": lambda layer: setattr(
        layer.compress_k.mlp, "2", Twice(*layer.compress_k.mlp[2].weight.shape[::-1]).double()
    ),
    "none": lambda layer: (
        setattr(layer, "gate_mlp", None)
        or setattr(layer, "gate_proj_weight", torch.nn.Parameter(torch.randn(4, 3, 16).double()))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_module_compiles_again(change):
    layer = make_layers()[0]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    first = compiled(x)
    torch.testing.assert_close(first, layer(x), rtol=1e-10, atol=1e-10)
    CHANGES[change](layer)
    got = compiled(x)
    assert not torch.equal(got, first)
    torch.testing.assert_close(got, layer(x), rtol=1e-10, atol=1e-10)


def test_a_compiled_layer_looks_at_few_attributes():
    """Before each call: at types and parameters, not at hooks and the like of each module."""
    layer = make_layers()[0]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(torch.randn(1, TOKENS, DIM, dtype=torch.float64))
    (entry,) = _debug_get_cache_entry_list(type(layer).forward.__code__)
    guards = str(entry.guard_manager)
    assert "q_proj" in guards
    assert "_forward_hooks" not in guards
    torch._dynamo.reset()  # PyTorch's own modules share code too, whatever hooks they have
    hooked = make_layers()[0]
    calls = []
    hooked.v_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.compile(hooked, backend="eager")(torch.randn(1, TOKENS, DIM, dtype=torch.float64))
    assert calls


def test_layers_that_save_other_numbers_of_tensors(monkeypatch):
    """But are told apart by no argument of the op."""
    models = [make_layers(separate_kv=separate) for separate in (False, True)]
    compiled = [torch.compile(x, fullgraph=True, backend="aot_eager") for x in models]
    for _ in range(3):
        for call, model in zip(compiled, models, strict=True):
            x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
            assert_same(call, model, x, monkeypatch=monkeypatch)
    assert len(recordings._recordings) == 2 * len(OPS)


def test_a_form_of_one_step_is_not_recorded(monkeypatch):
    """As where each step has another number of tokens."""
    # What is not in the ops takes Dynamo long with symbols for sizes.
    model = make_layers(layers=2, compressor="mean", rope_theta=None)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(recordings, "ENABLED", True)
    for tokens in (TOKENS, TOKENS + 70, TOKENS + 133):
        a_step(compiled, model, torch.randn(1, tokens, DIM, dtype=torch.float64))
    assert not recorded()


def test_without_gradients(runs, monkeypatch):
    model = make_layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(recordings, "ENABLED", True)
    for turn in range(3):
        x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
        runs.clear()
        with torch.no_grad():
            y = compiled(x)
        assert len(runs) == (1, 2, 0)[turn]
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(recordings, "ENABLED", False)
            torch.testing.assert_close(y, model(x), rtol=1e-10, atol=1e-10)


def test_nothing_is_recorded_where_nothing_may_be_kept(monkeypatch):
    """So it is while a graph is captured, and in the calls of reduce-overhead before that."""
    model = make_layers()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(recordings, "may_keep", lambda _: False)
    for _ in range(3):
        x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
        assert_same(compiled, model, x, monkeypatch=monkeypatch)
    assert not recordings._recordings


@pytest.mark.parametrize("mode", PRESETS)
def test_under_autocast_and_with_frozen_parameters(mode, monkeypatch):
    """The one op before attention computes in autocast's dtype, and gives gradients in that of the
    parameters."""
    torch.manual_seed(0)
    model = nsa.NativeSparseAttention(DIM, 4, 2, PRESETS[mode](), backend="fused")
    for p in (model.compress_k.mlp[0].weight, model.compress_v.position):
        p.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, TOKENS, DIM)
        found = []
        for call, enabled in ((model, False), (compiled, True)):
            monkeypatch.setattr(recordings, "ENABLED", enabled)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = call(x)
            y.float().square().sum().backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            assert all(
                (g is None) != model.get_parameter(name).requires_grad for name, g in grads.items()
            )
            found.append([y.detach(), *(g for g in grads.values() if g is not None)])
        torch.testing.assert_close(*found)
    assert recorded() == set(OPS)


@pytest.mark.parametrize("mode", PRESETS)
def test_a_packing_keeps_the_plan_of_all_layers(mode, monkeypatch):
    """One of their forwards, and one of their backwards."""
    launches = count_plan_kernels(monkeypatch.setattr)
    model = make_layers(mode, layers=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packings = [
        nsa.Packing(make_cu_seqlens(x)) for x in ([150, 1, 49], [20, 140, 40], [0, 30, 170])
    ]
    for turn, packing in enumerate((*packings, packings[2], packings[1])):
        x = torch.randn(TOKENS, DIM, dtype=torch.float64)
        launches.clear()
        monkeypatch.setattr(recordings, "ENABLED", True)
        got = a_step(compiled, model, x, packing)
        if turn > 1:
            assert launches == (dict(sequence_bounds=2, plan_tables=2) if turn == 2 else {})
        monkeypatch.setattr(recordings, "ENABLED", False)
        wanted = a_step(model, model, x, packing)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
