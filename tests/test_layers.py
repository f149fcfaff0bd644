"""nsa.NativeSparseAttention: shapes, packing, compressor, RoPE, causality, gradients, errors."""

import math

import pytest
import torch

import nsa
from nsa.compressor import BlockCompressor, block_places
from nsa.rope import apply_rope
from nsa.testing import make_cu_seqlens
from tests.helpers.torch_defaults import DEFAULTS, default_dtype

DIM, HEADS, KV_HEADS = 24, 4, 2
# Overlapping compression and short blocks, so that short sequences reach every branch.
TOKEN = nsa.NSAConfig(
    selection="token",
    compress_block_size=8,
    compress_stride=4,
    select_block_size=8,
    num_selected_blocks=3,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=6,
)
TILE = nsa.NSAConfig(
    compress_block_size=4,
    num_selected_blocks=3,
    num_local_blocks=1,
    window_size=6,
    q_tile_size=8,
)
OPTIONS = {
    "default": {},
    "mean": {"compressor": "mean", "rope_theta": None},
    "mean-rope": {"compressor": "mean"},
    "no-rope": {"rope_theta": None},
    "separate": {"separate_kv": True, "bias": True},
    "gate-q": {"gate": "q"},
    "dims": {"head_dim": 10, "value_head_dim": 7},
}


def make_layer(config=TOKEN, dtype=torch.float64, **options):
    layer = nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, config, backend="reference", **options)
    return layer.to(dtype)


