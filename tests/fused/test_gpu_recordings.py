"""Recorded calls on a GPU give what calls step by step give."""

import threading
from functools import partial

import pytest
import torch

import nsa
from nsa import recorded_graphs, recordings
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

CONFIGS = {
    "paper": nsa.NSAConfig.paper(),
    "tile": nsa.NSAConfig(),
    "first": nsa.NSAConfig(tile_summary="first", num_cmp_selected_blocks=2, cmp_group_size=64),
}
LAYERS = {
    "paper": dict(config="paper"),
    "tile": dict(config="tile"),
    "groups": dict(config="first", num_kv_heads=4, gate="q", compressor="mean"),
    "separate": dict(config="paper", separate_kv=True, gate="q", bias=True),
    "float16": dict(config="paper", dtype=torch.float16, rope_theta=None),
    "mean": dict(config="tile", compressor="mean", dtype=torch.float16, gate="q"),
}
DIM, HEADS, TOKENS = 1024, 16, 1500


@pytest.fixture(autouse=True)
def _no_recordings(monkeypatch):
    monkeypatch.setattr(recordings, "ENABLED", True)
    recordings.clear()


def is_recorded() -> bool:
    return bool(recordings._recordings)


def make_layer(config, num_kv_heads=1, **options):
    torch.manual_seed(0)
    options = dict(dtype=torch.bfloat16, device="cuda", backend="fused") | options
    return nsa.NativeSparseAttention(DIM, HEADS, num_kv_heads, CONFIGS[config], **options)


def poison():
    """Leave NaN in the memory that the next allocations get."""
    for size in (1 << 28, 1 << 24, 1 << 20, 1 << 16, 1 << 10):
        torch.full((size,), torch.nan, device="cuda")


def with_gradients(call, inputs, parameters=()) -> list[torch.Tensor]:
    poison()
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves)
    dy = torch.linspace(-1, 1, y.shape[-1], device="cuda", dtype=y.dtype).expand_as(y)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *parameters], dy)]


def step_by_step(call, *arguments):
    recordings.ENABLED = False
    try:
        return call(*arguments)
    finally:
        recordings.ENABLED = True


def without_rounding(results, layer) -> list[torch.Tensor]:
    """Results of :func:`with_gradients` but for a gradient that is rounding alone, thus small.

    Without rotation, a constant added to all compressed keys changes no output, so the gradient of
    their last bias is zero. Gradients of single blocks cancel in it, and what is left of their last
    bits differs.
    """
    first = len(results) - len(list(layer.parameters()))
    gradients = dict(
        zip((name for name, _ in layer.named_parameters()), results[first:], strict=True)
    )
    if layer.rope_theta is None and "compress_k.mlp.2.bias" in gradients:
        rounding = gradients.pop("compress_k.mlp.2.bias")
        weight = gradients["compress_k.mlp.2.weight"]
        assert rounding.float().norm() <= 1e-3 * weight.float().norm()
    return [*results[:first], *gradients.values()]


def assert_same(got, wanted):
    """The same output. Gradients are added in any order, so their last bits differ."""
    assert torch.equal(got[0], wanted[0])
    assert_near(got[1:], wanted[1:])


def assert_near(got, wanted):
    for x, y in zip(got, wanted, strict=True):
        assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm() + 1e-6


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("batch", [1, 2])
def test_layer(form, batch):
    layer = make_layer(**LAYERS[form])
    parameters = list(layer.parameters())
    for turn in range(4):
        x = torch.randn(batch, TOKENS, DIM, device="cuda", dtype=parameters[0].dtype)
        got = with_gradients(layer, [x], parameters)
        wanted = step_by_step(with_gradients, layer, [x], parameters)
        assert_same(without_rounding(got, layer), without_rounding(wanted, layer))
        assert is_recorded() == (turn > 0)
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.01)
            assert torch.equal(layer(x), step_by_step(layer, x))


@pytest.mark.parametrize("form", LAYERS)
def test_packings(form):
    layer = make_layer(**LAYERS[form])
    parameters = list(layer.parameters())
    for turn, lengths in enumerate([[700, 1, 799], [0, 900, 500, 100], [1024, 60, 416]]):
        bounds = nsa.Packing(make_cu_seqlens(lengths, "cuda"))
        x = torch.randn(TOKENS, DIM, device="cuda", dtype=parameters[0].dtype)
        got = with_gradients(partial(layer, cu_seqlens=bounds), [x], parameters)
        wanted = step_by_step(with_gradients, partial(layer, cu_seqlens=bounds), [x], parameters)
        # There are more rows of no block, so that products may be computed otherwise.
        assert_near(without_rounding(got, layer), without_rounding(wanted, layer))
        assert is_recorded() == (turn > 0)


