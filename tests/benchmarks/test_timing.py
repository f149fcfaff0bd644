"""How the benchmarks time GPU work, with stand-ins for the GPU."""

import pytest
import torch

from measuring import timing
from measuring.timing import Timing


@pytest.fixture
def fake_gpu(monkeypatch):
    """Steps return the milliseconds that they take, or raise."""
    monkeypatch.setattr(timing, "timed_in_a_row", lambda step, calls, _: [step()] * calls)
    monkeypatch.setattr(timing, "timed_with_peak", lambda step: (step(), 1.5))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def capture(step):
        if step() > 500:
            raise RuntimeError("a copy to the host")
        return lambda: step() / 2

    monkeypatch.setattr(timing, "capture", capture)


def test_measure(fake_gpu):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    steps = {
        "short": lambda: 10.0,
        "long": lambda: 3000.0,
        "once": lambda: 3000.0,
        "large": out_of_memory,
        "launched": lambda: 10.0,
    }
    graphs = ("short", "long", "once", "large")
    timings = timing.measure(steps, repeats=8, seconds=0.05, graphs=graphs, once=("once",))
    assert timings["short"] == Timing([10.0] * 5, [5.0] * 5, 1.5)
    no_graph = "no CUDA graph: a copy to the host"
    assert timings["long"] == Timing([3000.0] * 3, [], 1.5, no_graph)
    assert timings["once"] == Timing([3000.0], [], 1.5)
    assert timings["large"] == Timing([], [], None, "out of memory")
    assert timings["launched"] == Timing([10.0] * 5, [], 1.5)


def test_calls_in_a_row_are_timed_from_one_end_to_the_next(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            self.time = None

        def record(self):
            self.time = clock[0]

        def synchronize(self):
            clock[0] += 1000

        def elapsed_time(self, end):
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    durations = iter([40.0, 50.0, 1.0, 2.0, 3.0])

    def step():
        clock[0] += next(durations)

    assert timing.timed_in_a_row(step, 3, 2) == [1, 2, 3]


def test_a_first_call_that_compiles_is_not_a_measurement(fake_gpu, monkeypatch):
    seconds = iter([60.0, 2.5])
    counts = iter([{}, {"compile": 1}])
    monkeypatch.setattr(timing, "kernel_variants", lambda: next(counts))
    step = {"dense": lambda: 1000 * next(seconds)}
    assert timing.measure(step, repeats=5, seconds=3, once=step)["dense"].eager == [2500.0]
