"""One rank of many on one GPU, and the time that it would take with the links of the others.

PyTorch's "fake" process group lets this process be any rank. Collectives are replaced: what would
be received is made of what is sent, and CUDA events mark where each collective is issued and where
its result is waited for. :func:`replay` then puts measured compute and assumed transfers together.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa.distributed import collectives


class Link(NamedTuple):
    """Milliseconds before a transfer, and its bytes in a millisecond."""

    latency: float
    rate: float

    def milliseconds(self, received: int) -> float:
        return self.latency + received / self.rate


class Mark(NamedTuple):
    """What a rank does after ``compute`` milliseconds: "issue", "wait" or "end".

    Attributes:
        number: of the collective.
        received: bytes that it receives from other ranks; with "issue".
    """

    compute: float
    kind: str
    number: int = 0
    received: int = 0


class Replayed(NamedTuple):
    """Milliseconds of a step, of which ``compute`` is work and ``exposed`` waits for transfers."""

    total: float
    compute: float
    exposed: float
    transfers: float


def replay(marks: list[Mark], link: Link) -> Replayed:
    """The time of a step whose transfers run one after another beside the compute."""
    now = free = compute = transfers = 0.0
    arrival: dict[int, float] = {}
    for mark in marks:
        now += mark.compute
        compute += mark.compute
        if mark.kind == "issue":
            duration = link.milliseconds(mark.received)
            free = max(free, now) + duration
            transfers += duration
            arrival[mark.number] = free
        elif mark.kind == "wait":
            now = max(now, arrival[mark.number])
    return Replayed(now, compute, now - compute, transfers)


@contextlib.contextmanager
def one_rank(rank: int, ranks: int) -> Iterator[distributed.ProcessGroup]:
    """The group of a process that is ``rank`` of ``ranks``."""
    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        group = distributed.group.WORLD
        assert group is not None
        with (
            patch.object(collectives, "all_gather", _gather),
            patch.object(collectives, "reduce_scatter", _reduce_scatter),
            patch.object(collectives, "all_to_all", _all_to_all),
            patch.object(collectives, "after", _when_waited_for),
            patch.object(collectives, "beside", lambda _: contextlib.nullcontext()),
        ):
            yield group
    finally:
        distributed.destroy_process_group()


def marks_of(step: Callable[[], object]) -> list[Mark]:
    """What a step of :func:`one_rank` does, timed on the GPU."""
    torch.cuda.synchronize()
    with _recording() as events:
        events.append((_event(), "start", 0, 0))
        step()
        events.append((_event(), "end", 0, 0))
    torch.cuda.synchronize()
    marks = []
    before = events[0][0]
    for event, kind, number, received in events[1:]:
        # What stands for a transfer takes no compute.
        compute = 0.0 if kind == "arrived" else before.elapsed_time(event)
        before = event
        if kind == "arrived":
            continue
        marks.append(Mark(compute, kind, number, received))
    return marks


_events: list | None = None


@contextlib.contextmanager
def _recording() -> Iterator[list]:
    global _events
    _events = []
    try:
        yield _events
    finally:
        _events = None


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class _Transfer:
    """A collective that is under way, as :mod:`torch.distributed` gives it."""

    def __init__(self, move: Callable[[], None], received: int, timed: bool):
        self._number = None
        if _events is None or not timed:
            move()
            return
        self._number = len(_events)
        _events.append((_event(), "issue", self._number, received))
        move()
        _events.append((_event(), "arrived", self._number, 0))

    def wait(self):
        if self._number is not None and _events is not None:
            _events.append((_event(), "wait", self._number, 0))


def _gather(out: Tensor, x: Tensor, *, group, async_op: bool) -> _Transfer:
    parts, ranks = out.view(group.size(), *x.shape), group.size()

    def move():
        if x.is_floating_point():
            # Other signs of the channels for each sender: rows that were equal would be ties.
            signs = _signs(ranks, x.shape[-1], group.rank(), x.dtype, x.device)
            torch.mul(x, signs.view(ranks, *(1,) * (x.ndim - 1), -1), out=parts)
        else:
            parts.copy_(x.expand_as(parts))

    return _Transfer(move, (ranks - 1) * x.nbytes, x.is_cuda)


def _reduce_scatter(out: Tensor, x: Tensor, *, group, async_op: bool) -> _Transfer:
    own = x.view(group.size(), *out.shape)[group.rank()]
    return _Transfer(lambda: out.copy_(own), (group.size() - 1) * out.nbytes, x.is_cuda)


def _all_to_all(out: Tensor, x: Tensor, *, group, async_op: bool, **sizes) -> _Transfer:
    # With sizes, all of two ranks is for the other one.
    received = out.nbytes if sizes else (group.size() - 1) * x.nbytes // group.size()

    def move():
        for part in out.split(len(x)):
            part.copy_(x[: len(part)])

    return _Transfer(move, received, x.is_cuda)


def _when_waited_for(work, function: Callable[[], None], device: torch.device) -> Callable:
    """Count what follows a collective as compute, though it would run beside other work."""

    def wait():
        work.wait()
        function()

    return wait


@lru_cache
def _signs(
    ranks: int, channels: int, rank: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (ranks, channels), generator=generator) * 2 - 1
    signs[rank] = 1
    return signs.to(device, dtype)
