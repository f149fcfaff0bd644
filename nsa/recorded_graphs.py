"""CUDA graphs of recorded functions, by the addresses of their tensors.

A training step asks PyTorch for the same memory as the one before, in the same order, and mostly
gets it at the same addresses. All that a recorded function does then follows from these: the forms
of its tensors are known, and it allocates nothing. So where the same addresses come again, its
launches are captured once, and one launch of the graph takes the place of all. With other addresses
the steps run one by one.

A graph holds no memory of the call. Products ask PyTorch for workspace while they are captured,
which stays in a pool of its own. All graphs run on the default stream, one after another, so they
may share it.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import import_module
from threading import Lock, local
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor

_logger = logging.getLogger("nsa")

ENABLED = True
"""Whether recorded calls are captured. ``nsa.recorded_graphs.ENABLED = False`` turns it off."""

MAX_ELEMENTS = 1 << 24
"""Elements of the first tensor up to which calls are captured, such as 16K tokens of 1024 channels.
In larger ones the host is ahead of the GPU, which starts a graph some 25 us later than a kernel."""

MAX_GRAPHS = 2048
"""Graphs to keep, some 0.2 MiB each. A layer has two for each set of addresses that it has."""

MAX_SEEN = 1024
"""Addresses without a graph to remember: those that were called last."""

_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"

Run = Callable[[list[Tensor]], None]


class Graphs:
    """A function of tensors that allocates nothing, and its graphs.

    A graph is captured in the third call with the same addresses. Where addresses change so often
    that ``MAX_GRAPHS`` are not enough, those of all functions are forgotten, and the next ones are
    captured later.
    """

    def __init__(self, run: Run):
        self._run = run
        self._replays: dict[Hashable, Callable[[], None]] = {}
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._least: float = 2
        self._lock = Lock()
        with _lock_of_all:
            _all.add(self)

    def run(self, tensors: list[Tensor]) -> None:
        """Run the function, as a graph where there is one."""
        if not ENABLED or not may_capture(tensors):
            self._run(tensors)
            return
        key = (*[x.data_ptr() for x in tensors], *_settings())
        # Graphs must not be launched by two threads at once. A thread that waits needs no others.
        with self._lock:
            replay = self._replays.get(key)
            if replay is not None:
                replay()
                return
            is_due = self._is_due(key)
        self._run(tensors)
        if is_due:
            self._capture(key, tensors)

    def _is_due(self, key: Hashable) -> bool:
        count = self._seen.pop(key, 0) + 1
        if count > self._least:
            return True
        self._seen[key] = count
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return False

    def _capture(self, key: Hashable, tensors: list[Tensor]) -> None:
        # One at a time, because captures share a stream. Another thread has more turns.
        if not _one_captures.acquire(blocking=False):
            return
        try:
            replay = capture(self._run, tensors)
        except Exception as error:
            _logger.debug("a recorded call is not captured: %r", error)
            # It would fail again.
            self._least = float("inf")
            return
        finally:
            _one_captures.release()
        with _lock_of_all:
            functions = list(_all)
        if sum(len(graphs._replays) for graphs in functions) >= MAX_GRAPHS:
            for graphs in functions:
                graphs._forget()
        with self._lock:
            self._replays[key] = replay

    def _forget(self) -> None:
        with self._lock:
            self._replays.clear()
            self._least *= 2


_all: WeakSet[Graphs] = WeakSet()
_lock_of_all = Lock()


def _settings() -> tuple[Hashable, ...]:
    """What else PyTorch's operations in 16 bits go by."""
    return (
        torch._C._get_cublas_allow_fp16_accumulation(),
        torch._C._get_cublas_allow_fp16_reduced_precision_reduction(),
        torch._C._get_cublas_allow_bf16_reduced_precision_reduction(),
        torch._C._get_blas_preferred_backend(),
        torch._C._get_deterministic_algorithms(),
    )


