"""CUDA's streams without a GPU: what is done with them is written to a log."""

import contextlib

import torch

from nsa.fused import streams


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class Inside(contextlib.AbstractContextManager):
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.stream.log.append(f"on {self.stream.name}")

    def __exit__(self, *error):
        self.stream.log.append(f"off {self.stream.name}")


def install(monkeypatch) -> list[str]:
    """Replace the current stream by "main" and the other by "side"; the log."""
    log = []
    monkeypatch.setattr(streams, "_side_stream", lambda _: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main", log))
    monkeypatch.setattr(torch.cuda, "stream", Inside)
    return log
