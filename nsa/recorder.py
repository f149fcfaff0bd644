"""Records the operations and launches of a call, by the memories of their tensors."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
from torch._ops import OpOverload

from nsa.host import NotRecordable, RecordingMode
from nsa.recorded_call import Recording
from nsa.recorded_code import Base, Nested, Step, View, Writer, contiguous_strides
from nsa.recorded_plan import Effect, PlanSearch, PlanSteps, written_by
from nsa.recorded_streams import Fork, in_order
from nsa.recorded_zeros import join_zeros

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
        self._mark = object()
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
        self._views: Counter[View] = Counter()
        # Steps that allocate, and whether they fill with zeros.
        self._allocations: dict[int, bool] = {}
        self._marks: list[int] = []
        self._dout: int | None = None
        self._device = given[0].device

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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
            self._add_step((_DIRECT.get(func, func), args, kwargs), result, written, pure=pure)
        return result

    def note(self, function: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        """Note a call that gave ``result``: a tensor, several, or None."""
        self._add_step((function, args, kwargs), result, pure=self.of_plan, launches=True)

    def _add_step(self, call: tuple, result: Any, written: Sequence = (), **kind: bool) -> None:
        function, args, kwargs = call
        uses: set[int] = set()
        arguments = tuple(self._place(x, uses) for x in args)
        keywords = {name: self._place(x, uses) for name, x in kwargs.items()}
        made: Any = self._number_of_new(result)
        if isinstance(result, (tuple, list)):
            made = tuple(map(self._number_of_new, result))
        self._steps.append(Step(function, arguments, keywords, made, ()))
        new = {n for n in (made if isinstance(made, tuple) else (made,)) if n is not None}
        writes = {n for n in map(self._number_of, tensors_in(written)) if n is not None}
        self._uses.append(uses | new)
        self._plan.add(Effect(uses | new, new, writes, **kind), tensors_in((result,)))

    def mark(self, name: str, function: Callable[[], None]) -> None:
        """Note that ``function`` is to fork, enter a block, or join."""
        if name != Fork._fields[len(self._marks) % len(Fork._fields)]:
            raise NotRecordable("a fork is within another")
        self._marks.append(len(self._steps))
        clause = {"fork": "try", "join": "finally"}.get(name)
        self._steps.append(Step(function, (), {}, None, (), clause))
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
        places = [None if x is None else self._place(x, at_end) for x in grads]
        if not all(x is None or isinstance(x, View) for x in places):
            raise NotRecordable("a gradient is a constant")
        outputs = {number for number, _ in self._outputs}
        plan = self._put_plan_first(outputs | at_end)
        self._uses.append(at_end)
        forks = self._fork_where_safe(outputs)
        first, last = self._lifetimes()
        in_backward = [number for number, at in last.items() if at >= self._split]
        early = (n for n in in_backward if n < self._num_given or first[n] < self._split)
        saved = tuple(sorted(early)) if grads else ()
        if not outputs.isdisjoint(saved):
            raise NotRecordable("the backward needs the output")
        of_plan: list[Step] = []
        forward: list[Step] = []
        backward: list[Step] = []
        unused = set(self._marks).difference(*forks)
        for at in in_order(len(self._steps), forks, self._allocations):
            if at in unused:
                continue
            step, uses = self._steps[at], self._uses[at]
            done = tuple(n for n in uses if last[n] == at and n not in outputs)
            function = step.function
            if at in self._allocations:
                function = self._allocation(step.made, zeros=self._allocations[at])
            steps = forward if at < self._split else backward
            if at < len(plan.steps):
                steps = of_plan
            steps.append(step._replace(function=function, done=done))
        results = outputs.union(saved, at_end, plan.memories)
        zeros = {self._steps[at].made for at, filled in self._allocations.items() if filled}
        of_plan, forward, backward = (
            join_zeros(part, zeros - results, self._bases, self._device)
            for part in (of_plan, forward, backward)
        )
        return Recording(
            run_plan=self._write_plan(of_plan, plan.memories) if plan.memories else None,
            run_forward=self._write_forward(forward, saved, plan.memories),
            saved=saved,
            run_backward=self._write_backward(backward, saved, places) if grads else None,
        )

    def _lifetimes(self) -> tuple[dict[int, int], dict[int, int]]:
        """The positions of the first and of the last use of each memory."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, uses in enumerate(self._uses):
            for number in uses:
                first.setdefault(number, at)
                last[number] = at
        return first, last

    def _fork_where_safe(self, outputs: set[int]) -> list[Fork]:
        """The forks that are safe, whose joins then use the memories that must live up to them."""
        forks = []
        _, last = self._lifetimes()
        last |= dict.fromkeys(outputs, len(self._steps))
        marks = iter(self._marks)
        for fork in map(Fork, marks, marks, marks):
            memories = fork.first_streams(self._steps, self._uses, self._allocations, last)
            if memories is not None:
                self._uses[fork.join] |= memories
                forks.append(fork)
        return forks

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

    def _write_plan(self, steps: Sequence[Step], memories: Sequence[int]) -> Callable:
        """One function for all calls that have the same plan, by which a Packing keeps it."""
        writer = Writer(self._bases)
        writer.take(self._boundaries, "boundaries")
        for step in steps:
            writer.step(step)
        return writer.finish("boundaries", f"[{', '.join(map(writer.memory, memories))}]", _plans)

    def _write_forward(
        self, steps: Sequence[Step], saved: Sequence[int], plan: Sequence[int]
    ) -> Callable:
        writer = Writer(self._bases)
        writer.take([*range(self._num_given), *plan], "given")
        for step in steps:
            writer.step(step)
        outputs = [View(n, shape, contiguous_strides(shape), 0) for n, shape in self._outputs]
        output = writer.value(Nested(list, tuple(outputs)) if self._is_list else outputs[0])
        return writer.finish("given", f"{output}, [{', '.join(map(writer.memory, saved))}]")

    def _write_backward(
        self, steps: Sequence[Step], saved: Sequence[int], gradients: Sequence[View | None]
    ) -> Callable:
        writer = Writer(self._bases)
        writer.take(saved, "saved")
        assert self._dout is not None  # as there is a backward
        writer.take([self._dout], "douts")
        for step in steps:
            writer.step(step)
        return writer.finish("douts, saved", f"[{', '.join(map(writer.value, gradients))}]")

    def _allocation(self, number: Any, *, zeros: bool) -> Callable[[], Tensor]:
        """Allocates a memory in the shape that most steps take, of those that have all of it."""
        base = self._bases[number]
        if base.contiguous:
            times = {base.shape: 0}
            for view in (view for view in self._views if view.memory == number):
                is_all = view.shape.numel() == base.shape.numel()
                if is_all and contiguous_strides(view.shape) == view.strides:
                    times[view.shape] = self._views[view]
            shape = max(times, key=times.__getitem__)
            base = base._replace(shape=shape, strides=contiguous_strides(shape))
            self._bases[number] = base
        kind: dict[str, Any] = dict(dtype=base.dtype, device=self._device)
        if zeros:
            return partial(torch.zeros, base.shape, **kind)
        if self._device.type == "cuda":
            # As Inductor allocates, in half the time. A call runs on its device. PyTorch 2.11 takes
            # tuples alone, not sizes.
            return partial(_empty_strided_cuda, tuple(base.shape), tuple(base.strides), base.dtype)
        return partial(torch.empty_strided, base.shape, base.strides, **kind)

    def _add(self, x: Tensor, *, given: bool = False) -> int:
        """The number of the memory of ``x``, which has none yet."""
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
            )
        )
        return number

    def _number_of(self, x: Tensor) -> int | None:
        """The number of the memory of ``x``; None for a constant."""
        mark, number = getattr(x.untyped_storage(), MARK, (None, None))
        return number if mark is self._mark else None

    def _number_of_new(self, x: Any) -> int | None:
        """The number of the memory of a result, if it is new."""
        if not isinstance(x, Tensor) or self._number_of(x) is not None:
            return None
        return self._add(x)

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
            uses.add(number)
            view = View(number, x.shape, x.stride(), int(x.storage_offset()) - base.offset)
            self._views[view] += 1
            return view
        if isinstance(x, (tuple, list)) and next(tensors_in(x), None) is not None:
            make = getattr(type(x), "_make", type(x))
            return Nested(make, tuple(self._place(part, uses) for part in x))
        return x


_plans: WeakValueDictionary[Any, Callable] = WeakValueDictionary()

_NOT_RECORDABLE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}

_ALLOCATIONS = frozenset((
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like",
    "new_zeros",
))  # fmt: skip

_DIRECT: dict[OpOverload, Callable] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.bmm.default: torch.bmm,
    torch.ops.aten.bmm.out: torch.bmm,
    torch.ops.aten.baddbmm.default: torch.baddbmm,
    torch.ops.aten.cat.default: torch.cat,
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.add_.Tensor: Tensor.add_,
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.sum.IntList_out: torch.sum,
    torch.ops.aten.silu.default: torch.nn.functional.silu,
    torch.ops.aten.sigmoid.default: torch.sigmoid,
    torch.ops.aten.clone.default: torch.clone,
    torch.ops.aten.zero_.default: Tensor.zero_,
    torch.ops.aten._foreach_add_.List: torch._foreach_add_,
    torch.ops.aten._foreach_copy_.default: torch._foreach_copy_,
}
"""Functions that do the same as operations, and take less time to call."""


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
