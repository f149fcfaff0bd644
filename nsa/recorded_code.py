"""Writes what a recording runs, as Python functions: one line for each step.

A line takes the host about a third of what a loop over steps does.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _reinterpret_tensor  # type: ignore[attr-defined]

from nsa.recorded_memory import Place, whole_units


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


class WholeArena(NamedTuple):
    """All of an arena, by its position among them."""

    arena: int


class Base(NamedTuple):
    """The tensor that a memory is known by, which may start anywhere in it, and all its bytes."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    contiguous: bool
    given: bool
    size: int


class Step(NamedTuple):
    """A call of ``function``. Arguments are a :class:`View` for a tensor of a memory,
    :class:`Nested`, or constants.

    ``made`` are its results in new memories, into which the step is to write them; None in the
    place of others. With a ``clause``, ``try`` or ``finally``, the step
    begins that.
    """

    function: Callable
    arguments: tuple
    keywords: dict[str, Any]
    made: tuple[View | None, ...] = ()
    clause: str | None = None

    def written(self) -> "Step":
        """The step that writes its results instead of making them."""
        if not any(self.made):
            return self
        into = INTO.get(self.function)
        if into is not None and len(self.made) == 1:
            return self._replace(function=into, keywords=self.keywords | {"out": self.made[0]})
        copies = partial(_copy_results, self.function)
        arguments = (Nested(list, self.made), *self.arguments)
        return self._replace(function=copies, arguments=arguments)


class Noted(NamedTuple):
    """A step as it was noted.

    Attributes:
        uses: the memories that it uses or makes.
        fills: of a step that allocates whether it fills with zeros; None of others.
        is_mark: whether it is a mark of a fork.
    """

    step: Step
    uses: frozenset[int]
    fills: bool | None = None
    is_mark: bool = False

    @property
    def made(self) -> set[int]:
        return {view.memory for view in self.step.made if view is not None}


def _copy_results(function: Callable, targets: list, *args, **kwargs) -> None:
    results = function(*args, **kwargs)
    if isinstance(results, Tensor):
        results = [results]
    for target, result in zip(targets, results, strict=True):
        if target is not None:
            target.copy_(result)


def _copy(x: Tensor, *, out: Tensor, **_: Any) -> None:
    """Of what only says in which form the result is made."""
    out.copy_(x)


def _pad(x: Tensor, sizes: Sequence[int], value: float = 0, *, out: Tensor) -> None:
    """As PyTorch pads: it fills all, and copies the inner part. Negative sizes cut."""
    inner = out.fill_(value)
    for dim, (before, after) in enumerate(zip(sizes[::2], sizes[1::2], strict=True), 1):
        cut = max(-before, 0)
        x = x.narrow(-dim, cut, x.shape[-dim] - cut - max(-after, 0))
        inner = inner.narrow(-dim, max(before, 0), x.shape[-dim])
    inner.copy_(x)


_aten = torch.ops.aten
INTO: dict[Callable, Callable] = {
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.baddbmm.default: torch.baddbmm,
    _aten.cat.default: torch.cat,
    _aten.stack.default: torch.stack,
    _aten.index_select.default: torch.index_select,
    _aten.arange.default: torch.arange,
    _aten.add.Tensor: torch.add,
    _aten.mul.Tensor: torch.mul,
    _aten.ge.Tensor: torch.ge,
    _aten.ge.Scalar: torch.ge,
    _aten.where.self: torch.where,
    _aten.scalar_tensor.default: lambda value, *, out, **_: out.fill_(value),
    _aten.sum.dim_IntList: torch.sum,
    _aten.silu.default: _aten.silu.out,
    _aten.silu_backward.default: lambda *x, out: _aten.silu_backward.grad_input(*x, grad_input=out),
    _aten.sigmoid_backward.default: (
        lambda *x, out: _aten.sigmoid_backward.grad_input(*x, grad_input=out)
    ),
    _aten.sigmoid.default: torch.sigmoid,
    _aten.clone.default: _copy,
    _aten._to_copy.default: _copy,
    _aten.constant_pad_nd.default: _pad,
}
"""Functions that write what operations make."""

DIRECT: dict[Callable, Callable] = {
    _aten.bmm.out: torch.bmm,
    _aten.add_.Tensor: Tensor.add_,
    _aten.sum.IntList_out: torch.sum,
    _aten._foreach_add_.List: torch._foreach_add_,
    _aten._foreach_copy_.default: torch._foreach_copy_,
}
"""Functions that do the same as operations, and take less time to call."""


