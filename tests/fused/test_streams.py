"""The order of streams that run side by side, with stand-ins for CUDA's."""

import contextlib

import pytest
import torch

from nsa.fused import streams

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
