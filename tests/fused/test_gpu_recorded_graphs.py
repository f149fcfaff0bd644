"""Recorded calls as CUDA graphs give what their steps give, and ask for no more memory."""

import gc
import threading
from functools import partial

import pytest
import torch

import nsa
from nsa import recorded_graphs, recordings
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

DIM, HEADS, TOKENS = 1024, 16, 1500
KIND = dict(device="cuda", dtype=torch.bfloat16)
CONFIGS = {"paper": nsa.NSAConfig.paper(), "tile": nsa.NSAConfig()}
CALLS = 12
"""Enough for three with the same addresses, though results that are held alternate, and the first
calls may find other memory."""
LENGTHS = [[700, 1, 799], [0, 900, 500, 100], [1024, 60, 416], [3, 1000, 497]]


@pytest.fixture(autouse=True)
def _no_recordings(monkeypatch):
    monkeypatch.setattr(recordings, "ENABLED", True)
    recordings.clear()


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """How often each captured graph was launched."""
    found: list[int] = []
    capture = recorded_graphs.capture

    def counted(*args):
        at, replay = len(found), capture(*args)
        found.append(0)

        def launch():
            found[at] += 1
            replay()

        return launch

    monkeypatch.setattr(recorded_graphs, "capture", counted)
    return found


def make_layers(config, count=2, dim=DIM) -> torch.nn.ModuleList:
    torch.manual_seed(0)
    layers = [
        nsa.NativeSparseAttention(dim, HEADS, 1, CONFIGS[config], backend="fused", **KIND)
        for _ in range(count)
    ]
    return torch.nn.ModuleList(layers)


def train(layers, steps, packings=None, tokens=TOKENS) -> list[torch.Tensor]:
    """The output and all gradients of each of some steps, which change the weights in place."""
    found = []
    parameters = list(layers.parameters())
    for turn in range(steps):
        bounds = ()
        if packings is not None:
            bounds = (nsa.Packing(packings[turn % len(packings)]),)
        torch.manual_seed(turn)
        x = torch.randn(*(() if packings else (1,)), tokens, DIM, **KIND).requires_grad_()
        y = x
        for layer in layers:
            y = y + layer(y, *bounds)
        grads = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))
        # Results that stay on the GPU would have other memory asked for in each step.
        found.append([x.cpu() for x in (y.detach(), *grads)])
        del x, y, grads, bounds
        with torch.no_grad():
            for p in parameters:
                p.mul_(1.001)
    return found


def assert_alike(got, wanted):
    """The same outputs. Gradients are added in any order, so their last bits differ."""
    for some, others in zip(got, wanted, strict=True):
        assert torch.equal(some[0], others[0])
        for x, y in zip(some[1:], others[1:], strict=True):
            assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm() + 1e-6


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_training(config, packed, compiled, captures, monkeypatch):
    packings = [make_cu_seqlens(x, "cuda") for x in LENGTHS] if packed else None
    results = []
    for as_graphs in (False, True):
        monkeypatch.setattr(recorded_graphs, "ENABLED", as_graphs)
        recordings.clear()
        layers = make_layers(config)
        if compiled:
            torch._dynamo.reset()
            for layer in layers:
                layer.compile()
        results.append(train(layers, 10, packings))
        assert bool(captures) == as_graphs
    assert_alike(*results)
    # Most calls of the last steps are graphs.
    assert sum(captures) >= 8


@pytest.mark.parametrize("tokens", [8192])
def test_tile_mode_on_two_streams(tokens, captures, monkeypatch):
    """As long calls have them; a graph forks too."""
    q = torch.randn(1, tokens, 32, 128, **KIND)
    monkeypatch.setattr(recorded_graphs, "MAX_ELEMENTS", q.numel())
    k, v = torch.randn(2, 1, tokens, 8, 128, **KIND)
    weight = torch.randn(32, 3, 128, **KIND) / 16
    call = partial(nsa.forward, config=CONFIGS["tile"], gate_proj_weight=weight)
    monkeypatch.setattr(recordings, "ENABLED", False)
    wanted = [call(q * turn, k, v) for turn in range(6)]
    monkeypatch.setattr(recordings, "ENABLED", True)
    given = torch.empty_like(q)
    for turn in range(6):
        assert torch.equal(call(given.copy_(q * turn), k, v), wanted[turn])
    assert sum(captures) >= 1


def test_no_graph_on_another_stream_or_in_a_capture(captures):
    (layer,) = make_layers("paper", 1)
    x = torch.randn(1, TOKENS, DIM, **KIND)
    with torch.no_grad():
        for _ in range(CALLS):
            wanted = layer(x)
        assert captures
        launched = sum(captures)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert torch.equal(layer(x), wanted)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    assert torch.equal(y, wanted)
    assert sum(captures) == launched


def test_backward_in_a_capture_after_graphs(captures):
    """Its forward is no graph, as in any capture."""
    (layer,) = make_layers("paper", 1)
    x = torch.randn(1, TOKENS, DIM, **KIND, requires_grad=True)
    dy = torch.ones(1, TOKENS, DIM, **KIND)

    def step():
        return torch.autograd.grad(layer(x), x, dy)[0]

    for _ in range(CALLS):
        wanted = step()
    assert captures
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert (got.float() - wanted.float()).norm() <= 1e-2 * wanted.float().norm()


def test_threads(captures):
    layers = make_layers("paper", 1)
    parameters = list(layers.parameters())
    xs = [torch.randn(1, TOKENS, DIM, **KIND) for _ in range(3)]

    def results(x) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = layers[0](leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], torch.ones_like(y))]

    recordings.ENABLED = False
    wanted = [results(x) for x in xs]
    recordings.ENABLED = True
    got: dict[int, list] = {}

    def work(i):
        for _ in range(20):
            got[i] = results(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_alike([got[i] for i in range(len(xs))], wanted)


def test_forgotten_recordings_and_workspaces(captures):
    """Graphs end with their recordings; others captured later are right, also after PyTorch has
    freed the workspace of products and all memory that nobody holds."""
    wanted = train(make_layers("paper", 1), 8)
    for _ in range(3):
        recordings.clear()
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.full((1 << 28,), torch.nan, device="cuda")
        before = len(captures)
        found = train(make_layers("paper", 1), 8)
        assert len(captures) > before
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.full((1 << 28,), torch.nan, device="cuda")
        assert_alike(found, wanted)


def test_random_numbers_are_as_without_graphs(captures):
    (layer,) = make_layers("paper", 1)
    x = torch.randn(1, TOKENS, DIM, **KIND)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        with torch.no_grad():
            for _ in range(CALLS):
                layer(x)
        found.append(torch.rand(4, device="cuda"))
    assert captures
    assert torch.equal(*found)
