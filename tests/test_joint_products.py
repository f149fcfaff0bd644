"""Joint products give what the modules would, and leave modules that do more to be called."""

import pytest
import torch
from torch import nn

import nsa
from nsa.fused import layer_ops
from nsa.joint_products import parameters_of_both, project_jointly
from nsa.testing import make_cu_seqlens
from tests.helpers.counted_operations import CountedOperations, count_kernel_calls

DIM, HEADS, TOKENS = 64, 4, 96
MODULES = {
    "default": {},
    "values": {"value_head_dim": 8},
    "separate": {"separate_kv": True, "gate": "q"},
    "mean": {"compressor": "mean"},
}


def make_layer(dtype=torch.float64, kv_heads=2, **options):
    torch.manual_seed(0)
    config = nsa.NSAConfig.paper(num_selected_blocks=4)
    layer = nsa.NativeSparseAttention(DIM, HEADS, kv_heads, config, dtype=dtype, **options)
    for module in layer.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return layer


def with_gradients(layer, x, *extra) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x, *extra)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy)
    return dict(zip(("y", "x", *names), (y.detach(), *gradients), strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES.keys())
def test_results_are_those_of_the_modules(options, packed, fused_on_cpu):
    layer = make_layer(backend="fused", **options)
    x = torch.randn(*((TOKENS,) if packed else (2, TOKENS)), DIM, dtype=torch.float64)
    extra = (nsa.Packing(make_cu_seqlens([60, 1, 35])),) if packed else ()
    assert project_jointly(layer, x) is not None
    joint = with_gradients(layer, x, *extra)
    calls = []
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: calls.append(1))
    assert project_jointly(layer, x) is None
    torch.testing.assert_close(joint, with_gradients(layer, x, *extra), rtol=1e-9, atol=1e-11)
    assert len(calls) == sum(isinstance(m, nn.Linear) for m in layer.modules())


def test_parts_of_the_heads_have_their_positions(fused_on_cpu):
    layer = make_layer(backend="fused")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    joint = with_gradients(layer, x)
    layer.compress_v.register_forward_hook(lambda *_: None)
    assert project_jointly(layer, x) is not None
    torch.testing.assert_close(joint, with_gradients(layer, x), rtol=1e-9, atol=1e-11)


def test_a_step_has_half_the_products(fused_on_cpu, monkeypatch):
    calls = count_kernel_calls(monkeypatch)
    monkeypatch.setattr(layer_ops, "is_traced", lambda *_: False)
    layer = make_layer(backend="fused")
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    counts = []
    for _ in range(2):
        with CountedOperations(calls) as counted:
            layer(x).sum().backward()
        products = ("mm", "addmm", "bmm", "baddbmm")
        counts.append(sum(counted.launches[name] for name in products))
        for module in layer.modules():
            module.register_forward_hook(lambda *_: None)
    assert counts == [15, 30]


def test_autocast(fused_on_cpu):
    layer = make_layer(torch.float32, backend="fused")
    x = torch.randn(1, TOKENS, DIM)
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(with_gradients(layer, x))
        layer.q_proj.register_forward_hook(lambda *_: None)
        layer.compress_k.register_forward_hook(lambda *_: None)
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
    ],
    ids=["no rope", "recompute", "reference", "on a CPU", "bias", "dtype", "forward", "hook"],
)
def test_what_is_not_joint(change):
    layer = make_layer(backend="fused")
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    assert project_jointly(layer, x) is not None
    change(layer)
    assert project_jointly(layer, x) is None


def test_wrong_sizes_fail_as_without(fused_on_cpu):
    """As many rows in all: keys would lie where values are read."""
    layer = make_layer(backend="fused")
    layer.k_proj = nn.Linear(DIM, 48, bias=False, dtype=torch.float64)
    layer.v_proj = nn.Linear(DIM, 16, bias=False, dtype=torch.float64)
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    assert project_jointly(layer, x) is None
    with pytest.raises(RuntimeError, match="unflatten"):
        layer(x)


@pytest.mark.parametrize("frozen", [(), ("k_proj", "compress_v")])
def test_each_gradient_has_memory_of_its_own(frozen, fused_on_cpu):
    layer = make_layer(backend="fused")
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    layer(x).square().sum().backward()
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    for p in trained.values():
        assert p.grad.untyped_storage().nbytes() == p.grad.nbytes
    found = {n: p.grad for n, p in trained.items()}
    layer.zero_grad()
    for module in layer.modules():
        module.register_forward_hook(lambda *_: None)
    layer(x).square().sum().backward()
    for name, p in trained.items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-9)


def test_nothing_keeps_the_product(fused_on_cpu):
    """Parts that are kept for backward are tensors of their own, also without a bias to add."""
    layer = make_layer(backend="fused")
    layer.gate_mlp[0] = nn.Linear(DIM, len(layer.gate_mlp[0].weight), False, dtype=torch.float64)
    kept = []
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert project_jointly(layer, x) is not None
    for tensor in kept:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_compressors_that_are_not_alike():
    layer = make_layer(value_head_dim=8)
    x = torch.randn(1, TOKENS, 2, 16, dtype=torch.float64)
    assert parameters_of_both((layer.compress_k, layer.compress_v), x) is None
    assert parameters_of_both((layer.compress_k, layer.compress_k), x) is not None
    assert parameters_of_both((layer.compress_k, layer.compress_k), x.float()) is None
    layer.compress_k.mlp[1] = nn.ReLU()
    assert parameters_of_both((layer.compress_k, layer.compress_k), x) is None


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_transforms_get_the_error_of_nsa(backend, fused_on_cpu):
    layer = make_layer(backend=backend)
    x = torch.randn(1, 8, DIM, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with pytest.raises(nsa.UnsupportedError, match="transforms"):
        torch.func.grad(loss)(parameters)
    with pytest.raises(nsa.UnsupportedError, match="transforms"):
        torch.func.vmap(layer)(x[None])


def test_second_derivatives():
    layer = make_layer(backend="reference", compressor="mean")
    x = torch.randn(1, 40, DIM, dtype=torch.float64, requires_grad=True)
    results = []
    for _ in range(2):
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), list(layer.parameters())))
        layer.q_proj.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
