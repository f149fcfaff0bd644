"""Arguments that nsa.Cache and calls with a cache refuse, and those that they take all the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa
from nsa.cache import calls
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.cache_cases import (
    DIM,
    F64,
    HEADS,
    KV_HEADS,
    VALUE_DIM,
    feed,
    inputs,
    make_cache,
)
from tests.helpers.small_configs import SMALL

BAD_CACHES = {
    "config": (dict(config=3), TypeError),
    "batch_size": (dict(batch_size=0), ValueError),
    "max_length": (dict(max_length=2.0), TypeError),
    "num_kv_heads": (dict(num_kv_heads=0), ValueError),
    "head_dim": (dict(head_dim=-1), ValueError),
    "value_head_dim": (dict(value_head_dim=0), ValueError),
    "page_size": (dict(page_size=12), ValueError),
    "dtype": (dict(dtype=torch.int32), TypeError),
    "device must be one that PyTorch knows": (dict(device="gpu"), ValueError),
    "num_heads": (dict(num_heads=0), ValueError),
    "separate_kv must be a bool": (dict(separate_kv="no"), TypeError),
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_bad_sizes(name):
    changes, error = BAD_CACHES[name]
    good = dict(config=SMALL["token"], batch_size=1, max_length=9, num_kv_heads=1, head_dim=4)
    with pytest.raises(error, match=name):
        nsa.Cache(**(good | changes))


SIZES = ("batch_size", "max_length", "num_kv_heads", "head_dim", "value_head_dim", "num_heads")


@pytest.mark.parametrize("huge", [2**31, 2**63, 2**100])
@pytest.mark.parametrize("name", [*SIZES, "page_size"])
def test_huge_sizes(name, huge):
    good = dict(batch_size=1, max_length=9, num_kv_heads=1, head_dim=4, device="meta")
    with pytest.raises(ValueError, match=f"{name} must be at most 2147483647, got {huge}"):
        nsa.Cache(SMALL["token"], **(good | {name: huge}))


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (nsa.NSAConfig.paper(causal=False), "use causal=True"),
        (nsa.NSAConfig.paper(compressed_visibility="started"), "visibility='complete'"),
        (nsa.NSAConfig(tile_summary="mean"), "use tile_summary='first'"),
    ],
)
def test_configurations_that_cannot_be_decoded(config, remedy):
    with pytest.raises(nsa.UnsupportedError, match=remedy):
        nsa.Cache(config, 1, 9, 1, 4)
    # A summary matters in tile mode alone.
    nsa.Cache(nsa.NSAConfig.paper(tile_summary="mean"), 1, 9, 1, 4)


def bad_calls():
    """Arguments of a call with a cache that must be refused: name, arguments, error, words."""
    q, k, v = inputs(2, 3)
    good = dict(q=q, k=k, v=v)
    packed = {n: x.flatten(0, 1) for n, x in good.items()}
    bounds = make_cu_seqlens([3, 3])
    other = nsa.NSAConfig()
    needs = q.clone().requires_grad_()
    three = (k, k.clone(), k.clone())
    yield "config", good | dict(config=other), ValueError, "config must be that of the cache"
    yield "cache", good | dict(cache=3), TypeError, "cache must be an nsa.Cache"
    yield "batch", {n: x[:1] for n, x in good.items()}, ValueError, "the 1 sequences of q"
    single = dict(cu_seqlens=make_cu_seqlens([6]))
    yield "packed batch", packed | single, ValueError, "the 1 sequences of q"
    floats = {n: x.float() for n, x in good.items()}
    yield "dtype", floats, TypeError, "cache must have the dtype of q"
    meta = {n: x.to("meta") for n, x in good.items()}
    yield "device", meta, ValueError, "cache must be on the device of q"
    heads = dict(k=k[:, :, :1], v=v[:, :, :1])
    yield "num_kv_heads", good | heads, ValueError, "cache must have num_kv_heads=1"
    dims = dict(q=q[..., :4], k=k[..., :4])
    yield "head_dim", good | dims, ValueError, "cache must have head_dim=4"
    yield "value_head_dim", good | dict(v=k), ValueError, "cache must have value_head_dim=8"
    yield "three", good | dict(k=three), ValueError, "k must be one tensor for a cache"
    yield "gradient", good | dict(q=needs), ValueError, "q must not require a gradient"
    weight = torch.ones(HEADS, 3, DIM, dtype=F64, requires_grad=True)
    yield "weight", good | dict(gate_proj_weight=weight), ValueError, "gate_proj_weight must not"
    longer = dict(cu_seqlens=bounds, cu_seqlens_k=bounds.clone())
    longer["cu_seqlens_k"][-1] += 1
    more = dict(k=torch.cat([packed["k"], k[0, :1]]), v=torch.cat([packed["v"], v[0, :1]]))
    yield "cu_seqlens_k", packed | more | longer, ValueError, "cu_seqlens_k must be None"
    yield "more keys", good | dict(q=q[:, :2]), ValueError, "k must have the new tokens alone"
    blocks = torch.zeros(2, 3, KV_HEADS, DIM, dtype=F64), torch.zeros(2, 3, KV_HEADS, 6, dtype=F64)
    wrong = "must have shape \\(2, 2, 2, 8\\)"
    yield "compressed_kv", good | dict(compressed_kv=blocks), ValueError, wrong
    lists = torch.zeros(2, 3, KV_HEADS, 5, dtype=torch.int32)
    yield "block_indices", good | dict(block_indices=lists), ValueError, "block_indices must have"
    lists = torch.full((2, 3, KV_HEADS, 4), -1, dtype=torch.int32)
    lists[0, 2, 1, 0] = 1
    yield "late block", good | dict(block_indices=lists), ValueError, "blocks of the sequence"
    yield "fused", good | dict(backend="fused"), nsa.UnsupportedError, "use backend='reference'"


@pytest.mark.parametrize("name", [name for name, *_ in bad_calls()])
def test_bad_calls(name):
    _, arguments, error, words = next(case for case in bad_calls() if case[0] == name)
    cache = make_cache(SMALL["token"], length=32)
    with pytest.raises(error, match=words):
        nsa.forward(**(dict(cache=cache) | arguments))
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tiles", [1, 3])
def test_tiles_that_the_checks_did_not_count(tiles, packed, monkeypatch):
    """As while torch.compile traces, where checks know no lengths."""
    cache = make_cache(SMALL["tile"])
    feed(cache, inputs(2, 20), 0, 20)
    monkeypatch.setattr(calls, "_known_spans", lambda *_: None)
    tensors, bounds = inputs(2, 20), {}
    leading, wanted = (2,), 2
    if packed:
        tensors = [x.flatten(0, 1) for x in tensors]
        bounds, leading, wanted = dict(cu_seqlens=make_cu_seqlens([20, 20])), (), 4
    lists = torch.full((*leading, HEADS, tiles, 3), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"must have {wanted} tiles.*got {tiles}"):
        nsa.forward(*tensors, cache=cache, block_indices=lists, **bounds)
    assert cache.lengths.tolist() == [20, 20]


def test_another_number_of_query_heads():
    cache = make_cache(SMALL["tile"])
    feed(cache, inputs(2, 20), 0, 20)
    q, k, v = inputs(2, 1)
    with pytest.raises(ValueError, match="cache must have num_heads=2"):
        nsa.forward(q[:, :, :2], k, v, cache=cache)


def test_auto_uses_the_reference():
    cache = make_cache(SMALL["token"])
    q, k, v = inputs(2, 1)
    assert "backend: reference" in nsa.explain_backend(q, k, v, cache=cache)
    assert nsa.forward(q, k, v, cache=cache).shape == (2, 1, HEADS, VALUE_DIM)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_not_asked_for_without_grad_mode(name):
    cache = make_cache(SMALL[name])
    q, k, v = (x.requires_grad_() for x in inputs(2, 3))
    with torch.no_grad():
        out = nsa.forward(q, k, v, cache=cache)
    assert not out.requires_grad


@pytest.mark.parametrize("new", [2**31, [20, 2**40], torch.tensor([2**33 + 3, 2**31])])
def test_truncate_to_more_than_there_is_drops_nothing(new):
    cache = make_cache_of_20_tokens()
    cache.truncate(new)
    assert cache.lengths.tolist() == [20, 20]


@pytest.mark.parametrize("new", [[1.5, 2.9], True, None, "ab", (1, 2)])
def test_truncate_takes_whole_numbers(new):
    with pytest.raises(TypeError, match="lengths must be an int, a list"):
        make_cache_of_20_tokens().truncate(new)


def make_cache_of_20_tokens() -> nsa.Cache:
    config = nsa.NSAConfig.paper()
    cache = nsa.Cache(config, 2, 64, 2, 8, dtype=torch.float64)
    q, k, v = make_inputs((2, 20), 4, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        nsa.forward(q, k, v, cache=cache, backend="reference")
    return cache


def test_heads_that_no_call_can_have():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads=2, got 3"):
        nsa.Cache(nsa.NSAConfig(), 1, 64, 2, 8, num_heads=3)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
@pytest.mark.usefixtures("fused_on_cpu")
def test_tensors_without_values_are_refused(backend, tokens):
    def call(**options):
        cache = nsa.Cache(SMALL["token"], 2, 64, 1, 4, **options)
        q, k, v = torch.empty(3, 2, tokens, 1, 4, **options)
        nsa.forward(q, k, v, cache=cache, backend=backend)

    with pytest.raises(nsa.UnsupportedError, match="a call with a cache reads values"):
        call(device="meta")
    with FakeTensorMode(), pytest.raises(nsa.UnsupportedError, match="reads values"):
        call()
