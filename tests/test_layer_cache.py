"""The layer with a cache: prompts, chunks, steps and wrong guesses equal one call."""

import random
from itertools import pairwise

import pytest
import torch

import nsa
from nsa import cached_layer, layers
from nsa.testing import make_cu_seqlens
from tests.helpers.decoding import CLOSE, draw_steps
from tests.helpers.small_configs import SMALL

F64 = torch.float64
DIM, HEADS, KV_HEADS = 24, 4, 2
LENGTHS = [41, 0, 67]


def make_layer(config, **options) -> nsa.NativeSparseAttention:
    torch.manual_seed(0)
    sizes = dict(head_dim=8, value_head_dim=6, dtype=F64)
    return nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, config, **(sizes | options))


def whole_outputs(layer, sequences) -> list[torch.Tensor]:
    return [layer(x[None])[0] for x in sequences]


@torch.no_grad()
def assert_decodes(layer, cache, sequences, steps):
    """Each step gives the rows of one call for each sequence."""
    expected = whole_outputs(layer, sequences)
    at = [0] * len(sequences)
    for step in steps:
        parts = []
        for x, start, new, wrong in zip(sequences, at, step.new, step.wrong, strict=True):
            parts += [x[start : start + new], torch.randn(wrong, DIM, dtype=x.dtype)]
        sizes = [new + wrong for new, wrong in zip(step.new, step.wrong, strict=True)]
        tokens = torch.cat(parts)
        if step.batched:
            out = layer(tokens.unflatten(0, (len(sizes), -1)), cache=cache).flatten(0, 1)
        else:
            out = layer(tokens, make_cu_seqlens(sizes), cache=cache)
        for b, part in enumerate(out.split(sizes)):
            end = at[b] + step.new[b]
            torch.testing.assert_close(part[: step.new[b]], expected[b][at[b] : end], **CLOSE)
            at[b] = end
        cache.truncate(at)


@pytest.mark.parametrize("rope_theta", [None, 100.0])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
@pytest.mark.parametrize("separate_kv", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_steps_equal_one_call(name, separate_kv, compressor, rope_theta):
    layer = make_layer(
        SMALL[name], separate_kv=separate_kv, compressor=compressor, rope_theta=rope_theta
    )
    rng = random.Random(f"{name} {separate_kv} {compressor} {rope_theta}")
    sequences = [torch.randn(n, DIM, dtype=F64) for n in LENGTHS]
    cache = layer.make_cache(len(LENGTHS), max(LENGTHS) + 8)
    assert cache.separate_kv == separate_kv
    assert_decodes(layer, cache, sequences, draw_steps(rng, LENGTHS, 8))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
@pytest.mark.parametrize("name", SMALL)
def test_a_cache_with_rings_serves_one_key_for_all_branches(
    name, compressor, backend, fused_on_cpu
):
    layer = make_layer(SMALL[name], compressor=compressor, backend=backend)
    sequences = [torch.randn(n, DIM, dtype=F64) for n in LENGTHS]
    sizes = len(LENGTHS), max(LENGTHS) + 8, KV_HEADS, 8, 6
    cache = nsa.Cache(SMALL[name], *sizes, separate_kv=True, dtype=F64)
    assert_decodes(layer, cache, sequences, draw_steps(random.Random(name), LENGTHS, 8))


@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_gates_and_bias(gate):
    layer = make_layer(SMALL["token"], gate=gate, bias=True)
    sequences = [torch.randn(50, DIM, dtype=F64)]
    steps = draw_steps(random.Random(0), [50], 8)
    assert_decodes(layer, layer.make_cache(1, 58), sequences, steps)


def test_blocks_longer_than_the_sequences_can_be():
    config = nsa.NSAConfig(compress_block_size=64, q_tile_size=16)
    layer = make_layer(config)
    sequences = [torch.randn(20, DIM, dtype=F64)]
    assert_decodes(layer, layer.make_cache(1, 28), sequences, draw_steps(random.Random(1), [20], 8))


@pytest.mark.unmeasured
@torch.no_grad()
def test_compiled_with_dynamic_shapes():
    """The sizes of the layer's configuration are then symbols."""
    layer = make_layer(SMALL["token"], compressor="mean")
    x = torch.randn(2, 40, DIM, dtype=F64)
    cache = layer.make_cache(2, 40)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", dynamic=True)
    out = [compiled(x[:, a:b], cache=cache) for a, b in pairwise((0, 20, 40))]
    torch.testing.assert_close(torch.cat(out, 1), layer(x), **CLOSE)


@torch.no_grad()
def test_select_blocks_with_a_cache():
    layer = make_layer(SMALL["token"])
    x = torch.randn(2, 50, DIM, dtype=F64)
    cache = layer.make_cache(2, 50)
    layer(x[:, :31], cache=cache)
    selected = layer.select_blocks(x[:, 31:], cache=cache)
    assert torch.equal(selected, layer.select_blocks(x)[:, 31:])
    assert cache.lengths.tolist() == [31, 31]


@torch.no_grad()
def test_16_bits_lose_no_more_than_one_call():
    """Keys of the open block are rotated back, which rounds them once more."""
    config = SMALL["token"]
    x = torch.randn(2, 90, DIM, dtype=F64)
    exact = make_layer(config)(x)
    layer = make_layer(config).to(torch.bfloat16)
    # Both attend the same blocks, whose choice hangs on less than rounding.
    narrow = x.bfloat16()
    cache = layer.make_cache(2, 90)
    assert cache.dtype == torch.bfloat16
    steps = torch.cat([layer(narrow[:, i : i + 1], cache=cache) for i in range(90)], 1)
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (steps, layer(narrow)))
    assert error <= 1.5 * allowed


