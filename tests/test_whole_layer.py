"""A layer of plain modules gives as a whole what the modules would, and leaves modules that do more
to be called."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import nsa
from nsa import whole_layer
from nsa.fused import plain_layer
from nsa.fused.layer_call import LayerInputs, LayerSaved
from nsa.testing import make_cu_seqlens
from nsa.whole_layer import run_whole
from tests.helpers.counted_operations import CountedOperations, count_kernel_calls

DIM, HEADS, TOKENS = 64, 4, 96
MODULES = {
    "default": {},
    "q": {"gate": "q"},
    "separate": {"separate_kv": True},
    "mean": {"compressor": "mean", "gate": "q"},
    "separate mean": {"separate_kv": True, "compressor": "mean"},
    # Heads that the kernels take with zeros, and a bias of the output alone.
    "wide": {"head_dim": 48, "o_bias": True},
}


def make_layer(dtype=torch.float64, kv_heads=2, o_bias=False, **options):
    torch.manual_seed(0)
    config = nsa.NSAConfig.paper(num_selected_blocks=4)
    options = {"backend": "fused"} | options
    layer = nsa.NativeSparseAttention(DIM, HEADS, kv_heads, config, dtype=dtype, **options)
    if o_bias:
        layer.o_proj.bias = nn.Parameter(torch.empty(DIM, dtype=dtype))
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return layer


def new_input(packed=False, dtype=torch.float64):
    return torch.randn(*((TOKENS,) if packed else (2, TOKENS)), DIM, dtype=dtype)


def with_modules(layer):
    """The layer, whose modules must be called."""
    for module in layer.modules():
        if module is not layer:
            module.register_forward_hook(lambda *_: None)
    return layer


def with_gradients(layer, x, *extra) -> dict[str, torch.Tensor]:
    """The output, and the gradients that are wanted."""
    y = layer(x, *extra)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    named = {"x": x, **dict(layer.named_parameters())}
    wanted = {name: t for name, t in named.items() if t.requires_grad}
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    return dict(zip(("y", *wanted), (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_results_are_those_of_the_modules(options, packed, fused_on_cpu):
    layer, x = make_layer(**options), new_input(packed).requires_grad_()
    extra = (nsa.Packing(make_cu_seqlens([60, 1, 35])),) if packed else (None,)
    assert run_whole(layer, x, *extra, None) is not None
    whole = with_gradients(layer, x, *extra)
    calls = []
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert run_whole(layer, x, *extra, None) is None
    torch.testing.assert_close(whole, with_gradients(layer, x, *extra), rtol=1e-9, atol=1e-10)
    assert len(calls) == sum(isinstance(m, nn.Linear) for m in layer.modules())


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_blocks_are_selected_from_what_is_attended(options, packed, fused_on_cpu, monkeypatch):
    layer, x = make_layer(**options), new_input(packed)
    extra = (nsa.Packing(make_cu_seqlens([60, 1, 35])),) if packed else ()
    modules = with_modules(make_layer(**options)).select_blocks(x, *extra)
    monkeypatch.setattr(layer, "_heads", None)  # no modules are called
    assert torch.equal(layer.select_blocks(x, *extra), modules)


def test_sequences_too_short_for_a_block(fused_on_cpu):
    layer, x = make_layer(), new_input(packed=True).requires_grad_()
    for lengths in ([31] * 3 + [3], [1] * TOKENS):
        bounds = nsa.Packing(make_cu_seqlens(lengths))
        assert run_whole(layer, x, bounds, None) is not None
        whole = with_gradients(layer, x, bounds)
        modules = with_gradients(with_modules(make_layer()), x, bounds)
        torch.testing.assert_close(whole, modules, rtol=1e-9, atol=1e-10)
        assert layer.select_blocks(x, bounds).shape[0] == TOKENS


TRAINED = {
    "all": lambda name: True,
    "none": lambda name: False,
    "but keys and a compressor": lambda name: not name.startswith(("k_proj", "compress_v")),
    "gates and compressors": lambda name: name.startswith(("gate", "compress")),
    "last": lambda name: name.startswith("o_proj"),
    "values": lambda name: name.startswith("v_proj"),
    "biases": lambda name: name.endswith("bias"),
}


@pytest.mark.parametrize("of_x", [True, False], ids=["x", "not x"])
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("options", [{}, {"separate_kv": True, "gate": "q"}], ids=["one", "three"])
def test_gradients_that_are_wanted(options, trained, of_x, fused_on_cpu):
    """And no others, each in memory of its own."""
    layer, x = make_layer(**options), new_input().requires_grad_(of_x)
    for name, p in layer.named_parameters():
        p.requires_grad_(TRAINED[trained](name))
    if not any(t.requires_grad for t in (x, *layer.parameters())):
        assert not layer(x).requires_grad
        return
    whole = with_gradients(layer, x)
    for name, gradient in whole.items():
        assert gradient.untyped_storage().nbytes() == gradient.nbytes, name
    torch.testing.assert_close(whole, with_gradients(with_modules(layer), x), rtol=1e-9, atol=1e-9)


def test_what_is_frozen_costs_nothing(fused_on_cpu, monkeypatch):
    """Products and bytes that are kept."""
    calls = count_kernel_calls(monkeypatch)
    monkeypatch.setattr(whole_layer, "is_traced", lambda *_: False)
    found = {}
    for name in ("all", "none", "gates and compressors", "last"):
        layer, kept = make_layer(), {}
        for key, p in layer.named_parameters():
            p.requires_grad_(TRAINED[name](key))
        x = new_input().requires_grad_(name != "last")

        def keep(t, kept=kept):
            kept[t.untyped_storage()._cdata] = t.nbytes
            return t

        with CountedOperations(calls) as counted, saved_tensors_hooks(keep, lambda t: t):
            layer(x).sum().backward()
        products = ("mm", "addmm", "bmm", "baddbmm")
        found[name] = sum(counted.launches[p] for p in products), sum(kept.values())
    products, nbytes = zip(*found.values(), strict=True)
    # The product of all projections, the gates, two of the compressors, and the output; for each
    # two in backward, one of which is of a weight.
    assert products[:3] == (5 + 10, 5 + 5, 5 + 9)
    out = 2 * TOKENS * DIM * 8
    assert nbytes[1] == nbytes[2] == nbytes[0] - out
    assert nbytes[3] < nbytes[0] / 4


def test_autocast(fused_on_cpu):
    layer, x = make_layer(torch.float32), new_input(dtype=torch.float32).requires_grad_()
    results = []
    for each in (layer, with_modules(make_layer(torch.float32))):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(with_gradients(each, x))
    for name, got in results[0].items():
        wanted = results[1][name]
        assert got.dtype == wanted.dtype
        assert (got - wanted).norm() <= 2e-2 * wanted.norm() + 1e-3, name


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "rope_theta", None),
        lambda layer: setattr(layer, "recompute", True),
        lambda layer: setattr(layer, "backend", "reference"),
        lambda layer: setattr(layer, "backend", "auto"),
        lambda layer: setattr(layer, "k_proj", nn.Linear(DIM, 32, dtype=torch.float64)),
        lambda layer: setattr(layer, "v_proj", nn.Linear(DIM, 32, bias=False)),
        lambda layer: setattr(layer.gate_mlp, "forward", lambda x: x),
        lambda layer: layer.gate_mlp[0].register_full_backward_hook(lambda *_: None),
        lambda layer: setattr(layer.gate_mlp[0], "bias", None),
        lambda layer: setattr(layer.compress_k.mlp, "1", nn.ReLU()),
        lambda layer: setattr(layer.compress_v, "mlp", layer.compress_v.mlp[:2]),
        lambda layer: setattr(layer, "compress_v", None),
        lambda layer: setattr(layer, "head_dim", 8),
    ],
    ids=[
        *("no rope", "recompute", "reference", "on a CPU", "bias", "dtype", "forward", "hook"),
        *("no bias", "activation", "compressor", "one compressor", "sizes"),
    ],
)
def test_what_must_be_called(change, fused_on_cpu, monkeypatch):
    layer, x = make_layer(), new_input()
    assert run_whole(layer, x, None, None) is not None
    change(layer)
    # As where there is no GPU.
    monkeypatch.setattr(nsa.fused.constraints, "_device_limit", lambda _: "a limit")
    if layer.backend == "fused":
        monkeypatch.undo()
    assert run_whole(layer, x, None, None) is None


def test_compressors_that_are_not_alike(fused_on_cpu):
    layer, x = make_layer(), new_input()
    layer.compress_v.mlp[0] = nn.Linear(32 * 16, 48, dtype=torch.float64)
    layer.compress_v.mlp[2] = nn.Linear(48, 16, dtype=torch.float64)
    assert run_whole(layer, x, None, None) is None
    assert layer(x).isfinite().all()


def test_wrong_sizes_fail_as_without(fused_on_cpu):
    """As many rows in all: keys would lie where values are read."""
    layer, x = make_layer(), new_input()
    layer.k_proj = nn.Linear(DIM, 48, bias=False, dtype=torch.float64)
    layer.v_proj = nn.Linear(DIM, 16, bias=False, dtype=torch.float64)
    assert run_whole(layer, x, None, None) is None
    with pytest.raises(RuntimeError, match="unflatten"):
        layer(x)


def test_nothing_keeps_the_product(fused_on_cpu):
    """What is kept for backward are tensors of their own, but for both compressed ones."""
    kept = []
    layer, x = make_layer(), new_input().requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    assert type(y.grad_fn).__name__.startswith("PlainLayerNode")
    for t in kept:
        assert t.untyped_storage().nbytes() <= 2 * t.nbytes
        assert t.nbytes < 2 * TOKENS * DIM * 8 or t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize("keep", [False, True], ids=["freed", "kept"])
def test_what_attention_does_not_need_is_freed_before_its_backward(keep, fused_on_cpu, monkeypatch):
    """The output of attention, unless there may be another backward."""
    alive, run_backward = [], plain_layer.run_backward

    def spy(*args):
        alive.append(not out.expired())
        return run_backward(*args)

    monkeypatch.setattr(plain_layer, "run_backward", spy)
    layer, x = make_layer(), new_input().requires_grad_()
    y = layer(x)
    at = len(LayerInputs._fields) + LayerSaved._fields.index("out")
    out = StorageWeakRef(y.grad_fn.saved_tensors[at].untyped_storage())
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=keep)
    assert alive == [keep]
    if keep:
        second = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
        assert alive == [True, False]
        assert all(map(torch.equal, first, second))


def test_gradients_are_of_the_weights_that_the_call_had(fused_on_cpu):
    layer, x = make_layer(), new_input().requires_grad_()
    wanted = with_gradients(layer, x)["x"]
    y = layer(x)
    for p in layer.parameters():
        p.data = torch.zeros_like(p)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], wanted)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_gradients_are_of_the_boundaries_that_the_call_had(options, fused_on_cpu):
    layer, x = make_layer(**options), new_input(packed=True).requires_grad_()
    results = []
    for changes in (False, True):
        bounds = make_cu_seqlens([60, 1, 35])
        y = layer(x, bounds, TOKENS)
        assert type(y.grad_fn).__name__.startswith("PlainLayerNode")
        if changes:
            bounds.copy_(make_cu_seqlens([1, 94, 1]))
        results.append(torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]))
    assert all(map(torch.equal, *results))


def test_parts_of_a_subclass_are_computed(fused_on_cpu):
    class Same(nsa.NativeSparseAttention):
        def extra_repr(self):
            return "the same"

    class Negative(nsa.NativeSparseAttention):
        def _heads(self, x):
            q, keys, values = super()._heads(x)
            return -q, keys, tuple(-v for v in values)

    layer, x = make_layer(compressor="mean", gate="q"), new_input()
    wanted, blocks = layer(x), layer.select_blocks(x)
    with torch.no_grad():
        layer.gate_proj_weight.neg_()
        layer.k_proj.weight.neg_()
    for kind in (Same, Negative):
        layer.__class__ = kind
        assert (run_whole(layer, x, None, None) is None) == (kind is Negative)
    torch.testing.assert_close(layer(x), -wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(layer.select_blocks(x), blocks)


def test_no_second_derivative(fused_on_cpu):
    layer, x = make_layer(), new_input().requires_grad_()
    grads = torch.autograd.grad(layer(x).sum(), [x, layer.q_proj.weight], create_graph=True)
    assert torch.equal(grads[0], torch.autograd.grad(layer(x).sum(), x)[0])
    for grad in grads:
        with pytest.raises(nsa.UnsupportedError, match="differentiated once"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_transforms_get_the_error_of_nsa(backend, fused_on_cpu):
    layer, x = make_layer(backend=backend), new_input()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with pytest.raises(nsa.UnsupportedError, match="transforms"):
        torch.func.grad(loss)(parameters)
    with pytest.raises(nsa.UnsupportedError, match="transforms"):
        torch.func.vmap(layer)(x[None])


def test_second_derivatives_of_the_reference():
    layer = make_layer(backend="reference", compressor="mean")
    x = new_input().requires_grad_()
    results = []
    for each in (layer, with_modules(make_layer(backend="reference", compressor="mean"))):
        (dx,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(each.parameters())))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
