"""The layer with wrapped, replaced and quantised linear layers, of any dtypes."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.nn.utils import parametrizations, prune

import nsa
from nsa.layers import BlockCompressor
from nsa.testing import make_cu_seqlens

DIM, HEADS, KV_HEADS = 32, 4, 2
# All blocks of 40 tokens are selected, so that rounding cannot change what is attended.
CONFIG = nsa.NSAConfig.paper(
    compress_block_size=8,
    compress_stride=4,
    select_block_size=8,
    num_selected_blocks=5,
    window_size=6,
)
LINEARS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_mlp.0", "gate_mlp.2"),
    *("compress_k.mlp.0", "compress_k.mlp.2", "compress_v.mlp.0", "compress_v.mlp.2"),
]
CPU = torch.device("cpu")


def make_layer(**options):
    return nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, CONFIG, backend="reference", **options)


def replace(layer, names, wrap):
    """The layer itself, with ``wrap(linear)`` for its linear layers of these names."""
    for name in names:
        layer.set_submodule(name, wrap(layer.get_submodule(name)))
    return layer


class Bfloat16Unit(nn.Module):
    """Computes in bfloat16 whatever it gets, as an FSDP unit of its own does."""

    def __init__(self, linear):
        super().__init__()
        self.inner = copy.deepcopy(linear).bfloat16()

    def forward(self, x):
        return self.inner(x.bfloat16())

    def effective(self):
        return self.inner.weight.float()


class LowRank(nn.Sequential):
    """Two linear layers, no ``weight``, and no dtype but its own."""

    def __init__(self, linear):
        super().__init__(nn.Linear(linear.in_features, 3, bias=False), copy.deepcopy(linear))
        self[1].weight = nn.Parameter(torch.randn(linear.out_features, 3) * 0.5)

    def effective(self):
        return self[1].weight @ self[0].weight


class Lora(nn.Module):
    """A frozen linear layer and a learned low-rank difference."""

    def __init__(self, linear):
        super().__init__()
        self.base = copy.deepcopy(linear).requires_grad_(False)
        self.difference = nn.Sequential(
            nn.Linear(linear.in_features, 3, bias=False),
            nn.Linear(3, linear.out_features, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.difference(x)

    def effective(self):
        return self.base.weight + self.difference[1].weight @ self.difference[0].weight


class Uint8(nn.Module):
    """An 8-bit ``weight``, whose dtype says nothing about that of inputs."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        weight = linear.weight.detach().div(self.scale).round().add(128).to(torch.uint8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.effective(), self.bias)

    def effective(self):
        return (self.weight.float() - 128) * self.scale


def float8_in_place(linear):
    """The linear layer itself, with a float8 weight and a ``forward`` of its own."""
    linear = copy.deepcopy(linear)
    linear.weight.requires_grad_(False).data = linear.weight.data.to(torch.float8_e4m3fn)
    linear.effective = linear.weight.float
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.float(), linear.bias)
    return linear


