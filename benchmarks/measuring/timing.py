"""Times of GPU work, in alternating blocks, with and without a CUDA graph; and peak memory."""

import contextlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from measuring.variants import kernel_variants

LONG_SECONDS = 2.0
"""A call that takes longer may be measured once."""

BLOCKS = 2
"""Blocks of repetitions that each step gets, in turn with the others."""

SETTLE_MILLISECONDS = 100
"""Calls before a block that are not timed. The GPU's clock follows the power it drew before: a
short call just after a long one of another step runs at the clock that the other one left."""

SETTLE_CALLS = 20
"""At most so many calls to settle."""

Step = Callable[[], object]


@dataclass
class Timing:
    """Milliseconds of each repetition, and the peak memory of one of them, inputs included.

    Attributes:
        eager: launched from Python.
        graph: replayed as a CUDA graph; empty if not asked for or not possible.
        peak_gib: None if the call did not fit.
        note: what went wrong, if anything.
    """

    eager: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    note: str = ""


class _Counts(NamedTuple):
    repeats: int
    settle: int  # calls before a block of repetitions


def measure(
    steps: dict[str, Step],
    *,
    repeats: int,
    seconds: float,
    graphs: Collection[str] = (),
    once: Collection[str] = (),
    blocks: int = BLOCKS,
) -> dict[str, Timing]:
    """Time some steps, each in blocks of repetitions that alternate with the others'.

    Args:
        steps: what to time, by name.
        repeats: the most repetitions of each step.
        seconds: time limit of each step. Repetitions are reduced to fit it, but to no less than 3
            and one a block.
        graphs: names of steps to time as CUDA graphs too.
        once: names of steps that are called only once if that takes over ``LONG_SECONDS``.
        blocks: blocks of repetitions of each step. A ratio of few per cent needs more of them,
            because the GPU's clock drifts by as much within seconds.
    """
    timings = {name: Timing() for name in steps}
    counts = {}
    for name, step in steps.items():
        first = _first_call(step, timings[name])
        if first is None:
            continue
        counts[name] = _Counts(
            repeats=max(3, blocks, min(repeats, int(1000 * seconds / first))),
            settle=min(SETTLE_CALLS, math.ceil(SETTLE_MILLISECONDS / first)),
        )
        if name in once and first > 1000 * LONG_SECONDS:
            timings[name].eager.append(first)
            counts[name] = counts[name]._replace(repeats=0)
    _alternate({name: steps[name] for name in counts}, counts, timings, "eager", blocks)
    replays = {}
    for name in (name for name in graphs if name in counts and counts[name].repeats):
        try:
            replays[name] = capture(steps[name])
        except RuntimeError as error:
            timings[name].note = f"no CUDA graph: {error}"
    _alternate(replays, counts, timings, "graph", blocks)
    return timings


def timed(step: Step) -> float:
    """Milliseconds of one call alone, from the start to the end of the GPU's work."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed_in_a_row(step: Step, calls: int, settle: int) -> list[float]:
    """Milliseconds from the end of one call to the end of the next, after ``settle`` untimed calls.

    This is how the layers of a model run: the host launches a call while the GPU still does the one
    before. The host's time shows only if the GPU waits for it.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    for _ in range(settle - 1):
        step()
    for event in events:
        step()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def timed_with_peak(step: Step) -> tuple[float, float]:
    """Milliseconds of one call, and the peak of allocated memory in GiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = timed(step)
    return milliseconds, torch.cuda.max_memory_allocated() / 2**30


def capture(step: Step) -> Step:
    """The replay of ``step`` as a CUDA graph.

    Raises:
        RuntimeError: the step does what a graph cannot hold, such as waiting for the GPU.
    """
    stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(stream)
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    stream.wait_stream(side)
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            step()
    except RuntimeError as error:
        # After a failed capture, PyTorch leaves its stream current and its pool open.
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        # Ending the capture fails too, with a less useful message than the original error.
        cause = error.__context__ or error
        raise RuntimeError(str(cause).partition("\n")[0]) from None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _first_call(step: Step, timing: Timing) -> float | None:
    """Warm up, note the peak, and return the time; None if memory does not suffice."""
    variants = kernel_variants()
    try:
        milliseconds, timing.peak_gib = timed_with_peak(step)
        if kernel_variants() != variants:
            # That time included compilation.
            milliseconds, timing.peak_gib = timed_with_peak(step)
        return milliseconds
    except torch.OutOfMemoryError:
        timing.note = "out of memory"
    torch.cuda.empty_cache()
    return None


def _alternate(
    steps: dict[str, Step],
    counts: dict[str, _Counts],
    timings: dict[str, Timing],
    kind: str,
    blocks: int,
):
    for block in range(blocks):
        for name, step in steps.items():
            done, rest = divmod(counts[name].repeats, blocks)
            repeats = done + (block < rest)
            if not repeats:
                continue
            times = timed_in_a_row(step, repeats, counts[name].settle)
            getattr(timings[name], kind).extend(times)
