"""The order of streams that run side by side, with stand-ins for CUDA's."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import nsa
from nsa.fused import pipeline, streams
from nsa.testing import make_inputs
from tests.helpers.small_configs import tile_config

Q = torch.zeros(1, 4, 2, 8)


class Stream:
    def __init__(self, name, log, current):
        self.name, self.log, self.current = name, log, current

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Inside(contextlib.AbstractContextManager):
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.stream.log.append(f"on {self.stream.name}")
        self.stream.current.append(self.stream)

    def __exit__(self, *error):
        self.stream.log.append(f"off {self.stream.name}")
        self.stream.current.pop()


@pytest.fixture
def log(monkeypatch):
    """What is done with streams while a graph is captured: "main" is current, "side" the second."""
    log, current = [], []
    main, *others = (Stream(name, log, current) for name in ("main", "side", "third"))
    current.append(main)
    monkeypatch.setattr(streams, "is_capturing", lambda _: True)
    monkeypatch.setattr(streams, "_side_streams", lambda _: others)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    return log


def run(log):
    beside = streams.SideStream(Q)
    log.append("first")
    with beside:
        log.append("second")
    log.append("after")


def test_forks_before_and_joins_after(log):
    run(log)
    assert log == ["side waits for main", "first", "on side", "second", "off side",
                   "main waits for side", "after"]  # fmt: skip


def test_a_block_within_a_block_is_beside_both(log):
    with streams.SideStream(Q):
        run(log)
    assert log == [
        *("side waits for main", "on side", "third waits for side", "first", "on third", "second"),
        *("off third", "side waits for third", "after", "off side", "main waits for side"),
    ]


def test_joins_after_an_error(log):
    beside = streams.SideStream(Q)
    with pytest.raises(ValueError, match="inside"), beside:
        raise ValueError("inside")
    assert log[-1] == "main waits for side"


def test_one_stream_for_long_inputs_and_outside_of_a_graph(log, monkeypatch):
    monkeypatch.setattr(streams, "SHORT", Q.numel() - 1)
    run(log)
    assert log == ["first", "second", "after"]
    log.clear()
    monkeypatch.undo()
    run(log)
    assert log == ["first", "second", "after"]


def test_marks_of_a_recorded_call(log, monkeypatch):
    """The first stream is current again before it waits, so that it is if the wait fails."""
    main = torch.cuda.current_stream(None)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda _: main)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: log.append(f"on {stream.name}"))
    marks = streams._marks.__wrapped__(torch.device("cuda", 1))
    for name in ("fork", "enter", "join"):
        marks[name]()
    assert log == ["side waits for main", "on side", "on main", "main waits for side"]


def test_recorded_calls_that_fork():
    """Those that take the GPU longer than the host, and do not fill it."""
    for numel, forks in {
        streams.LEAST - 1: False, streams.LEAST: True,
        streams.SHORT: True, streams.SHORT + 1: False,
    }.items():  # fmt: skip
        q = SimpleNamespace(is_cuda=True, numel=lambda numel=numel: numel)
        assert streams._gains(q) == forks
    assert not streams._gains(torch.zeros(1).expand(streams.LEAST))


@pytest.mark.parametrize("groups", [None, 2])
def test_tile_mode_selects_beside_the_compressed_branch(groups, log, fused_on_cpu, monkeypatch):
    """If the window comes last. Groups are selected before the compressed branch attends them."""
    monkeypatch.setattr(pipeline, "SHORT_TOKENS", 0)
    for name in ("_select_missing", "compressed_attention", "selected_attention", "closing_window"):
        function = getattr(pipeline, name)

        def noted(*arguments, function=function, name=name, **options):
            log.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(pipeline, name, noted)
    config = tile_config(num_cmp_selected_blocks=groups)
    nsa.forward(*make_inputs((1, 300), 4, 2, 16), config=config, backend="fused")
    beside = ["_select_missing", "selected_attention"]
    if groups is None:
        assert log == [
            *("side waits for main", "compressed_attention", "on side", *beside, "off side"),
            *("main waits for side", "closing_window"),
        ]
    else:
        assert log == [beside[0], "compressed_attention", beside[1], "closing_window"]
