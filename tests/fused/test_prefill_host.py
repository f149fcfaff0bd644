"""What prompts and chunks into a cache cost beside their kernels: operations, bytes and waits."""

from functools import wraps

import pytest
import torch

import nsa
from nsa import compressor, packing
from nsa.fused import entry, fa4_lists, layer_ops, planning
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.counted_operations import CountedOperations, count_kernel_calls
from tests.helpers.host_reads import READS

CONFIGS = {"token": nsa.NSAConfig.paper(), "tile": nsa.NSAConfig()}
LENGTH, CHUNK, HEADS, DIM = 2048, 512, 4, 64
PACKED = [1024, 768]


@pytest.fixture(autouse=True)
def _eager_calls_on_a_cpu(fused_on_cpu, monkeypatch):
    """Kernels are emulated, and a dispatch mode that looks is no reason for custom ops."""
    monkeypatch.setattr(entry, "is_traced", lambda *_: False)
    for module in (planning, packing, fa4_lists):
        monkeypatch.setattr(module, "may_keep", lambda _: True)


@pytest.fixture
def calls(monkeypatch):
    """Kernels, and sums of what the host knows of the lengths, are not counted."""
    calls = count_kernel_calls(monkeypatch)
    grown = nsa.Cache._grown

    @wraps(grown)
    def uncounted(*args):
        calls["depth"] += 1
        try:
            return grown(*args)
        finally:
            calls["depth"] -= 1

    monkeypatch.setattr(nsa.Cache, "_grown", uncounted)
    return calls


def count(calls, cache, tensors, bounds=None) -> CountedOperations:
    with CountedOperations(calls) as counted:
        nsa.forward(*tensors, cache=cache, cu_seqlens=bounds, backend="fused")
    assert not READS & set(counted.launches)
    return counted


def cut(x, start, stop):
    return tuple(cut(part, start, stop) for part in x) if isinstance(x, tuple) else x[:, start:stop]


# PyTorch operations, without views and kernels of ours, and bytes that they write in units of all
# new keys and values. When each token was written to a place that was computed for it, a prompt
# took 285 operations in token mode, among them two that made the host wait, and 439 in tile mode.
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize(("mode", "most"), [("token", 9), ("tile", 20)])
def test_a_prompt(mode, most, separate, calls):
    q, k, v = make_inputs((1, LENGTH), HEADS, 1, DIM, dtype=torch.bfloat16)
    if separate:
        k, v = ((x.clone(), x.clone(), x.clone()) for x in (k, v))
    cache = nsa.Cache(CONFIGS[mode], 1, LENGTH, 1, DIM, separate_kv=separate, dtype=q.dtype)
    for _ in range(2):
        cache.reset()
        counted = count(calls, cache, (q, k, v))
    assert counted.launches.total() <= most + 3 * separate, counted.launches
    # Keys and values once, compressed ones, and the last of each ring.
    assert counted.written <= 2 * LENGTH * DIM * 2 * (1.1 + 0.4 * separate)


@pytest.mark.parametrize(("mode", "most"), [("token", 34), ("tile", 42)])
def test_packed_prompts(mode, most, calls):
    q, k, v = make_inputs((sum(PACKED),), HEADS, 1, DIM, dtype=torch.bfloat16)
    bounds = nsa.Packing(make_cu_seqlens(PACKED))
    cache = nsa.Cache(CONFIGS[mode], len(PACKED), LENGTH, 1, DIM, dtype=q.dtype)
    for _ in range(2):
        cache.reset()
        counted = count(calls, cache, (q, k, v), bounds)
    assert counted.launches.total() <= most, counted.launches
    assert counted.written <= 2 * sum(PACKED) * DIM * 2 * 1.2


@pytest.mark.parametrize(("mode", "most"), [("token", 10), ("tile", 21)])
def test_a_chunk_reads_the_pages_in_place(mode, most, calls):
    tensors = make_inputs((1, LENGTH), HEADS, 1, DIM, dtype=torch.bfloat16)
    cache = nsa.Cache(CONFIGS[mode], 1, LENGTH, 1, DIM, dtype=torch.bfloat16)
    for _ in range(2):
        # The plans of the second time are kept.
        cache.reset()
        for start in range(0, LENGTH, CHUNK):
            counted = count(calls, cache, cut(tensors, start, start + CHUNK))
    assert counted.launches.total() <= most, counted.launches
    assert counted.written <= 2 * CHUNK * DIM * 2 * 1.2


def test_a_last_tile_that_is_short_copies_queries_once(calls):
    """For the attention, whose rows are aligned; the selection reads first queries in place."""
    length = LENGTH - 13
    tensors = make_inputs((1, length), HEADS, 1, DIM, dtype=torch.bfloat16)
    cache = nsa.Cache(CONFIGS["tile"], 1, length, 1, DIM, dtype=torch.bfloat16)
    with CountedOperations(calls) as plain:
        nsa.forward(*tensors, config=cache.config, backend="fused")
    counted = count(calls, cache, tensors)
    assert counted.written - plain.written <= 2 * length * DIM * 2 * 1.1


@torch.no_grad()
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize(("mode", "more"), [("token", 9), ("tile", 25)])
def test_a_prompt_of_the_layer(mode, more, separate, calls, monkeypatch):
    """Beside the layer without a cache; it took 364 and 450 more operations."""
    for module in (layer_ops, compressor):
        monkeypatch.setattr(module, "is_traced", lambda *_: False)
    options = dict(backend="fused", dtype=torch.bfloat16, separate_kv=separate)
    layer = nsa.NativeSparseAttention(HEADS * DIM, HEADS, 1, CONFIGS[mode], **options)
    x = torch.randn(1, LENGTH // 2, HEADS * DIM, dtype=torch.bfloat16)
    cache = layer.make_cache(1, LENGTH // 2)
    for _ in range(2):
        cache.reset()
        with CountedOperations(calls) as plain:
            expected = layer(x)
        with CountedOperations(calls) as counted:
            out = layer(x, cache=cache)
    assert torch.equal(out, expected)
    assert counted.launches.total() - plain.launches.total() <= more + 3 * separate
    assert not READS & set(counted.launches)
