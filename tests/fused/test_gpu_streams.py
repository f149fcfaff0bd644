"""On the GPU: recorded calls whose selection runs on a second stream give the bits of one stream.

Memory is filled with NaN right before and after the calls, and either stream is held up.
"""

import random
import threading

import pytest
import torch

import nsa
from nsa import recordings
from nsa.fused import streams
from nsa.fused.memory import workspace_bytes
from nsa.fused.sizes import make_sizes
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

HEADS, KV_HEADS, DIM = 32, 8, 128
QUERIES = 8192
KEYS = (8192, 12288, 32768)  # scores of the last are a product of PyTorch's
CYCLES = 10_000_000
"""For which a stream is held up: longer than a call takes."""


@pytest.fixture
def forks(monkeypatch):
    """Names of the marks that recorded calls pass."""
    monkeypatch.setattr(recordings, "ENABLED", True)
    recordings.clear()
    found = []

    def counted(device, marks=streams._marks):
        def count(name, function):
            def call():
                found.append(name)
                function()

            return call

        return {name: count(name, function) for name, function in marks(device).items()}

    monkeypatch.setattr(streams, "_marks", counted)
    yield found
    recordings.clear()


def step_by_step(call):
    recordings.ENABLED = False
    try:
        return call()
    finally:
        recordings.ENABLED = True


class Chunk:
    """The last queries of a sequence, and what a call on one stream gives for them."""

    def __init__(self, keys: int, queries: int = QUERIES):
        kind = dict(device="cuda", dtype=torch.bfloat16)
        self.q = torch.randn(1, queries, HEADS, DIM, **kind)
        self.k, self.v = torch.randn(2, 1, keys, KV_HEADS, DIM, **kind)
        self.weight = torch.randn(HEADS, 3, DIM, **kind) / 16
        self.wanted = step_by_step(self.again)

    def forward(self, *inputs) -> torch.Tensor:
        q, k, v = inputs or (self.q, self.k, self.v)
        return nsa.forward(q, k, v, gate_proj_weight=self.weight, backend="fused")

    @torch.no_grad()
    def again(self) -> torch.Tensor:
        return self.forward()

    def step(self):
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = self.forward(*leaves)
        return out.detach(), torch.autograd.grad(out, leaves, self.q)

    def warm_up(self):
        for _ in range(3):
            self.again()


def fill_with_nan():
    """Write NaN to free memory of the current stream, in the sizes that calls allocate."""
    sizes = (65536, 65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 64, 4, 1)
    for x in [torch.empty(size << 10, dtype=torch.uint8, device="cuda") for size in sizes]:
        x.fill_(255)


def hold_up(second: bool):
    """Keep a stream busy, so that the other and the host are far ahead."""
    stream = torch.cuda.current_stream()
    if second:
        stream = streams._side_streams(torch.device("cuda", torch.cuda.current_device()))[0]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)


def differing(found: list) -> list[int]:
    torch.cuda.synchronize()
    return [i for i, (chunk, out) in enumerate(found) if not torch.equal(out, chunk.wanted)]


def test_many_calls(forks):
    chunks = [Chunk(keys) for keys in KEYS] + [Chunk(8447, 8191)]
    for chunk in chunks:
        chunk.warm_up()
    torch.cuda.synchronize()
    forks.clear()
    draw, found = random.Random(0), []
    for turn in range(60):
        chunk = draw.choice(chunks)
        fill_with_nan()
        if turn % 3:
            hold_up(second=turn % 3 == 2)
        out = chunk.again()
        fill_with_nan()
        found.append((chunk, out))
        if len(found) == 12:
            assert not differing(found)
            found.clear()
    assert forks == ["fork", "enter", "join"] * 60


def test_with_backward(forks):
    """Gradients are added in any order, so their last bits differ."""
    chunk = Chunk(KEYS[1])
    wanted, wanted_gradients = step_by_step(chunk.step)
    for turn in range(8):
        fill_with_nan()
        hold_up(second=turn % 2 == 1)
        out, gradients = chunk.step()
        fill_with_nan()
        assert torch.equal(out, wanted)
        for x, y in zip(gradients, wanted_gradients, strict=True):
            assert (x.float() - y.float()).norm() <= 1e-2 * y.float().norm()
    assert forks == ["fork", "enter", "join"] * 7


