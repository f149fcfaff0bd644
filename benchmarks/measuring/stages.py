"""Wrappers around the functions of the fused pipeline, to watch its stages from outside.

A stage is any function that ``nsa.fused.pipeline`` imports from another module of ``nsa.fused``.
Its parts are the functions of ``PART_MODULES`` and the methods of ``PART_CLASSES`` that it calls.
So stages and parts follow the code, and only :func:`measuring.work.stage_work` knows their names.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from inspect import isfunction
from itertools import pairwise
from types import ModuleType

import torch

PACKAGE = "nsa.fused"
PIPELINE = "nsa.fused.pipeline"
# Calls of the attention kernels, calls of our own, and the code that prepares their arguments.
PART_MODULES = ("nsa.fused.block_lists", "nsa.fused.fa4", "nsa.fused.kernel_calls")
NOT_PARTS = ("version_problem",)
PART_CLASSES = ("nsa.fused.row_layouts.AlignedRows", "nsa.fused.row_layouts.FoldedQueries")

Path = tuple[str, ...]
"""The stage, the part of it, the part of that; () is the whole."""


def stage_functions() -> list[Callable]:
    """The stages."""
    pipeline = import_module(PIPELINE)
    return [
        value
        for value in vars(pipeline).values()
        if isfunction(value)
        and value.__module__.startswith(f"{PACKAGE}.")
        and value.__module__ != PIPELINE
    ]


def part_functions() -> list[Callable]:
    """Public functions of ``PART_MODULES``."""
    return [
        value
        for module_name in PART_MODULES
        for name, value in vars(import_module(module_name)).items()
        if isfunction(value) and value.__module__.startswith(module_name)
        if name[0] != "_" and name not in NOT_PARTS
    ]


@contextlib.contextmanager
def watch(enter: Callable[[str], None], leave: Callable[[str], None], *, parts: bool):
    """Call ``enter(name)`` and ``leave(name)`` around each stage, and each part if asked."""

    def watched(function: Callable, name: str) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            enter(name)
            try:
                return function(*args, **kwargs)
            finally:
                leave(name)

        return call

    functions = stage_functions() + (part_functions() if parts else [])
    places = [
        (owner, name, watched(original, original.__name__))
        for owner, name, original in _references(functions)
    ]
    if parts:
        places += [
            (owner, name, watched(original, f"{owner.__name__}.{name}"))
            for owner, name, original in _methods()
        ]
    with _replaced(places):
        yield


@contextlib.contextmanager
def results_of(function: Callable):
    """A list that collects the results of ``function`` of the package inside the ``with`` block."""
    results = []

    @wraps(function)
    def recorded(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    with _replaced([(owner, name, recorded) for owner, name, _ in _references([function])]):
        yield results


@contextlib.contextmanager
def _replaced(places: list[tuple[object, str, Callable]]):
    """Set attributes (owner, name, value), and set them back at the end."""
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, value in places:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def _references(functions: list[Callable]) -> Iterator[tuple[ModuleType, str, Callable]]:
    """Every module of the package that has one of the functions, and under which name."""
    wanted = {id(function) for function in functions}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith(PACKAGE):
            for name, value in vars(module).items():
                if id(value) in wanted:
                    yield module, name, value


def _methods() -> Iterator[tuple[type, str, Callable]]:
    for path in PART_CLASSES:
        module_name, _, class_name = path.rpartition(".")
        owner = getattr(import_module(module_name), class_name)
        for name, value in vars(owner).items():
            if isfunction(value) and name[0] != "_":
                yield owner, name, value


class StageTimes:
    """Time spent in each stage and part. The time between them belongs to the whole.

    Args:
        now: makes a mark; :func:`event_mark` for the GPU's time, :func:`host_mark` for the host's.
    """

    def __init__(self, now: Callable[[], object]):
        self.now = now
        self.stack: list[str] = []
        self.marks: list[tuple[object, Path]] = []
        self.calls: dict[Path, int] = {}

    def run(self, step: Callable[[], object], *, parts: bool):
        """Call ``step`` once and mark where its stages begin and end."""
        with watch(self._enter, self._leave, parts=parts):
            self._mark()
            step()
            self._mark()

    def _enter(self, name: str):
        self.stack.append(name)
        self.calls[tuple(self.stack)] = self.calls.get(tuple(self.stack), 0) + 1
        self._mark()

    def _leave(self, _name: str):
        self.stack.pop()
        self._mark()

    def _mark(self):
        self.marks.append((self.now(), tuple(self.stack)))

    def milliseconds(self, between: Callable[[object, object], float]) -> dict[Path, float]:
        """Time of each path, its parts included; () is the whole.

        Args:
            between: milliseconds from one mark to another.
        """
        totals = {(): 0.0}
        for (start, path), (end, _) in pairwise(self.marks):
            spent = between(start, end)
            for depth in range(len(path) + 1):
                totals[path[:depth]] = totals.get(path[:depth], 0.0) + spent
        return totals


def event_mark() -> torch.cuda.Event:
    """A mark in the current stream."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_events(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return start.elapsed_time(end)


def host_mark() -> float:
    """A mark on the host's clock, in milliseconds."""
    return 1e3 * time.perf_counter()


def between_host(start: float, end: float) -> float:
    return end - start
