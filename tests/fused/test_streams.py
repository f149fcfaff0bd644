"""The order of streams that run side by side, with stand-ins for CUDA's."""

import pytest
import stand_in_streams
import torch

from nsa.fused import streams

Q = torch.zeros(1, 4, 2, 8)


@pytest.fixture
def log(monkeypatch):
    """What is done with streams while a graph is captured."""
    monkeypatch.setattr(streams, "is_capturing", lambda _: True)
    return stand_in_streams.install(monkeypatch)


def run(log, **options):
    beside = streams.Beside(Q, **options)
    log.append("first")
    with beside:
        log.append("second")
    log.append("after")


FORKED = ["side waits for main", "first", "on side", "second", "off side", "main waits for side",
          "after"]  # fmt: skip


def test_forks_before_and_joins_after(log):
    run(log)
    assert log == FORKED


def test_forks_always_where_that_is_asked(log, monkeypatch):
    monkeypatch.setattr(streams, "SHORT", 0)
    monkeypatch.setattr(streams, "is_capturing", lambda _: False)
    run(log, always=True)
    assert log == FORKED


def test_joins_after_an_error(log):
    beside = streams.Beside(Q)
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