def may_capture(tensors: Sequence[Tensor]) -> bool:
    """Whether graphs may run: on a GPU and its default stream, which cannot be captured."""
    x = tensors[0]
    return x.is_cuda and torch._C._cuda_getCurrentRawStream(x.device.index) == 0


def capture(run: Run, tensors: list[Tensor]) -> Callable[[], None]:
    """Launches again what ``run(tensors)`` does, in the memory that has these addresses then."""
    device = tensors[0].device
    streams, launch = _streams(device), _runtime().cudaGraphLaunch
    with (
        torch.cuda.stream(streams.first),
        torch.cuda.use_mem_pool(streams.pool, device),
        _capturing(streams.second),
    ):
        graph = _Graph(streams.first, partial(run, tensors))

    def replay() -> None:
        # On the default stream, which is the null stream.
        _check(launch(graph.launched, 0))

    return replay


class _Graph:
    """A CUDA graph of what ``run()`` launches on a stream.

    :class:`torch.cuda.CUDAGraph` is not used because it also captures random numbers, and leaves
    PyTorch's generator unusable where it fails.
    """

    def __init__(self, stream: torch.cuda.Stream, run: Callable[[], None]):
        runtime = _runtime()
        # Another mode forbids this thread what it may do on other streams.
        relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
        _check(runtime.cudaStreamBeginCapture(stream.cuda_stream, relaxed))
        try:
            run()
        except BaseException:
            code, graph = runtime.cudaStreamEndCapture(stream.cuda_stream)
            if not int(code):
                runtime.cudaGraphDestroy(graph)
            # PyTorch would raise it at its next launch.
            runtime.cudaGetLastError()
            raise
        (graph,) = _check(runtime.cudaStreamEndCapture(stream.cuda_stream))
        try:
            (self.launched,) = _check(runtime.cudaGraphInstantiate(graph, 0))
        finally:
            runtime.cudaGraphDestroy(graph)
        # A graph that still runs is destroyed when it has ended.
        finalize(self, runtime.cudaGraphExecDestroy, self.launched).atexit = False


class _Streams:
    """Those of captures. Nobody else uses them, as others may those of PyTorch's pool, so that the
    workspace of products on them is of captures alone."""

    def __init__(self, device: torch.device):
        backend = torch.cuda.get_allocator_backend()
        if backend != "native":
            raise RuntimeError(f"only PyTorch's own allocator has pools of memory, not {backend}")
        if _UNCACHED in os.environ:
            # What a capture frees would be nobody's, though the graph writes to it.
            raise RuntimeError(f"{_UNCACHED} is set, so pools keep no memory")
        # As in nsa.fused.streams, the second has a high priority.
        self.first, self.second = (_new_stream(device, priority) for priority in (0, -1))
        self.pool = torch.cuda.MemPool()


def _new_stream(device: torch.device, priority: int) -> torch.cuda.Stream:
    runtime = _runtime()
    flags = runtime.cudaStreamNonBlocking
    (stream,) = _check(runtime.cudaStreamCreateWithPriority(flags, priority))
    return torch.cuda.ExternalStream(int(stream), device)


@lru_cache(maxsize=None)
def _streams(device: torch.device) -> _Streams:
    return _Streams(device)


@lru_cache(maxsize=None)
def _runtime() -> Any:
    """NVIDIA's bindings, which the fused backend installs."""
    return import_module("cuda.bindings.runtime")


def _check(result: tuple) -> tuple:
    """What a function of the runtime gives after its error code."""
    if int(result[0]):
        _runtime().cudaGetLastError()
        raise RuntimeError(f"CUDA gives {result[0]!r}")
    return result[1:]


@contextmanager
def _capturing(second: torch.cuda.Stream) -> Iterator[None]:
    _captured.second = second
    try:
        yield
    finally:
        _captured.second = None


def second_stream() -> torch.cuda.Stream | None:
    """The second stream of what this thread captures; None if it captures nothing."""
    return getattr(_captured, "second", None)


_captured = local()
_one_captures = Lock()
