"""Recorded calls as graphs, by stand-ins that know nothing but addresses, as CUDA's do."""

import ctypes
import threading
from functools import partial
from weakref import WeakSet

import pytest
import torch

import nsa
from nsa import recorded_call, recorded_graphs, recorded_parts, recordings
from nsa.recorded_graphs import Graphs
from nsa.testing import make_cu_seqlens
from tests.helpers.recorded_layers import make_layer, modes, new_input, run, with_gradients

TURNS = 6


def at_address(x: torch.Tensor):
    """Gives the tensor of the same form that lies there whenever this is called."""
    address, form = x.data_ptr(), (x.shape, x.stride(), x.dtype)
    size = x.untyped_storage().nbytes() - x.storage_offset() * x.itemsize

    def tensor() -> torch.Tensor:
        if not size:
            return torch.empty_strided(form[0], form[1], dtype=form[2])
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=form[2]).as_strided(*form[:2])

    return tensor


class Captures(list):
    """The captured functions, and how often each was replayed."""

    def capture(self, function, tensors):
        at, there = len(self), [at_address(x) for x in tensors]
        self.append(0)

        def replay():
            self[at] += 1
            function([x() for x in there])

        return replay


@pytest.fixture
def captures(monkeypatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(recorded_graphs, "may_capture", lambda _: True)
    monkeypatch.setattr(recorded_graphs, "capture", found.capture)
    return found


@pytest.fixture
def same_addresses(monkeypatch):
    """Begins a step, whose allocations have the addresses that they had in the step before."""
    memories: list[torch.Tensor] = []
    place = iter(())
    allocate = recorded_call.RecordedPart.allocate

    def allocate_there(self):
        if self in recorded_parts._plans.values():  # A Packing keeps what they give.
            return allocate(self)
        found = []
        for x in allocate(self):
            at = next(place)
            while len(memories) <= at:
                memories.append(torch.empty(1 << 23, dtype=torch.uint8))
            memory = memories[at][: x.untyped_storage().nbytes()].view(x.dtype)
            poison = torch.nan if x.is_floating_point() else 17
            found.append(memory.as_strided(x.shape, x.stride()).fill_(poison))
        return found

    def begin():
        nonlocal place
        place = iter(range(10**6))

    monkeypatch.setattr(recorded_call.RecordedPart, "allocate", allocate_there)
    return begin


def double(tensors):
    torch.add(tensors[0], tensors[0], out=tensors[1])


def test_the_third_call_with_the_same_addresses_is_captured(captures):
    graphs, x, y = Graphs(double), torch.zeros(3), torch.empty(3)
    for turn in range(6):
        x.fill_(turn)
        graphs.run([x, y])
        assert y.tolist() == [2 * turn] * 3
        assert captures == ([] if turn < 2 else [turn - 2])


@pytest.mark.parametrize("at", [0, 1])
def test_other_addresses_are_another_graph(at, captures):
    graphs, tensors = Graphs(double), [torch.ones(3), torch.empty(3)]
    for _ in range(4):
        graphs.run(tensors)
    others = list(tensors)
    others[at] = torch.full((3,), 5.0)
    tensors[1].fill_(0)
    for _ in range(4):
        graphs.run(others)
        assert others[1].tolist() == [10 if at == 0 else 2] * 3
    assert captures == [1, 1]


def test_a_switch_and_where_graphs_may_not_run(captures, monkeypatch):
    graphs, tensors = Graphs(double), [torch.ones(3), torch.empty(3)]
    monkeypatch.setattr(recorded_graphs, "ENABLED", False)
    for _ in range(4):
        graphs.run(tensors)
    monkeypatch.setattr(recorded_graphs, "ENABLED", True)
    monkeypatch.setattr(recorded_graphs, "may_capture", lambda _: False)
    for _ in range(4):
        graphs.run(tensors)
    assert not captures
    monkeypatch.undo()
    assert not recorded_graphs.may_capture(tensors)


def test_what_cannot_be_captured_runs_step_by_step(captures, monkeypatch):
    tried = []

    def fail(*_):
        tried.append(1)
        raise RuntimeError("not here")

    monkeypatch.setattr(recorded_graphs, "capture", fail)
    graphs, x, y = Graphs(double), torch.ones(3), torch.empty(3)
    for turn in range(6):
        graphs.run([x.fill_(turn), y])
        assert y.tolist() == [2 * turn] * 3
    assert len(tried) == 1


@pytest.mark.parametrize("backend", ["native", "pluggable"])
def test_allocators_without_pools(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    with pytest.raises(RuntimeError, match=r"pools (of|keep no) memory"):
        recorded_graphs._Streams(torch.device("cuda"))


def test_few_graphs_are_kept_and_captured_ever_later(captures, monkeypatch):
    monkeypatch.setattr(recorded_graphs, "_all", WeakSet())
    monkeypatch.setattr(recorded_graphs, "MAX_GRAPHS", 4)
    functions = [Graphs(double), Graphs(double)]
    places = [[torch.ones(3), torch.empty(3)] for _ in range(5)]
    counts = []
    for _ in range(40):
        for tensors in places:
            for graphs in functions:
                graphs.run(tensors)
        counts.append(len(captures))
        assert sum(len(graphs._replays) for graphs in functions) <= 4
    # A quarter of the turns would capture all again and again.
    assert counts[-1] < 60


PRODUCTS = (
    "allow_fp16_accumulation",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
SETTINGS = {name: partial(setattr, torch.backends.cuda.matmul, name) for name in PRODUCTS}
SETTINGS["deterministic"] = torch.use_deterministic_algorithms


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_another_graph(name, captures):
    graphs, tensors, change = Graphs(double), [torch.ones(3), torch.empty(3)], SETTINGS[name]
    before = {name: getattr(torch.backends.cuda.matmul, name) for name in PRODUCTS}
    try:
        for turn in range(8):
            change(turn < 4)
            graphs.run(tensors)
    finally:
        for setting, value in before.items():
            setattr(torch.backends.cuda.matmul, setting, value)
        torch.use_deterministic_algorithms(False)
    assert captures == [1, 1]


def test_few_addresses_are_remembered(captures, monkeypatch):
    monkeypatch.setattr(recorded_graphs, "MAX_SEEN", 3)
    graphs, kept = Graphs(double), []
    for _ in range(20):
        kept.append([torch.ones(3), torch.empty(3)])
        graphs.run(kept[-1])
    assert len(graphs._seen) == 3


def test_threads_take_turns(captures, monkeypatch):
    """A graph runs once at a time, and so does a capture."""
    clashes = []

    def alone(function, lock):
        def call(*args):
            if not lock.acquire(blocking=False):
                clashes.append(function)
                return function(*args)
            threading.Event().wait(0.001)
            try:
                return function(*args)
            finally:
                lock.release()

        return call

    replaying, capturing = threading.Lock(), threading.Lock()

    def capture(function, tensors):
        return alone(captures.capture(function, tensors), replaying)

    monkeypatch.setattr(recorded_graphs, "capture", alone(capture, capturing))
    graphs = Graphs(double)
    places = [[torch.ones(3), torch.empty(3)] for _ in range(4)]

    def work(tensors):
        for _ in range(20):
            graphs.run(tensors)

    for tensors in places[:2]:
        work(tensors)
    threads = [threading.Thread(target=work, args=(tensors,)) for tensors in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert captures
    assert not clashes


def train(layer, call, x, dy, turn, begin) -> list[torch.Tensor]:
    """One step that changes weights in place; the layer's results and its weights after it."""
    begin()
    with torch.no_grad():
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(turn)))
    parameters = list(layer.parameters())
    y = call(x)
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    with torch.no_grad():
        for p, grad in zip(parameters, grads[1:], strict=True):
            p.sub_(grad, alpha=1e-4)
    return [x.clone() for x in (y.detach(), *grads, *parameters)]


@modes
@pytest.mark.parametrize("packed", [False, True])
def test_layers_train_alike(mode, packed, captures, same_addresses, emulated, unread):
    """All that a graph depends on is at addresses that it is known by."""
    bounds = nsa.Packing(make_cu_seqlens([100, 0, 200])) if packed else None
    results = []
    for as_graphs in (False, True):
        recorded_graphs.ENABLED = as_graphs
        recordings.clear()
        try:
            layer = make_layer(mode)
            x = new_input()[0] if packed else new_input()
            x.requires_grad_()
            dy = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
            call = partial(layer, cu_seqlens=bounds) if packed else layer
            turns = [train(layer, call, x, dy, turn, same_addresses) for turn in range(TURNS)]
        finally:
            recorded_graphs.ENABLED = True
        results.append(turns)
    for turn in range(TURNS):
        assert all(map(torch.equal, results[0][turn], results[1][turn])), turn
    # One graph of the forward and one of the backward, from the third recorded call on.
    assert captures == [TURNS - 4, TURNS - 4]


def test_a_weight_in_another_place(captures, same_addresses, emulated):
    layer = make_layer()
    x = new_input().requires_grad_()
    for turn in range(8):
        if turn == 5:
            layer.q_proj.weight.data = torch.randn_like(layer.q_proj.weight) / 16
        same_addresses()
        got = with_gradients(layer, x.detach(), layer.parameters())
        wanted = with_gradients(layer._forward, x.detach(), layer.parameters())
        assert all(map(torch.equal, got, wanted))


def test_calls_without_gradients(captures, same_addresses):
    x, y = torch.zeros(3), torch.ones(3)
    for turn in range(6):
        same_addresses()
        got = run("key", lambda x, y: x @ y + x.sum() * y, [x.fill_(turn), y])
        assert torch.equal(got, x @ y + x.sum() * y)
    assert captures == [2]


def test_large_calls_are_not_captured(captures, same_addresses, monkeypatch):
    for most in (2, 3):
        monkeypatch.setattr(recorded_graphs, "MAX_ELEMENTS", most)
        x = torch.ones(3)
        for _ in range(6):
            same_addresses()
            run(most, lambda x: x * 2, [x])
        assert bool(captures) == (most == 3)