def test_boundaries_of_the_host():
    """The host waits for nothing when it reads them, and they are those of a GPU."""
    layer = make_layer("paper")
    for lengths in [700, 1, 799], [0, 900, 500, 100], [1024, 60, 416], [3, 997, 500]:
        x = torch.randn(TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
        wanted = layer(x, nsa.Packing(make_cu_seqlens(lengths, "cuda")))
        given = make_cu_seqlens(lengths)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = layer(x, nsa.Packing(given, device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", LAYERS)
def test_kept_plans(form):
    """What a Packing keeps for recordings stays as it was made, and is right when used again."""
    layer = make_layer(**LAYERS[form])
    parameters = list(layer.parameters())
    forms = [[700, 1, 799], [0, 900, 500, 100], [1024, 60, 416]]
    packings = [nsa.Packing(make_cu_seqlens(lengths, "cuda")) for lengths in forms]
    plans: dict[int, list] = {}
    for at in (0, 1, 2, 1, 2, 1):
        call = partial(layer, cu_seqlens=packings[at])
        x = torch.randn(TOKENS, DIM, device="cuda", dtype=parameters[0].dtype)
        got = with_gradients(call, [x], parameters)
        wanted = step_by_step(with_gradients, call, [x], parameters)
        assert_near(without_rounding(got, layer), without_rounding(wanted, layer))
        kept = [x for key, x in packings[at].rounded._kept.items() if callable(key)]
        assert len(kept) == (at > 0)
        for plan in kept:
            copies = plans.setdefault(at, [x.clone() for x in plan])
            assert all(map(torch.equal, plan, copies))


@pytest.mark.parametrize("form", ["paper", "tile"])
def test_stack_in_autocast(form):
    stack = [make_layer(**LAYERS[form] | {"dtype": torch.float32}) for _ in range(3)]
    parameters = [p for layer in stack for p in layer.parameters()]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.03)

    def call(x):
        with torch.autocast("cuda", torch.bfloat16):
            for layer in stack:
                x = x + layer(x)
        return x

    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for _ in range(3):
        x = torch.randn(1, TOKENS, DIM, device="cuda")
        got = with_gradients(call, [x], parameters)
        assert_same(got, step_by_step(with_gradients, call, [x], parameters))
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert is_recorded()


@pytest.mark.parametrize("config", ["paper", "tile"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 1, 64), (16, 4, 128)])
def test_forward(config, heads, kv_heads, dim):
    def call(q, k, v, weight):
        return nsa.forward(q, k, v, config=CONFIGS[config], gate_proj_weight=weight)

    for turn in range(4):
        kind = dict(device="cuda", dtype=torch.bfloat16)
        qkv = torch.randn(1, TOKENS, heads + 2 * kv_heads, dim, **kind)
        inputs = [*qkv.split((heads, kv_heads, kv_heads), 2), torch.randn(heads, 3, dim, **kind)]
        if turn == 2:
            inputs[1] = qkv.clone()[:, :, heads : heads + kv_heads]
        got = with_gradients(call, inputs)
        assert_same(got, step_by_step(with_gradients, call, inputs))
    assert is_recorded()


def test_weights_that_are_replaced():
    layer, other = make_layer("paper"), make_layer("paper")
    x = torch.randn(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.03)
    for turn in range(5):
        if turn == 2:
            layer.load_state_dict(other.state_dict(), assign=True)
        if turn == 3:
            layer.q_proj.weight.data = torch.randn_like(layer.q_proj.weight) / 32
        if turn == 4:
            layer.o_proj = other.o_proj
        parameters = list(layer.parameters())
        got = with_gradients(layer, [x], parameters)
        assert_same(got, step_by_step(with_gradients, layer, [x], parameters))


def test_backward_twice():
    layer = make_layer("tile")
    for _ in range(3):
        x = torch.randn(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = layer(x)
        (first,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        poison()
        (second,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert_same([y, second], [y, first])


def test_other_streams_and_threads():
    layer = make_layer("paper")
    parameters = list(layer.parameters())
    xs = [torch.randn(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    wanted = [step_by_step(with_gradients, layer, [x], parameters) for x in xs]
    for x, result in zip(xs, wanted, strict=True):
        assert_same(with_gradients(layer, [x], parameters), result)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(with_gradients(layer, [xs[0]], parameters), wanted[0])
    torch.cuda.current_stream().wait_stream(stream)
    got: dict[int, list] = {}

    def work(i):
        for _ in range(8):
            got[i] = with_gradients(layer, [xs[i]], parameters)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, result in enumerate(wanted):
        assert_same(got[i], result)


def test_graph_capture_after_a_recording():
    layer = make_layer("tile")
    x = torch.randn(1, TOKENS, DIM, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            wanted = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    assert torch.equal(y, wanted)


def test_memory_beside_step_by_step(monkeypatch):
    """A call allocates what it saves and its results at once, before their steps run, and frees
    nothing before its end. So these may come on top of the peak, and no more."""
    monkeypatch.setattr(recorded_graphs, "ENABLED", False)
    layer = make_layer("paper")
    x = torch.randn(1, 8192, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.ones_like(x)

    def memory() -> tuple[int, int]:
        """The peak of a step, and what is kept between forward and backward."""
        layer.zero_grad()
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = layer(x)
        kept = torch.cuda.memory_allocated() - before
        y.backward(dy)
        return torch.cuda.max_memory_allocated() - before, kept

    for _ in range(3):
        recorded, kept = memory()
    peak, kept_step_by_step = step_by_step(memory)
    results = x.nbytes + sum(p.nbytes for p in layer.parameters())
    assert kept <= 1.02 * kept_step_by_step
    assert recorded <= 1.02 * peak + kept + results, (recorded, peak, kept, results)
