"""Runs work on a second stream, for kernels that do not fill the GPU.

This happens for short inputs, while a CUDA graph is captured and in some recorded calls. Elsewhere
the kernels of short inputs end before the host has launched what could run beside them. Long inputs
gain nothing, because their kernels fill the GPU, and their workspace would be split.
"""

from collections.abc import Callable
from functools import lru_cache
from threading import local

import torch
from torch import Tensor

from nsa.host import RecordingMode, is_capturing
from nsa.recorded_graphs import second_stream

SHORT = 1 << 27
"""The most elements of the queries for which a second stream is used: 32K tokens, H=32, D=128."""

LEAST = 1 << 24
"""The fewest for which a recorded call uses one: 4K tokens. Below, the host may take longer."""


class SideStream:
    """Runs a ``with`` block beside the work launched between this object's creation and the block.

    The block's work waits for all launches before the creation, and launches after the block wait
    for both. The block's kernels run first if both are ready. Put the smaller kernels in the block,
    because they would otherwise wait for the others to end.

    Tensors from the block may be used after it. In a graph only a later block reuses their memory,
    and so only after all launches before that block's object was made. :mod:`nsa.recorded_streams`
    says what a recorded call does.

    Args:
        q: the queries.
        recorded: whether a recorded call has the second stream too, when it runs again.
    """

    def __init__(self, q: Tensor, *, recorded: bool = False):
        self._inside = None
        self._recorder = RecordingMode.current() if recorded and _gains(q) else None
        if self._recorder is not None:
            self._marks = _marks(q.device)
            self._mark("fork")
        elif is_capturing(q) and q.numel() <= SHORT:
            self._outside = torch.cuda.current_stream(q.device)
            # Within a block on the second stream, what runs beside needs a third.
            self._stream = next(x for x in _side_streams(q.device) if x != self._outside)
            self._stream.wait_stream(self._outside)
            self._inside = torch.cuda.stream(self._stream)

    def _mark(self, name: str) -> None:
        if self._recorder is not None:
            self._recorder.mark(name, self._marks[name])

    def __enter__(self) -> None:
        self._mark("enter")
        if self._inside is not None:
            self._inside.__enter__()

    def __exit__(self, *error) -> None:
        self._mark("join")
        if self._inside is not None:
            self._inside.__exit__(*error)
            self._outside.wait_stream(self._stream)


def _gains(q: Tensor) -> bool:
    """Whether a recorded call takes less time with a second stream."""
    return q.is_cuda and LEAST <= q.numel() <= SHORT


@lru_cache(maxsize=None)
def _marks(device: torch.device) -> dict[str, Callable[[], None]]:
    """What the marks of :mod:`nsa.recorded_streams` do.

    Each wait makes an event of its own.
    """
    on_thread = local()

    def fork() -> None:
        on_thread.first = torch.cuda.current_stream(device)
        on_thread.second = second_stream() or _side_streams(device)[0]
        on_thread.second.wait_stream(on_thread.first)

    def enter() -> None:
        torch.cuda.set_stream(on_thread.second)

    def join() -> None:
        torch.cuda.set_stream(on_thread.first)
        on_thread.first.wait_stream(on_thread.second)

    return dict(fork=fork, enter=enter, join=join)


@lru_cache(maxsize=None)
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    # High priority, because a kernel waits for all CTAs of earlier kernels unless those have a
    # lower priority.
    second, third = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
    return second, third
