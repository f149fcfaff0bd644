"""Records the operations and launches of a call, by the memories of their tensors."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from nsa import recorded_graphs
from nsa.host import NotRecordable, RecordingMode
from nsa.recorded_call import Recording
from nsa.recorded_code import DIRECT, Base, Nested, Noted, Step, View, contiguous_strides
from nsa.recorded_parts import PartWriter
from nsa.recorded_plan import Effect, PlanSearch, PlanSteps, written_by
from nsa.recorded_streams import Fork

MARK = "_nsa_memory"
"""Attribute of a storage, with its recorder's mark and its number. PyTorch keeps it as long as the
memory lives."""


class Recorder(RecordingMode):
    """Notes the operations and launches on this thread, and on that of its backward.

    Args:
        given: the tensors that the call is for.
        boundaries: which of them are the boundaries of a Packing.
    """

    def __init__(self, given: Sequence[Tensor], boundaries: Sequence[int] = ()):
        super().__init__()
        self._mark, self._device = object(), given[0].device
        self._bases: list[Base] = []
        self._steps: list[Step] = []
        # Memories that each step uses or makes.
        self._uses: list[set[int]] = []
        for x in given:
            if self._number_of(x) is not None:
                raise NotRecordable("parameters share memory")
            self._add(x, given=True)
        self._num_given, self._boundaries = len(given), tuple(boundaries)
        others = set(range(len(given))).difference(self._boundaries)
        self._plan = PlanSearch(self._boundaries, others)
        # Steps that allocate, and whether they fill with zeros.
        self._allocations: dict[int, bool] = {}
        self._marks: list[int] = []
        self._dout: int | None = None
        self._as_graphs = given[0].numel() <= recorded_graphs.MAX_ELEMENTS

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._can_decompose() and not self._has_kernel(func):
            # Custom ops run below autograd, which elsewhere takes such operations apart.
            with self:
                return func.decompose(*args, **kwargs)
        if not _NOT_RECORDABLE.isdisjoint(func.tags):
            raise NotRecordable(f"{func} may give something else")
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATIONS:
            if "zeros" in name and not result.is_contiguous():
                raise NotRecordable("zeros have an order of their own")
            self._allocations[len(self._steps)] = "zeros" in name
            self._add_step((func, (), {}), result, pure=True, allocates=True)
        elif func._schema.is_mutable or _makes_new(args, kwargs, result):
            written, pure = written_by(func, args, kwargs), not func._schema.is_mutable
            self._add_step((DIRECT.get(func, func), args, kwargs), result, written, pure=pure)
        return result

    def _has_kernel(self, func: OpOverload) -> bool:
        key = self._device.type.upper()
        return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)

    def note(self, function: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        """Note a call that gave ``result``: a tensor, several, or None."""
        self._add_step((function, args, kwargs), result, pure=self.of_plan, launches=True)

    def _add_step(self, call: tuple, result: Any, written: Sequence = (), **kind: bool) -> None:
        function, args, kwargs = call
        uses: set[int] = set()
        arguments = tuple(self._place(x, uses) for x in args)
        keywords = {name: self._place(x, uses) for name, x in kwargs.items()}
        results = result if isinstance(result, (tuple, list)) else (result,)
        made = self._views_of_new(results)
        self._steps.append(Step(function, arguments, keywords, made))
        new = {view.memory for view in made if view is not None}
        self._uses.append(uses | new)
        writes = {n for n in map(self._number_of, tensors_in(written)) if n is not None}
        self._plan.add(Effect(uses | new, new, writes, **kind), tensors_in((result,)))

    def mark(self, name: str, function: Callable[[], None]) -> None:
        """Note that ``function`` is to fork, enter a block, or join."""
        if name != Fork._fields[len(self._marks) % len(Fork._fields)]:
            raise NotRecordable("a fork is within another")
        self._marks.append(len(self._steps))
        clause = {"fork": "try", "join": "finally"}.get(name)
        self._steps.append(Step(function, (), {}, clause=clause))
        self._uses.append(set())
        self._plan.add(Effect(set(), set(), set(), pure=False))

    def end_forward(self, out: Tensor | list[Tensor]) -> None:
        """Note the output, or each of a list.

        They are given as no views, because callers may change them in place.
        """
        outputs = out if isinstance(out, list) else [out]
        self._is_list = isinstance(out, list)
        self._outputs = [(self._check_output(x), x.shape) for x in outputs]
        if len({number for number, _ in self._outputs}) < len(outputs):
            raise NotRecordable("outputs share memory")
        self._split = len(self._steps)

    def _check_output(self, out: Any) -> int:
        """The memory of an output, all of which it is."""
        if not isinstance(out, Tensor):
            raise NotRecordable(f"the output is {type(out).__name__}")
        number, shape = self._number_of(out), out.shape
        if number is None or self._bases[number].given:
            raise NotRecordable("the output is not new")
        base = self._bases[number]
        if not (base.contiguous and out.is_contiguous() and shape.numel() == base.shape.numel()):
            raise NotRecordable("the output is a part of a tensor")
        return number

    def new_output_gradient(self, out: Tensor) -> Tensor:
        """A gradient of the output to record the backward with."""
        dout = torch.zeros_like(out, memory_format=torch.contiguous_format)
        self._dout = self._add(dout, given=True)
        self._plan.others.add(self._dout)
        return dout

    def finish(self, grads: Sequence[Tensor | None]) -> Recording:
        """The recording; ``grads`` are the gradients of what was given."""
        at_end: set[int] = set()
        places: Any = [None if x is None else self._place(x, at_end) for x in grads]
        if not all(x is None or isinstance(x, View) for x in places):
            raise NotRecordable("a gradient is a constant")
        outputs = {number for number, _ in self._outputs}
        plan = self._put_plan_first(outputs | at_end)
        split, num_plan = self._split, len(plan.steps)
        before = set[int]().union(*self._uses[:split])
        given = [*range(self._num_given), *plan.memories]
        needed = at_end.union(*self._uses[split:])
        early = sorted(needed & before.union(given)) if grads else []
        saved = tuple(n for n in early if n in given)
        # What the backward needs first makes room for others at one end.
        ends = {n: at for at, uses in enumerate(self._uses) for n in uses}
        arena = sorted((n for n in early if n not in given), key=lambda n: (ends[n], n))
        if not (outputs | at_end).isdisjoint(arena):
            raise NotRecordable("the backward needs the output, or the forward has its results")
        parts = PartWriter(self._bases, self._device, as_graphs=self._as_graphs)
        run_plan = run_backward = None
        if plan.memories:
            run_plan = parts.write_plan(self._noted(0, num_plan), self._boundaries, plan.memories)
        run_forward = parts.write_forward(
            self._noted(num_plan, split),
            given,
            [View(n, shape, contiguous_strides(shape), 0) for n, shape in self._outputs],
            saved=saved,
            arena=arena if grads else None,
            is_list=self._is_list,
        )
        if grads:
            assert self._dout is not None  # as there is a backward
            backward = self._noted(split, len(self._steps))
            run_backward = parts.write_backward(backward, [self._dout, *saved], places, arena)
        return Recording(run_plan, run_forward, saved, run_backward)

    def _noted(self, start: int, end: int) -> list[Noted]:
        """The steps of a part."""
        return [
            Noted(step, frozenset(self._uses[at]), self._allocations.get(at), at in self._marks)
            for at, step in enumerate(self._steps[start:end], start)
        ]

    def _put_plan_first(self, results: set[int]) -> PlanSteps:
        """Put the steps of the plan before all others."""
        plan = self._plan.finish(results)
        others = set(range(len(self._steps))).difference(plan.steps)
        order = [*plan.steps, *sorted(others)]
        position = {at: new for new, at in enumerate(order)}
        self._steps = [self._steps[at] for at in order]
        self._uses = [self._uses[at] for at in order]
        self._allocations = {position[at]: zeros for at, zeros in self._allocations.items()}
        self._marks = [position[at] for at in self._marks]
        self._split = len(plan.steps) + sum(at < self._split for at in others)
        return plan

    def _add(self, x: Tensor, *, given: bool = False) -> int:
        """The number of the memory of ``x``, which has none yet."""
        if x.device != self._device:
            raise NotRecordable(f"memory is on {x.device}")
        number = len(self._bases)
        setattr(x.untyped_storage(), MARK, (self._mark, number))
        self._bases.append(
            Base(
                shape=x.shape,
                strides=x.stride(),
                offset=int(x.storage_offset()),
                dtype=x.dtype,
                contiguous=x.is_contiguous(),
                given=given,
                size=x.untyped_storage().nbytes(),
            )
        )
        return number

    def _number_of(self, x: Tensor) -> int | None:
        """The number of the memory of ``x``; None for a constant."""
        mark, number = getattr(x.untyped_storage(), MARK, (None, None))
        return number if mark is self._mark else None

    def _views_of_new(self, results: Sequence) -> tuple[View | None, ...]:
        """Where results lie; None for those in memories that were there before."""
        known = len(self._bases)
        numbers = [self._number_or_add(x) if isinstance(x, Tensor) else -1 for x in results]
        return tuple(
            self._view(x, number) if number >= known else None
            for x, number in zip(results, numbers, strict=True)
        )

    def _number_or_add(self, x: Tensor) -> int:
        number = self._number_of(x)
        return self._add(x) if number is None else number

    def _view(self, x: Tensor, number: int) -> View:
        offset = int(x.storage_offset()) - self._bases[number].offset
        return View(number, x.shape, x.stride(), offset)

    def _place(self, x: Any, uses: set[int]) -> Any:
        """``x`` with a :class:`View` for each tensor; adds the memories to ``uses``."""
        if isinstance(x, Tensor):
            number = self._number_of(x)
            if number is None:
                if x.requires_grad:
                    raise NotRecordable("it depends on a tensor that is not given")
                return x
            base = self._bases[number]
            if x.dtype != base.dtype:
                raise NotRecordable(f"memory of {base.dtype} is read as {x.dtype}")
            if x.untyped_storage().nbytes() != base.size:
                raise NotRecordable("memory gets another size")
            uses.add(number)
            return self._view(x, number)
        if isinstance(x, (tuple, list)) and next(tensors_in(x), None) is not None:
            make = getattr(type(x), "_make", type(x))
            return Nested(make, tuple(self._place(part, uses) for part in x))
        return x


_NOT_RECORDABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}

_ALLOCATIONS = frozenset((
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like",
    "new_zeros",
))  # fmt: skip


def _makes_new(args: tuple, kwargs: dict, result: Any) -> bool:
    """Whether an operation gives more than views of its arguments."""
    known = {x.untyped_storage()._cdata for x in tensors_in((*args, *kwargs.values()))}
    results = list(tensors_in((result,)))
    if known and not results:
        raise NotRecordable("the host reads values")
    return any(x.untyped_storage()._cdata not in known for x in results)


def tensors_in(x: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from tensors_in(part)