def test_callers_on_other_streams(forks):
    """They are not recorded, and share the second stream with those that are."""
    chunks = [Chunk(keys) for keys in KEYS]
    for chunk in chunks:
        chunk.warm_up()
    other, found = torch.cuda.Stream(), []
    other.wait_stream(torch.cuda.current_stream())
    forks.clear()
    for turn in range(24):
        chunk = chunks[turn % len(chunks)]
        fill_with_nan()
        hold_up(second=turn % 4 == 0)
        if turn % 2:
            found.append((chunk, chunk.again()))
            continue
        with torch.cuda.stream(other):
            fill_with_nan()
            found.append((chunk, chunk.again()))
            fill_with_nan()
    assert not differing(found)
    assert forks == ["fork", "enter", "join"] * 12


def test_threads(forks):
    chunks = [Chunk(keys) for keys in KEYS]
    for chunk in chunks:
        chunk.warm_up()
    torch.cuda.synchronize()
    forks.clear()
    wrong, errors = [], []

    def work(number: int):
        try:
            found = []
            for turn in range(20):
                chunk = chunks[(turn + number) % len(chunks)]
                fill_with_nan()
                if turn % 5 == number:
                    hold_up(second=number == 1)
                found.append((chunk, chunk.again()))
                fill_with_nan()
                if len(found) == 5:
                    wrong.extend(differing(found))
                    found.clear()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not wrong
    assert len(forks) == 3 * 60


def test_errors_leave_the_callers_stream(forks, monkeypatch):
    chunk, enter = Chunk(KEYS[0]), []
    real = streams._marks

    def failing(device):
        marks = real(device)

        def fail():
            marks["enter"]()
            if enter:
                raise RuntimeError("inside of the block")

        return marks | dict(enter=fail)

    monkeypatch.setattr(streams, "_marks", failing)
    chunk.warm_up()
    for _ in range(3):
        enter.append(True)
        hold_up(second=True)
        with pytest.raises(RuntimeError, match="inside of the block"):
            chunk.again()
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        fill_with_nan()
        enter.clear()
        assert torch.equal(chunk.again(), chunk.wanted)


def test_graph_capture_after_a_recording(forks):
    chunk = Chunk(KEYS[1])
    chunk.warm_up()
    forks.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chunk.again()
    assert not forks
    for _ in range(3):
        fill_with_nan()
        recorded = chunk.again()
        graph.replay()
        fill_with_nan()
        assert not differing([(chunk, out), (chunk, recorded)])


def test_compiled(forks):
    chunk = Chunk(KEYS[1])
    compiled = torch.compile(lambda q, k, v: chunk.forward(q, k, v), fullgraph=True)
    with torch.no_grad():
        for turn in range(6):
            fill_with_nan()
            hold_up(second=turn % 2 == 1)
            out = compiled(chunk.q, chunk.k, chunk.v)
            fill_with_nan()
            assert torch.equal(out, chunk.wanted)
    assert forks


def test_memory_is_within_the_estimate(forks):
    chunk = Chunk(KEYS[-1])
    chunk.warm_up()
    sizes = make_sizes(chunk.q, nsa.NSAConfig(), None, num_keys=KEYS[-1], num_kv_heads=KV_HEADS)
    limit = workspace_bytes(sizes, KV_HEADS, save=False, recompute=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = chunk.again()
    assert torch.cuda.max_memory_allocated() - before - out.nbytes <= limit


@pytest.mark.parametrize("queries", [4096, 4352])
def test_short_calls_have_one_stream(queries, forks):
    """They take the host longer than the GPU."""
    chunk = Chunk(KEYS[0], queries)
    for _ in range(3):
        assert torch.equal(chunk.again(), chunk.wanted)
    assert bool(forks) == (queries > 4096)