def test_make_cache_follows_the_weights_and_autocast():
    layer = make_layer(SMALL["tile"], dtype=torch.float32)
    assert layer.make_cache(1, 9).dtype == torch.float32
    assert layer.make_cache(1, 9, dtype=F64).dtype == F64
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = layer.make_cache(2, 40)
        assert cache.dtype == torch.bfloat16
        assert cache.num_heads == HEADS
        x = torch.randn(2, 40, DIM)
        out = [layer(x[:, :33], cache=cache), layer(x[:, 33:], cache=cache)]
        assert torch.cat(out, 1).dtype == layer(x).dtype


def test_a_captured_first_call_is_replayed_at_other_positions(monkeypatch):
    """So it must read them from the cache, as :func:`arguments_of_new_tokens` does."""
    layer, calls = make_layer(SMALL["token"]), []
    original = layers.arguments_of_new_tokens

    def spy(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(layers, "arguments_of_new_tokens", spy)
    x = torch.randn(1, 1, DIM, dtype=F64)
    with torch.no_grad():
        layer(x, cache=layer.make_cache(1, 100))
        assert not calls
        monkeypatch.setattr(cached_layer, "is_capturing", lambda _: True)
        layer(x, cache=layer.make_cache(1, 100))
    assert calls


@pytest.mark.parametrize("lengths", [[], [3, 2]])
def test_other_sequences_than_the_cache_has(lengths):
    layer = make_layer(SMALL["token"])
    x = torch.randn(sum(lengths), DIM, dtype=F64)
    with torch.no_grad(), pytest.raises(ValueError, match=f"the {len(lengths)} sequences of q"):
        layer(x, nsa.Packing(make_cu_seqlens(lengths)), cache=layer.make_cache(1, 100))


def test_caches_that_do_not_fit():
    layer = make_layer(SMALL["token"])
    x = torch.randn(2, 3, DIM, dtype=F64)
    with pytest.raises(ValueError, match="must not require a gradient"):
        layer(x, cache=layer.make_cache(2, 9))
    with torch.no_grad():
        with pytest.raises(TypeError, match=r"cache must be an nsa\.Cache"):
            layer(x, cache=9)
        with pytest.raises(ValueError, match="the 2 sequences of q"):
            layer(x, cache=layer.make_cache(3, 9))
        with pytest.raises(ValueError, match="config must be that of the cache"):
            layer(x, cache=make_layer(SMALL["tile"]).make_cache(2, 9))
        with pytest.raises(ValueError, match="max_length of at least 3"):
            layer(x, cache=layer.make_cache(2, 2))