@pytest.fixture(params=[TOKEN, TILE], ids=["token", "tile"])
def config(request):
    return request.param


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_parameter_gets_a_gradient(config, options):
    layer = make_layer(config, **options)
    x = torch.randn(2, 37, DIM, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    y.square().mean().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        # A bias of all keys moves every score of a row alike unless RoPE turns it.
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_packed_equals_each_sequence_alone(config, options):
    layer = make_layer(config, **options)
    lengths = [5, 0, 30, 1, 17, 0]
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    packed = layer(x, make_cu_seqlens(lengths), max_seqlen=30)
    alone = torch.cat([layer(part[None])[0] for part in x.split(lengths)])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(packed)
    wanted = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(packed, wanted, cotangent),
        torch.autograd.grad(alone, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_batched_equals_each_sequence_alone(config):
    layer = make_layer(config)
    x = torch.randn(3, 19, DIM, dtype=torch.float64)
    alone = torch.cat([layer(part[None]) for part in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (1, 3)])
def test_short_and_empty_input(config, shape):
    layer = make_layer(config)
    x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("first_tile_summary", [False, True], ids=["token", "tile-first"])
def test_causal(options, first_tile_summary):
    config = TOKEN
    if first_tile_summary:
        config = nsa.NSAConfig(
            compress_block_size=4,
            num_selected_blocks=2,
            window_size=6,
            q_tile_size=8,
            tile_summary="first",
        )
    layer = make_layer(config, **options)
    x = torch.randn(1, 40, DIM, dtype=torch.float64)
    before = layer(x)
    for at in (0, 7, 8, 21, 39):
        changed = x.clone()
        changed[:, at:] += torch.randn_like(changed[:, at:])
        after = layer(changed)
        torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-12)
        assert (after[:, at] - before[:, at]).abs().max() > 1e-6


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_dict_round_trip(options):
    layer = make_layer(**options)
    torch.manual_seed(1)
    other = make_layer(**options)
    x = torch.randn(1, 25, DIM, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_forward_attends_what_select_blocks_returns(config):
    layer = make_layer(config)
    x = torch.randn(2, 37, DIM, dtype=torch.float64)
    indices = layer.select_blocks(x)
    heads = (KV_HEADS,) if config.selection == "token" else (HEADS,)
    units = 37 if config.selection == "token" else 5
    shape = (2, units, *heads, 3) if config.selection == "token" else (2, *heads, units, 3)
    assert indices.shape == shape
    q, k, v, compressed_kv = layer._project(x, None, None)
    gates = layer.gate_mlp(x).sigmoid().unflatten(-1, (HEADS, 3))
    out = nsa.forward(
        q,
        k,
        v,
        config=config,
        gates=gates,
        compressed_kv=compressed_kv,
        block_indices=indices,
        backend="reference",
    )
    torch.testing.assert_close(layer.o_proj(out.flatten(2)), layer(x), rtol=1e-12, atol=1e-12)


def test_compressor_equals_a_loop_over_blocks():
    layer = make_layer(rope_theta=100.0)
    lengths = [21, 3, 0, 8]
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64)
    _, _, _, (k_cmp, v_cmp) = layer._project(x, make_cu_seqlens(lengths), None)
    keys, values, start = [], [], 0
    for length in lengths:
        k = layer.k_proj(x[start : start + length]).unflatten(-1, (KV_HEADS, -1))
        v = layer.v_proj(x[start : start + length]).unflatten(-1, (KV_HEADS, -1))
        for first in range(0, length - 8 + 1, 4):
            for head in range(KV_HEADS):
                block = k[first : first + 8, head] + layer.compress_k.position
                key = layer.compress_k.mlp(block.flatten())
                centre = torch.tensor(first + 3.5)
                keys.append(apply_rope(key[None], centre, 100.0)[0])
                block = v[first : first + 8, head] + layer.compress_v.position
                values.append(layer.compress_v.mlp(block.flatten()))
        start += length
    assert len(keys) == (4 + 0 + 0 + 1) * KV_HEADS
    torch.testing.assert_close(k_cmp.flatten(0, 1), torch.stack(keys), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v_cmp.flatten(0, 1), torch.stack(values), rtol=1e-12, atol=1e-12)


def test_compressor_starts_at_the_scale_of_its_tokens():
    compressor = BlockCompressor(16, 32)
    out = compressor(torch.randn(500, 16, 2, 32))
    assert 0.3 < out.std() < 3


def test_a_sequence_shorter_than_a_block_has_none():
    assert block_places(torch.zeros(1, 3, 1, 2), None, TOKEN, fused=False).blocks == 0


def test_rope_depends_on_the_difference_of_positions():
    q, k = torch.randn(2, 1, 6, dtype=torch.float64).unbind(0)

    def score(a, b):
        positions = torch.tensor([a, b])
        rotated = apply_rope(torch.stack((q, k)), positions, 10000.0)
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(5, 3), score(100_005, 100_003), rtol=1e-9, atol=1e-9)
    assert abs(score(5, 3) - score(5, 2)) > 1e-4
    x = torch.randn(7, 2, 6)
    torch.testing.assert_close(apply_rope(x, torch.zeros(7), 10000.0), x)
    turned = apply_rope(x, torch.arange(7), 10000.0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rope_by_hand():
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    a, b = torch.tensor(3.0), torch.tensor(3.0 / 10.0)  # 100 ** (-2/4) = 1/10
    wanted = [
        1 * a.cos() - 3 * a.sin(),
        2 * b.cos() - 4 * b.sin(),
        3 * a.cos() + 1 * a.sin(),
        4 * b.cos() + 2 * b.sin(),
    ]
    rotated = apply_rope(x[None], torch.tensor([3]), 100.0)
    torch.testing.assert_close(rotated.flatten(), torch.stack(wanted))
    assert apply_rope(x.bfloat16()[None], torch.tensor([3]), 100.0).dtype == torch.bfloat16


def test_autocast_and_bfloat16():
    layer = make_layer(dtype=torch.float32, gate="q")
    x = torch.randn(2, 37, DIM)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        close = layer(x)
    assert close.dtype == torch.bfloat16
    torch.testing.assert_close(close.float(), exact, rtol=0.1, atol=0.1)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def results_and_gradients(layer, x, *packing):
    """Output, gradients of ``x`` and of every parameter, and selected blocks."""
    x = x.clone().requires_grad_()
    y = layer(x, *packing)
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    return [y.detach(), *gradients, layer.select_blocks(x, *packing)]


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize(("compressor", "gate"), [("mlp", "hidden"), ("mean", "q")])
def test_global_defaults_change_nothing(compressor, gate, packed):
    layer = make_layer(dtype=torch.float32, compressor=compressor, gate=gate)
    x = torch.randn(1, 600, DIM)
    arguments = (x[0], make_cu_seqlens([400, 0, 1, 199])) if packed else (x,)
    wanted = results_and_gradients(layer, *arguments)
    for name, context in DEFAULTS.items():
        with context():
            found = results_and_gradients(layer, *arguments)
        assert all(map(torch.equal, found, wanted)), name


@pytest.mark.parametrize("name", DEFAULTS)
def test_global_defaults_leave_positions_past_65536_alone(name):
    layer = make_layer(dtype=torch.float32)
    x = torch.randn(1, 70_000, DIM)
    positions = torch.arange(10**6, 10**6 + 70_000)
    with torch.no_grad():
        q, k, v, compressed = layer._project(x, None, None)
        wanted = q, k, v, *compressed, apply_rope(q, positions, 10000.0)
        with DEFAULTS[name]():
            q, k, v, compressed = layer._project(x, None, None)
            found = q, k, v, *compressed, apply_rope(q, positions, 10000.0)
    assert all(map(torch.equal, found, wanted))
    assert all(x.isfinite().all() for x in found)


# torch.compile looks at the gradients of what it resumes with after the reference, which it skips.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.unmeasured
def test_compiled_packed_layer_on_the_reference():
    """In one mode, because the reference of either is not traced."""
    torch._dynamo.reset()
    layer = make_layer(TOKEN)
    lengths = [30, 1, 0, 29]
    arguments = torch.randn(60, DIM, dtype=torch.float64), make_cu_seqlens(lengths)
    compiled = torch.compile(layer, backend="aot_eager")
    found = results_and_gradients(compiled, *arguments)
    wanted = results_and_gradients(layer, *arguments)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_of_the_boundaries_before_the_caller_changes_them(config, recompute):
    layer, x = make_layer(config, recompute=recompute), torch.randn(60, DIM).double()
    results = []
    for changes in (False, True):
        bounds = make_cu_seqlens([31, 29])
        y = layer(x, bounds, 60)
        if changes:
            bounds.copy_(make_cu_seqlens([2, 58]))
        results.append(torch.autograd.grad(y.sin().sum(), list(layer.parameters())))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_frozen_layer_takes_inference_tensors(config, recompute):
    layer = make_layer(config, recompute=recompute).requires_grad_(False)
    with torch.inference_mode():
        x = torch.randn(2, 30, DIM, dtype=torch.float64)
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_constructor_takes_device_and_dtype(gate):
    arguments = (DIM, HEADS, KV_HEADS, TOKEN)
    layer = nsa.NativeSparseAttention(*arguments, gate=gate)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("cpu", torch.float32)}
    layer = nsa.NativeSparseAttention(*arguments, gate=gate, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    compressor = BlockCompressor(8, 6, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in compressor.parameters()} == {("meta", torch.float64)}
    with default_dtype(torch.float64):
        layer = nsa.NativeSparseAttention(*arguments, gate=gate)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, TOKEN, dtype=dtype),
        lambda dtype: BlockCompressor(8, 6, dtype=dtype),
    ],
    ids=["layer", "compressor"],
)
def test_constructors_refuse_integers(make):
    with pytest.raises(TypeError, match=r"dtype must be one of .*got torch\.int32"):
        make(torch.int32)


