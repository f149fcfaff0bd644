"""Writes what a recording runs, as a Python function: one line for each step.

A line takes the host about a third of what a loop over steps does. Memories are local variables,
and are deleted after their last use.
"""

from collections.abc import Callable, Hashable, MutableMapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]


class View(NamedTuple):
    """A tensor, described as a view of a memory."""

    memory: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class Nested(NamedTuple):
    """A tuple or list of some kind, with tensors in it."""

    make: Callable
    parts: tuple


class Base(NamedTuple):
    """The tensor that a memory is known by. A given one may start anywhere in its memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    contiguous: bool
    given: bool


class Step(NamedTuple):
    """A call of ``function``. Arguments are a :class:`View` for a tensor of a memory,
    :class:`Nested`, or constants.

    ``made`` is the memory of its result, or of each of its results, None for what is not new.
    ``done`` are memories that no later step uses. With a ``clause``, ``try`` or ``finally``, the
    step begins that.
    """

    function: Callable
    arguments: tuple
    keywords: dict[str, Any]
    made: int | tuple[int | None, ...] | None
    done: tuple[int, ...]
    clause: str | None = None


class Writer:
    """Writes a function for memories that ``bases`` describe."""

    def __init__(self, bases: Sequence[Base]):
        self._bases = bases
        self._lines: list[str] = []
        # Takes the host half the time of as_strided, and a third of that of view.
        self._values: dict[str, Any] = {"reinterpret": _reinterpret_tensor}
        self._names: dict[int, str] = {}
        self._number = count()
        # In the order of their first use, so that calls which do the same have the same code.
        self._memories: dict[int, str] = {}
        self._indent = "    "

    def take(self, memories: Sequence[int], source: str) -> None:
        """Take these memories from the end of the list ``source``, which it no longer holds."""
        for memory in reversed(memories):
            self._write(f"{self.memory(memory)} = {source}.pop()")

    def memory(self, number: int) -> str:
        """The variable of a memory."""
        return self._memories.setdefault(number, f"m{len(self._memories)}")

    def step(self, step: Step) -> None:
        """Call a function, and delete what no later one uses."""
        line = self.call(step.function, step.arguments, step.keywords)
        if isinstance(step.made, int):
            line = f"{self.memory(step.made)} = {line}"
        elif step.made is not None:
            names = ["_" if memory is None else self.memory(memory) for memory in step.made]
            line = f"[{', '.join(names)}] = {line}"
        if step.clause == "finally":
            self._indent = self._indent[4:]
        if step.clause is not None:
            self._write(f"{step.clause}:")
            self._indent += "    "
        self._write(line)
        if step.clause == "finally":
            self._indent = self._indent[4:]
        done = sorted(map(self.memory, step.done))
        if isinstance(step.made, tuple) and None in step.made:
            done.append("_")
        if done:
            self._write(f"del {', '.join(done)}")

    def _write(self, line: str) -> None:
        self._lines.append(self._indent + line)

    def call(self, function: Callable, arguments: Sequence, keywords: dict | None = None) -> str:
        written = [self.value(x) for x in arguments]
        written += [f"{name}={self.value(x)}" for name, x in (keywords or {}).items()]
        return f"{self._name(function)}({', '.join(written)})"

    def value(self, x: Any) -> str:
        """An argument, or a result."""
        if isinstance(x, Nested):
            parts = "".join(f"{self.value(part)}, " for part in x.parts)
            if x.make is list:
                return f"[{parts}]"
            return f"({parts})" if x.make is tuple else f"{self._name(x.make)}(({parts}))"
        if isinstance(x, View):
            return self._view(*x)
        # Others may not be written as they are, such as infinity and types.
        return repr(x) if type(x) in (int, bool, type(None)) else self._name(x)

    def _view(self, memory: int, shape: torch.Size, strides: tuple[int, ...], offset: int) -> str:
        base, name = self._bases[memory], self.memory(memory)
        if (shape, strides, offset) == (base.shape, base.strides, 0):
            return name
        return f"reinterpret({name}, {tuple(shape)}, {tuple(strides)}, {offset})"

    def _name(self, x: Any) -> str:
        """A name for a value, which is kept."""
        name = self._names.get(id(x))
        if name is None:
            name = self._names[id(x)] = f"x{next(self._number)}"
            self._values[name] = x
        return name

    def finish(
        self, parameters: str, result: str, known: MutableMapping[Any, Callable] | None = None
    ) -> Callable:
        """The function of ``parameters``, which gives ``result``; one of the ``known`` if that does
        the same."""
        self._write(f"return {result}")
        key = (*self._lines, *map(_comparable, self._values.values()))
        run = None if known is None else known.get(key)
        if run is None:
            exec("\n".join((f"def run({parameters}):", *self._lines)), self._values)
            run = self._values.pop("run")
            if known is not None:
                known[key] = run
        return run


def _comparable(x: Any) -> Hashable:
    """Equal for values of the same meaning, as long as they live."""
    if isinstance(x, partial):
        keywords = ((name, _comparable(value)) for name, value in x.keywords.items())
        return x.func, *map(_comparable, x.args), *keywords
    try:
        hash(x)
    except TypeError:
        return id(x)
    return type(x), x


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