class Int8Tensor(torch.Tensor):
    """8-bit values of scale 1/100, whose products are float32."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        return func(*(arg.dequantised() if isinstance(arg, cls) else arg for arg in args))

    def dequantised(self):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).float() / 100


def int8_tensor(linear):
    """The linear layer itself, whose weight alone is replaced."""
    weight = linear.weight.detach().mul(100).round().clamp(-127, 127).to(torch.int8)
    linear.weight = nn.Parameter(weight.as_subclass(Int8Tensor), requires_grad=False)
    linear.effective = linear.weight.dequantised
    return linear


KINDS = {
    "bfloat16": Bfloat16Unit,
    "low-rank": LowRank,
    "lora": Lora,
    "uint8": Uint8,
    "float8": float8_in_place,
    "int8-tensor": int8_tensor,
}


def plain_equivalent(layer):
    """A layer of plain float32 linears whose weights are the effective ones of ``layer``."""
    plain = make_layer()
    for name, parameter in plain.named_parameters():
        parent, _, leaf = name.rpartition(".")
        module = layer.get_submodule(parent)
        if leaf == "weight":
            value = module.effective() if hasattr(module, "effective") else module.weight
        elif isinstance(module, Bfloat16Unit):
            value = module.inner.bias
        else:
            value = getattr(module[1] if isinstance(module, LowRank) else module, leaf, None)
            value = module.base.bias if value is None else value
        parameter.data.copy_(value.detach())
    return plain


def assert_equivalent(layer, tolerance):
    """``layer`` computes what plain linears of its effective weights do, and has gradients."""
    plain = plain_equivalent(layer)
    x = torch.randn(2, 40, DIM)
    results = []
    for each in (layer, plain):
        hidden = x.clone().requires_grad_()
        y = each(hidden)
        y.float().square().sum().backward()
        results.append((y.float(), hidden.grad / 10))
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert torch.equal(layer.select_blocks(x), plain.select_blocks(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [*([name] for name in LINEARS), LINEARS], ids=[*LINEARS, "all"])
def test_replaced_linears(names, kind):
    tolerance = 0.1 if kind == "bfloat16" else 1e-4
    assert_equivalent(replace(make_layer(), names, KINDS[kind]), tolerance)


def test_any_combination_of_replaced_linears():
    draw = random.Random(14)
    for _ in range(25):
        layer = make_layer()
        for name in LINEARS:
            kind = draw.choice([None, *KINDS])
            if kind is not None:
                replace(layer, [name], KINDS[kind])
        assert_equivalent(layer, 0.1)


def assert_steps_equal_one_call(layer, dtype, tolerance):
    """With the cache that the layer makes by itself."""
    x = torch.randn(2, 40, DIM)
    cache = layer.make_cache(2, 40)
    assert cache.dtype == dtype
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in x.split([17, 1, 22], 1)]
        wanted = layer(x)
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", [["q_proj"], ["v_proj"], LINEARS], ids=["q", "v", "all"])
def test_cache_of_replaced_linears(names, kind):
    narrow = kind == "bfloat16" and names is LINEARS
    dtype = torch.bfloat16 if narrow else torch.float32
    tolerance = 0.1 if kind == "bfloat16" else 1e-4
    assert_steps_equal_one_call(replace(make_layer(), names, KINDS[kind]), dtype, tolerance)


def test_low_rank_linears_after_projections_in_bfloat16():
    layer = replace(make_layer(), LINEARS[:3], Bfloat16Unit)
    assert_equivalent(replace(layer, LINEARS[3:], LowRank), 0.1)


# With one process FSDP1 warns that it does not shard. FSDP2 warns of modules that return views, as
# linear layers with a bias do.
@pytest.mark.filterwarnings("ignore:FSDP:UserWarning")
@pytest.mark.parametrize("names", [["q_proj"], LINEARS[:3], LINEARS], ids=["q", "qkv", "all"])
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_units_in_mixed_precision(mesh, version, names):
    def wrap(linear):
        if version == 1:
            precision = MixedPrecision(param_dtype=torch.bfloat16)
            return FullyShardedDataParallel(linear, device_id=CPU, mixed_precision=precision)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        return fully_shard(linear, mesh=mesh, mp_policy=policy)

    layer = make_layer()
    x = torch.randn(2, 40, DIM)
    wanted = layer(x)
    replace(layer, names, wrap)
    found = layer(x)
    assert found.dtype == (torch.bfloat16 if "o_proj" in names else torch.float32)
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    packed = layer(x.flatten(0, 1), make_cu_seqlens([40, 40]))
    torch.testing.assert_close(packed, found.flatten(0, 1), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_quantize_dynamic_with_a_cache(compressor):
    """With the mean compressor no parameter is left."""
    with warnings.catch_warnings(action="ignore"):  # deprecations
        layer = torch.ao.quantization.quantize_dynamic(
            make_layer(compressor=compressor), {nn.Linear}
        )
    # It quantises activations of each call by their own range.
    assert_steps_equal_one_call(layer, torch.float32, 0.2)


def test_quantize_dynamic():
    layer = make_layer()
    with warnings.catch_warnings(action="ignore"):  # deprecations
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert all(type(quantised.get_submodule(name)) is not nn.Linear for name in LINEARS)
    x = torch.randn(2, 40, DIM)
    wanted = layer(x)
    assert (quantised(x) - wanted).norm() < 0.1 * wanted.norm()
    assert torch.equal(quantised.select_blocks(x), layer.select_blocks(x))


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "compress_k.mlp.0"])
def test_reparametrised_linears(name):
    layer = make_layer()
    x = torch.randn(2, 40, DIM)
    wanted = layer(x)
    parametrizations.weight_norm(layer.get_submodule(name))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    pruned = make_layer()
    prune.random_unstructured(pruned.get_submodule(name), "weight", 0.5)
    pruned(x).sum().backward()
    assert pruned.get_submodule(name).weight_orig.grad.count_nonzero() > 0


def test_values_in_different_dtypes_are_attended_in_the_widest():
    layer = replace(make_layer(), ["q_proj"], Bfloat16Unit)
    q, k, v, compressed = layer._project(torch.randn(2, 40, DIM), None, None)
    assert {x.dtype for x in (q, k, v, *compressed)} == {torch.float32}
    replace(layer, ["k_proj", "v_proj"], Bfloat16Unit)
    q, k, v, compressed = layer._project(torch.randn(2, 40, DIM), None, None)
    assert {x.dtype for x in (q, k, v, *compressed)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["uint8", "lora", "bfloat16"])
@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_wrapped_projections_under_autocast(kind, gate):
    layer = make_layer(gate=gate)
    layer.set_submodule("q_proj", KINDS[kind](layer.q_proj))
    x = torch.randn(2, 40, DIM)
    exact = layer(x)

    def no_autocast(x):
        with torch.autocast("cpu", enabled=False):
            return inner(x)

    # Returns float32 under autocast too.
    inner, layer.k_proj.forward = layer.k_proj.forward, no_autocast
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, compressed = layer._project(x, None, None)
        close = layer(x)
    assert {x.dtype for x in (q, k, v, *compressed)} == {torch.bfloat16}
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.1)


def test_autocast_casts_what_linears_get():
    layer = make_layer().bfloat16()
    x, seen = torch.randn(2, 40, DIM), []
    layer.compress_k.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == torch.float16
        assert torch.equal(layer.gate_mlp(x), nn.Sequential(*layer.gate_mlp)(x))
    assert seen == [torch.float16]


def test_autocast_leaves_float64_alone():
    layer = make_layer().double()
    x = torch.randn(2, 40, DIM, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_input_of_another_dtype_is_refused_where_the_projection_is_plain():
    x = torch.randn(2, 40, DIM, dtype=torch.float64)
    message = "x must have the dtype of the weights, torch.float32, got torch.float64"
    with pytest.raises(TypeError, match=message):
        make_layer()(x)
    # A hook, a wrapper or a forward of its own may cast.
    layer = make_layer()
    layer.k_proj, layer.v_proj = (replace(make_layer(), ["k_proj"], Bfloat16Unit).k_proj,) * 2
    layer.gate_mlp = layer.gate_mlp.double()
    layer.q_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    assert layer(x).isfinite().all()


def test_compressor_takes_blocks_of_another_dtype():
    compressor = BlockCompressor(8, 6)
    blocks = torch.randn(5, 8, 2, 6)
    torch.testing.assert_close(
        compressor(blocks.bfloat16()), compressor(blocks), rtol=0.05, atol=0.05
    )