@pytest.mark.parametrize("gate", ["hidden", "q"])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_repr_shows_the_options(gate, compressor):
    options = dict(gate=gate, compressor=compressor, recompute=True, max_workspace_bytes=7)
    text = repr(nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, TOKEN, **options))
    for name, value in options.items():
        assert f"{name}={value!r}, " in text


def test_repr_shows_the_sizes():
    text = repr(make_layer(separate_kv=True))
    assert "num_kv_heads=2" in text
    assert "separate_kv=True" in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 2.0}, TypeError, "dim must be an int, got 2.0"),
        ({"num_heads": True}, TypeError, "num_heads must be an int, got True"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide num_heads=4, got 3"),
        ({"dim": 26}, ValueError, "num_heads must divide dim=26 .* got 4"),
        ({"head_dim": -1}, ValueError, "head_dim must be at least 1, got -1"),
        ({"head_dim": 5}, ValueError, "head_dim must be even with rope_theta, got 5"),
        ({"value_head_dim": "8"}, TypeError, "value_head_dim must be an int, got '8'"),
        ({"rope_theta": "10"}, TypeError, "rope_theta must be a float or None, got '10'"),
        ({"separate_kv": "no"}, TypeError, "separate_kv must be a bool, got 'no'"),
        ({"bias": 1}, TypeError, "bias must be a bool, got 1"),
        ({"rope_theta": -1.0}, ValueError, "rope_theta must be finite and positive, got -1.0"),
        ({"rope_theta": 10**400}, ValueError, "rope_theta must be finite and positive, got 1000"),
        ({"rope_theta": math.inf}, ValueError, "rope_theta must be finite and positive, got inf"),
        ({"gate": "x"}, ValueError, r"gate must be one of \('hidden', 'q'\), got 'x'"),
        ({"compressor": 1}, ValueError, r"compressor must be one of .*'mean'\), got 1"),
        ({"backend": "gpu"}, ValueError, r"backend must be one of .*'fused'\), got 'gpu'"),
        ({"device": "gpu"}, ValueError, "device must be one that PyTorch knows, got 'gpu'"),
        ({"config": {}}, TypeError, "config must be an nsa.NSAConfig or None, got dict"),
    ],
)
def test_constructor_errors(change, error, message):
    arguments = {"dim": DIM, "num_heads": HEADS, "num_kv_heads": KV_HEADS} | change
    with pytest.raises(error, match=message):
        nsa.NativeSparseAttention(**arguments)