class Writer:
    """Writes functions of a list of tensors.

    Args:
        bases: of all memories.
        given: what the tensors are: memories by their numbers, and arenas of bytes.
        places: where other memories lie in the arenas.
        in_arenas: memories of tensors, each of which is an arena too, by its position.
    """

    def __init__(
        self,
        bases: Sequence[Base],
        given: Sequence[int | WholeArena],
        places: Mapping[int, Place],
        in_arenas: Mapping[int, int],
    ):
        self._bases, self._places = bases, places
        self._whole = {at: number for number, at in in_arenas.items()}
        self._lines: list[str] = []
        # Takes the host half the time of as_strided, and a third of that of view.
        self._values: dict[str, Any] = {"reinterpret": _reinterpret_tensor, "cast": Tensor.view}
        self._names: dict[int, str] = {}
        self._number = count()
        # In the order of their first use, so that calls which do the same have the same code.
        self._memories: dict[int, str] = {}
        self._typed: set[str] = set()
        self._indent = "    "
        names = [self._arena(x) if isinstance(x, WholeArena) else self._tensor(x) for x in given]
        self._head = f"    [{', '.join(names)}] = memories"

    def step(self, step: Step) -> None:
        """Call a function."""
        step = step.written()
        # Before the clause, because a view is there for all later steps.
        line = self._call(step.function, step.arguments, step.keywords)
        if step.clause == "finally":
            self._indent = self._indent[4:]
        if step.clause is not None:
            self._write(f"{step.clause}:")
            self._indent += "    "
        self._write(line)
        if step.clause == "finally":
            self._indent = self._indent[4:]

    def _write(self, line: str) -> None:
        self._lines.append(self._indent + line)

    def _call(self, function: Callable, arguments: Sequence, keywords: dict) -> str:
        written = [self.value(x) for x in arguments]
        written += [f"{name}={self.value(x)}" for name, x in keywords.items()]
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
        if isinstance(x, WholeArena):
            return self._arena(x)
        # Others may not be written as they are, such as infinity and types.
        return repr(x) if type(x) in (int, bool, type(None)) else self._name(x)

    def _view(self, memory: int, shape: torch.Size, strides: tuple[int, ...], offset: int) -> str:
        base, name = self._bases[memory], self._memory(memory)
        if (shape, strides, offset) == (base.shape, base.strides, 0):
            return name
        return f"reinterpret({name}, {tuple(shape)}, {tuple(strides)}, {offset})"

    def _memory(self, number: int) -> str:
        """The variable of a memory's tensor, which a line before makes if the memory is in an
        arena."""
        if number in self._memories:
            return self._memories[number]
        name, base, at = self._tensor(number), self._bases[number], self._places[number]
        arena = self._arena(WholeArena(at.arena))
        typed = f"{arena}_{self._name(base.dtype)}"
        if typed not in self._typed:
            self._typed.add(typed)
            self._write(f"{typed} = cast({arena}, {self._name(base.dtype)})")
        start = base.offset + at.offset // base.dtype.itemsize
        form = f"{tuple(base.shape)}, {tuple(base.strides)}, {start}"
        self._write(f"{name} = reinterpret({typed}, {form})")
        return name

    def _arena(self, whole: WholeArena) -> str:
        """The variable of an arena, which a line before makes of a tensor."""
        name, number = f"a{whole.arena}", self._whole.pop(whole.arena, None)
        if number is not None:
            size = whole_units(self._bases[number].size)
            as_bytes = f"cast({self._memories[number]}, {self._name(torch.uint8)})"
            self._write(f"{name} = reinterpret({as_bytes}, ({size},), (1,), 0)")
        return name

    def _tensor(self, number: int) -> str:
        return self._memories.setdefault(number, f"m{len(self._memories)}")

    def _name(self, x: Any) -> str:
        """A name for a value, which is kept."""
        name = self._names.get(id(x))
        if name is None:
            name = self._names[id(x)] = f"x{next(self._number)}"
            self._values[name] = x
        return name

    def finish(self, result: Any) -> "Code":
        """``result`` is of memories that the list has."""
        give = f"    return {self.value(result)}"
        run = self._lines or ["    pass"]
        key = (*run, give, *map(_comparable, self._values.values()))
        for name, lines in (("run", run), ("give", [give])):
            exec("\n".join((f"def {name}(memories):", self._head, *lines)), self._values)
        return Code(key, self._values.pop("run"), self._values.pop("give"))


class Code(NamedTuple):
    """Functions of a list of tensors: ``run`` does the steps, and ``give`` then has the result.

    Of equal ``key`` they do the same, as long as what they refer to lives.
    """

    key: Hashable
    run: Callable[[list[Tensor]], None]
    give: Callable[[list[Tensor]], Any]


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
