"""On the GPU: a cache in CUDA graphs, prompts with kernels, and what the host knows."""

import pytest
import torch

import nsa
from nsa.testing import make_inputs
from tests.helpers.decoding import append_on_device, assert_same_contents
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.small_configs import SMALL, tile_config, token_config

pytestmark = gpu_test

HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_one_graph_appends_as_lengths_grow_and_shrink(name, separate):
    sizes = SMALL[name], 2, 200, KV_HEADS, DIM, DIM, separate
    graphed, eager = (nsa.Cache(*sizes, device="cuda", num_heads=HEADS) for _ in range(2))
    _, k, v = make_inputs((10,), HEADS, KV_HEADS, DIM, device="cuda")
    bounds = torch.tensor([0, 3, 10], device="cuda")
    append_on_device(graphed, k, v, bounds)
    assert graphed.known_lengths() is None  # the boundaries are on the device
    graphed.reset()
    assert graphed.known_lengths() == [0, 0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_on_device(graphed, k, v, bounds)
    graphed.reset()
    assert graphed.known_lengths() is None  # replays change them
    for step in range(12):
        _, new_k, new_v = make_inputs((10,), HEADS, KV_HEADS, DIM, device="cuda", seed=step)
        new_bounds = torch.tensor([0, step % 8, 7], device="cuda")
        for old, new in ((k, new_k), (v, new_v), (bounds, new_bounds)):
            old.copy_(new)
        graph.replay()
        append_on_device(eager, new_k, new_v, new_bounds)
        if step % 3 == 2:
            shorter = eager.lengths - 4
            for cache in (graphed, eager):
                cache.truncate(shorter)
    assert_same_contents(graphed, eager, atol=0)
    assert torch.equal(graphed.floors, eager.floors)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_a_prompt_by_kernels_and_steps_by_the_reference(mode, separate):
    """Outputs are as exact as those of the reference alone."""
    config = token_config() if mode == "token" else tile_config(num_local_blocks=1)
    kind = dict(dtype=torch.bfloat16, device="cuda")
    q, k, v = make_inputs((2, 700), 8, 2, 64, **kind)
    exact = nsa.forward(*(x.double() for x in (q, k, v)), config=config, backend="reference")
    if separate:
        k, v = (k, k.clone(), k.clone()), (v, v.clone(), v.clone())
    caches = [nsa.Cache(config, 2, 1024, 2, 64, separate_kv=separate, **kind) for _ in range(2)]

    def cut(x, start, stop):
        if isinstance(x, tuple):
            return tuple(part[:, start:stop] for part in x)
        return x[:, start:stop]

    outs = []
    for cache, backend in zip(caches, ("fused", "reference"), strict=True):
        prompt = nsa.forward(*(cut(x, 0, 690) for x in (q, k, v)), cache=cache, backend=backend)
        assert cache.known_lengths() == [690, 690]
        steps = [
            nsa.forward(*(cut(x, t, t + 1) for x in (q, k, v)), cache=cache, backend="reference")
            for t in range(690, 700)
        ]
        outs.append(torch.cat([prompt, *steps], 1))
    if mode == "token":
        # Else the lists of tiles may differ by ties.
        assert_same_contents(*caches, atol=0)
    error, allowed = ((out.double() - exact).square().mean().sqrt() for out in outs)
    assert error <= 2 * allowed + 1e-4


def test_overflow_on_the_device_is_seen_later():
    cache = nsa.Cache(SMALL["token"], 1, 16, KV_HEADS, DIM, device="cuda")
    _, k, v = make_inputs((20,), HEADS, KV_HEADS, DIM, device="cuda")
    append_on_device(cache, k, v, torch.tensor([0, 20], device="cuda"))
    assert cache.lengths.tolist() == [16]
    assert bool(cache.overflowed)
    cache.truncate(torch.tensor([3], device="cuda"))
    assert cache.lengths.tolist() == [3]
    q, k, v = make_inputs((1, 14), HEADS, KV_HEADS, DIM, device="cuda")
    with pytest.raises(ValueError, match="got no place for token 16"):
        nsa.forward(q, k, v, cache=cache, backend="reference")


@torch.no_grad()
def test_a_captured_reorder_may_share_pages_at_any_time():
    """Prompts and chunks then look up their pages; before, each token had its slice."""
    kind = dict(dtype=torch.bfloat16, device="cuda")
    q, k, v = make_inputs((2, 700), 8, 2, 64, **kind)
    config = token_config()
    whole = nsa.forward(q, k, v, config=config)
    swapped = torch.tensor([1, 0], device="cuda")
    moved, still = (nsa.Cache(config, 2, 1024, 2, 64, **kind) for _ in range(2))
    moved.reorder(swapped)
    moved.reset()
    assert moved.has_ordered_pages
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        moved.reorder(swapped)
    moved.reset()
    assert not moved.has_ordered_pages
    assert still.has_ordered_pages
    for cache in (moved, still):
        first = nsa.forward(q[:, :600], k[:, :600], v[:, :600], cache=cache, backend="fused")
        order = torch.arange(2, device="cuda")
        if cache is moved:
            graph.replay()
            order = swapped
        rest = (x[:, 600:][order] for x in (q, k, v))
        second = nsa.forward(*rest, cache=cache, backend="fused")
        out = torch.cat([first, second[order]], 1)
        assert (out - whole).float().norm() <= 0.02 * whole.float().norm()


@torch.no_grad()
def test_the_layer_decodes_under_autocast():
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(256, 4, 2, token_config(), device="cuda")
    x = torch.randn(2, 300, 256, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        cache = layer.make_cache(2, 310)
        assert cache.dtype == torch.bfloat16
        whole = layer(x)
        out = [layer(x[:, :290], cache=cache)]
        out += [layer(x[:, t : t + 1], cache=cache) for t in range(290, 300)]
    difference = (torch.cat(out, 1) - whole).float()
    assert difference.square().mean().sqrt() <= 0.02 * whole.float().square().mean().sqrt()