@pytest.mark.parametrize(
    ("x", "cu_seqlens", "error", "message"),
    [
        ([1.0], None, TypeError, "x must be a tensor, got list"),
        (torch.zeros(5, DIM), None, ValueError, r"x must have shape \(B, N, 24\), got \(5, 24\)"),
        (torch.zeros(1, 5, 8), None, ValueError, r"x must have shape .* got \(1, 5, 8\)"),
        (
            torch.zeros(1, 5, DIM),
            [0, 5],
            ValueError,
            r"x must have shape \(T, 24\) with cu_seqlens",
        ),
        (torch.zeros(5, DIM), [0, 4], ValueError, "cu_seqlens must end at the 5 tokens"),
        (torch.zeros(1, 5, DIM).double(), None, TypeError, "x must have the dtype of the weights"),
        (
            torch.zeros(1, 5, DIM).to_sparse(),
            None,
            TypeError,
            "x must be a dense tensor, got layout",
        ),
        (
            torch.nested.nested_tensor([torch.zeros(5, DIM)], layout=torch.jagged),
            None,
            TypeError,
            r"x must be a dense tensor, got a nested tensor; .* \(T, ...\) with cu_seqlens",
        ),
        (
            torch.zeros(1, 5, DIM, device="meta"),
            None,
            ValueError,
            "x must be on the device of the weights, cpu, got meta",
        ),
    ],
)
def test_forward_errors(x, cu_seqlens, error, message):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(error, match=message):
        make_layer(dtype=torch.float32)(x, cu_seqlens)


def test_autocast_does_not_cast_integers():
    message = "x must have the dtype of the weights, torch.float32, got torch.int64"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        make_layer(dtype=torch.float32)(torch.zeros(1, 5, DIM, dtype=torch.int64))
