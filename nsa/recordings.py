"""Calls that are recorded once, and then run again for other tensors of the same form.

The forward and backward of a layer make some thousand Python calls, to find out some hundred
operations and launches. These follow from shapes, strides and dtypes alone, never from values. So
the second call of a form is recorded: its operations and launches, forward and backward. Later
calls run this list, as one autograd node. The first call has computed what is kept for all, such as
the index tensors of a plan, which the recording holds.

A recording knows tensors by their memory. The memory of each tensor that is given, and of each that
an operation allocates, has a number; all others are constants. An argument of a step is a view of a
memory. What PyTorch allocates is allocated in each call, and freed after its last use.

Constants are the index tensors that plans keep. Only the fused backend has them, and it
does not write to them. A recording keeps them alive, as its plan does.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from operator import itemgetter
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from nsa.host import NotRecordable, RecordingMode, may_keep
from nsa.precision import autocast_dtype, without_autocast

ENABLED = False
"""Whether calls are recorded. ``nsa.recordings.ENABLED = True`` turns it on, also for layers that
exist. Off, because most of its tests have not run on a GPU yet."""

MAX_RECORDINGS = 64
"""Recordings to keep, and forms that were seen once: those that were called last."""

MAX_ELEMENTS = 1 << 25
"""Elements of the first tensor up to which calls are recorded. The host is faster than the GPU in
larger ones, and recording takes the memory and time of a forward and backward more."""

Memories = list[Any]
"""By number, a tensor that has the memory; None before it is allocated and after its last use."""

Getter = Callable[[Memories], Any]
"""Gives an argument of a step."""

_logger = logging.getLogger("nsa")


def run(
    key: Hashable,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """``function(*tensors)``, without its Python from the third call of a form on.

    Args:
        key: all that the operations of ``function`` depend on, beside the tensors.
        function: gives one new, contiguous tensor, differentiable in those of ``tensors`` and
            ``parameters`` that require gradients. It depends on no other tensors, but on what is
            kept for all calls of the key.
        tensors: at least one.
        parameters: leaves that ``function`` has at hand.
    """
    given = (*tensors, *parameters)
    if not _may_record(given, parameters):
        return function(*tensors)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    device = given[0].device
    modes = (differentiable, torch.is_inference_mode_enabled(), autocast_dtype(device))
    form = (key, device, modes, *map(_form, given))
    with _lock:
        recording = _recordings.setdefault(form, _NEW)
        if recording is _NEW:
            _recordings[form] = _SEEN
            if len(_recordings) > MAX_RECORDINGS:
                _recordings.popitem(last=False)
        else:
            _recordings.move_to_end(form)
    # One at a time, because recorders mark memories. Others run step by step instead of waiting,
    # which could be for their own thread: an autograd thread whose backward calls this again.
    if recording is _SEEN and _one_records.acquire(blocking=False):
        try:
            recording = _record(function, tensors, parameters, differentiable)
        finally:
            _one_records.release()
        with _lock:
            _recordings[form] = recording
    if not isinstance(recording, Recording):
        return function(*tensors)
    if differentiable:
        return _Node.apply(recording, *given)
    return recording.forward(given)[0]


def launch(kernel: Callable, *arguments) -> None:
    """Launch a compiled kernel. If the call is recorded, this is a step of it."""
    recorder = RecordingMode.current()
    if recorder is not None:
        recorder.note(kernel, arguments, {}, None)
    kernel(*arguments)


_NEW, _SEEN, _REFUSED = object(), object(), object()
_recordings: OrderedDict[Hashable, Any] = OrderedDict()
_lock = Lock()
_one_records = Lock()
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _may_record(given: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether nobody looks at single operations, or changes what they do."""
    device = given[0].device
    return (
        ENABLED
        and given[0].numel() <= MAX_ELEMENTS
        and may_keep(given[0])
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.is_anomaly_enabled()
        and all(
            type(x) in _PLAIN_TYPES
            and x.layout is torch.strided
            and not x.is_nested
            and x.data_ptr() % 16 == 0
            and x.device == device
            for x in given
        )
        and all(x.is_leaf and not x._backward_hooks for x in parameters)
    )


def _form(x: Tensor) -> tuple:
    strides = None if x.is_contiguous() else x.stride()
    return x.shape, x.dtype, x.requires_grad, strides


class _Step(NamedTuple):
    """A call of ``function``, whose arguments are getters, or places while it is recorded.

    ``made`` is the memory of its result, or of each of its results, None for what is not new.
    ``done`` are memories that no later step uses.
    """

    function: Callable
    arguments: tuple
    keywords: dict[str, Any]
    made: int | tuple[int | None, ...] | None
    done: tuple[int, ...]


class Recording(NamedTuple):
    """A recorded call. The first memories are the tensors that are given.

    Attributes:
        memories: how many there are.
        steps, output: of the forward.
        saved: memories that the backward needs.
        dout: the memory of the output's gradient; None without a backward.
        backward_steps, gradients: of the backward. There is a gradient for each given tensor, None
            for one without.
    """

    memories: int
    steps: tuple[_Step, ...]
    output: Getter
    saved: tuple[int, ...]
    dout: int | None
    backward_steps: tuple[_Step, ...]
    gradients: tuple[Getter | None, ...]

    def forward(self, given: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The output, and what the backward needs."""
        memories: Memories = [*given, *(None,) * (self.memories - len(given))]
        with torch.cuda.device_of(given[0]), without_autocast(given[0].device):
            _run(self.steps, memories)
        return self.output(memories), [memories[number] for number in self.saved]

    def backward(self, dout: Tensor, saved: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the given tensors."""
        memories: Memories = [None] * self.memories
        for number, x in zip(self.saved, saved, strict=True):
            memories[number] = x
        if type(dout) is not Tensor:
            dout = _plain(dout)
        if not dout.is_contiguous() or dout.data_ptr() % 16:
            dout = dout.clone(memory_format=torch.contiguous_format)
        assert self.dout is not None  # as there is a backward
        memories[self.dout] = dout
        with torch.cuda.device_of(dout), without_autocast(dout.device):
            del dout
            _run(self.backward_steps, memories)
        return [None if get is None else get(memories) for get in self.gradients]


def _plain(dout: Tensor) -> Tensor:
    """A copy of a subclass, which launches could not read, and whose operations give more of it."""
    with torch._C.DisableTorchFunctionSubclass():
        copy = dout.clone(memory_format=torch.contiguous_format)
    if type(copy) is not Tensor:
        raise TypeError(f"the output's gradient must be a plain tensor, got {type(copy).__name__}")
    return copy


def _run(steps: tuple[_Step, ...], memories: Memories) -> None:
    for function, arguments, keywords, made, done in steps:
        named = {name: get(memories) for name, get in keywords.items()} if keywords else keywords
        result = function(*[get(memories) for get in arguments], **named)
        if isinstance(made, int):
            memories[made] = result
        elif made is not None:
            for number, x in zip(made, result, strict=True):
                if number is not None:
                    memories[number] = x
        del result, named
        for number in done:
            memories[number] = None


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, *given):
        out, saved = recording.forward(given)
        # Of a leaf, a view keeps the memory that it has now, as `leaf.data` may be set to another.
        # The leaves themselves connect the gradients of `create_graph` to them.
        num_given = len(given)
        at = [i for i, n in enumerate(recording.saved) if n < num_given and saved[i].is_leaf]
        leaves = [saved[i] for i in at]
        for i in at:
            saved[i] = saved[i].detach()
        ctx.save_for_backward(*saved, *leaves)
        ctx.recording = recording
        return out

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():  # create_graph
            return None, *_Gradients.apply(ctx.recording, dout, *ctx.saved_tensors)
        saved = ctx.saved_tensors[: len(ctx.recording.saved)]
        return None, *ctx.recording.backward(dout, saved)


class _Gradients(torch.autograd.Function):
    """A separate node, so that with ``create_graph`` a second derivative raises an error."""

    @staticmethod
    def forward(_, recording: Recording, dout: Tensor, *saved):
        return tuple(recording.backward(dout, saved[: len(recording.saved)]))

    @staticmethod
    def backward(_, *__):
        raise RuntimeError(
            "nsa.forward can be differentiated once, not twice: its gradients have no derivative"
        )


def _record(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    differentiable: bool,
) -> Any:
    """The recording of a call, or ``_REFUSED``."""
    given: tuple[Tensor, ...] = ()
    grads: list[Tensor | None] = []
    try:
        leaves = [_own_leaf(x, tensors, differentiable) for x in tensors]
        given = (*leaves, *parameters)
        wanted = [x for x in given if x.requires_grad] if differentiable else []
        if wanted:
            with _Rehearsal():
                out = function(*leaves)
                with without_autocast(out.device):
                    torch.autograd.grad(out, wanted, torch.zeros_like(out), allow_unused=True)
        recorder = _Recorder(given)
        with torch.set_grad_enabled(differentiable), _uncached_autocast(given[0].device), recorder:
            out = function(*leaves)
        recorder.end_forward(out)
        if wanted:
            dout = recorder.new_output_gradient(out)
            with without_autocast(out.device), recorder:
                found = iter(torch.autograd.grad(out, wanted, dout, allow_unused=True))
            grads = [next(found) if x.requires_grad else None for x in given]
        return recorder.finish(grads)
    except Exception as error:
        # Step by step the call may run, and else it raises what it should.
        _logger.debug("calls of a form are not recorded: %r", error)
        return _REFUSED
    finally:
        for x in given:
            vars(x.untyped_storage()).pop(_MARK, None)


def _uncached_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, but weights are cast in the call, not kept by PyTorch from one before."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def _own_leaf(x: Tensor, tensors: Sequence[Tensor], differentiable: bool) -> Tensor:
    """``x`` as a leaf, in memory of its own."""
    places = [other.untyped_storage()._cdata for other in tensors]
    if places.count(x.untyped_storage()._cdata) > 1:
        if any(not stride and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise NotRecordable("tensors share memory and overlap themselves")
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return copy.copy_(x.detach()).requires_grad_(differentiable and x.requires_grad)
    return x.detach().requires_grad_(differentiable and x.requires_grad)


class _Rehearsal(RecordingMode):
    """Notes nothing. After it, what forward and backward keep for all calls is there."""

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def note(self, function: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        pass


class _Base(NamedTuple):
    """The tensor that a memory is known by. A given one may start anywhere in its memory."""

    shape: torch.Size
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    contiguous: bool
    given: bool


_MARK = "_nsa_memory"
"""Attribute of a storage, with its recorder's mark and its number. PyTorch keeps it as long as the
memory lives."""


class _Recorder(RecordingMode):
    """Notes the operations and launches on this thread, and on that of its backward."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self._mark = object()
        self._bases: list[_Base] = []
        self._steps: list[_Step] = []
        # Memories that each step uses or makes.
        self._uses: list[set[int]] = []
        for x in given:
            if self._number_of(x) is not None:
                raise NotRecordable("parameters share memory")
            self._add(x, given=True)
        self._num_given = len(given)
        self._views: Counter[_View] = Counter()
        # Steps that allocate, and whether they fill with zeros.
        self._allocations: dict[int, bool] = {}
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
            self.note(func, (), {}, result)
        elif func._schema.is_mutable or _makes_new(args, kwargs, result):
            self.note(_DIRECT.get(func, func), args, kwargs, result)
        return result

    def note(self, function: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        """Note a call that gave ``result``: a tensor, several, or None."""
        uses: set[int] = set()
        arguments = tuple(self._place(x, uses) for x in args)
        keywords = {name: self._place(x, uses) for name, x in kwargs.items()}
        made: Any = self._number_of_new(result)
        if isinstance(result, (tuple, list)):
            made = tuple(map(self._number_of_new, result))
        self._steps.append(_Step(function, arguments, keywords, made, ()))
        new = made if isinstance(made, tuple) else (made,)
        self._uses.append(uses.union(new) - {None})

    def end_forward(self, out: Tensor) -> None:
        """Note the output. It is given as no view, because callers may change it in place."""
        if not isinstance(out, Tensor):
            raise NotRecordable(f"the output is {type(out).__name__}")
        number, shape = self._number_of(out), out.shape
        if number is None or self._bases[number].given:
            raise NotRecordable("the output is not new")
        base = self._bases[number]
        if not (base.contiguous and out.is_contiguous() and shape.numel() == base.shape.numel()):
            raise NotRecordable("the output is a part of a tensor")
        self._output, self._shape, self._split = number, shape, len(self._steps)

    def new_output_gradient(self, out: Tensor) -> Tensor:
        """A gradient of the output to record the backward with."""
        dout = torch.zeros_like(out, memory_format=torch.contiguous_format)
        self._dout = self._add(dout, given=True)
        return dout

    def finish(self, grads: Sequence[Tensor | None]) -> Recording:
        """The recording; ``grads`` are the gradients of what was given."""
        at_end: set[int] = set()
        places = [None if x is None else self._place(x, at_end) for x in grads]
        if not all(x is None or isinstance(x, _View) for x in places):
            raise NotRecordable("a gradient is a constant")
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for at, uses in enumerate((*self._uses, at_end)):
            for number in uses:
                first.setdefault(number, at)
                last[number] = at
        in_backward = [number for number, at in last.items() if at >= self._split]
        early = (n for n in in_backward if n < self._num_given or first[n] < self._split)
        saved = tuple(sorted(early)) if grads else ()
        if self._output in saved:
            raise NotRecordable("the backward needs the output")
        steps = []
        for at, (step, uses) in enumerate(zip(self._steps, self._uses, strict=True)):
            done = tuple(n for n in uses if last[n] == at and n != self._output)
            function = step.function
            if at in self._allocations:
                function = self._allocation(step.made, zeros=self._allocations[at])
            steps.append(step._replace(function=function, done=done))
        steps = [
            step._replace(
                arguments=tuple(map(self._getter, step.arguments)),
                keywords={name: self._getter(x) for name, x in step.keywords.items()},
            )
            for step in steps
        ]
        return Recording(
            memories=len(self._bases),
            steps=tuple(steps[: self._split]),
            output=self._output_getter(),
            saved=saved,
            dout=self._dout,
            backward_steps=tuple(steps[self._split :]),
            gradients=tuple(None if x is None else self._getter(x) for x in places),
        )

    def _allocation(self, number: Any, *, zeros: bool) -> Callable[[], Tensor]:
        """Allocates a memory in the shape that most steps take, of those that have all of it."""
        base = self._bases[number]
        if base.contiguous:
            times = {base.shape: 0}
            for view in (view for view in self._views if view.memory == number):
                is_all = view.shape.numel() == base.shape.numel()
                if is_all and _contiguous_strides(view.shape) == view.strides:
                    times[view.shape] = self._views[view]
            shape = max(times, key=times.__getitem__)
            base = base._replace(shape=shape, strides=_contiguous_strides(shape))
            self._bases[number] = base
        kind: dict[str, Any] = dict(dtype=base.dtype, device=self._device)
        if zeros:
            return partial(torch.zeros, base.shape, **kind)
        return partial(torch.empty_strided, base.shape, base.strides, **kind)

    def _output_getter(self) -> Getter:
        number, shape = self._output, self._shape
        if shape == self._bases[number].shape:
            return itemgetter(number)
        view = torch.ops.aten._unsafe_view.default
        return lambda memories: view(memories[number], shape)

    def _add(self, x: Tensor, *, given: bool = False) -> int:
        """The number of the memory of ``x``, which has none yet."""
        number = len(self._bases)
        setattr(x.untyped_storage(), _MARK, (self._mark, number))
        self._bases.append(
            _Base(
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
        mark, number = getattr(x.untyped_storage(), _MARK, (None, None))
        return number if mark is self._mark else None

    def _number_of_new(self, x: Any) -> int | None:
        """The number of the memory of a result, if it is new."""
        if not isinstance(x, Tensor) or self._number_of(x) is not None:
            return None
        return self._add(x)

    def _place(self, x: Any, uses: set[int]) -> Any:
        """``x`` with a :class:`_View` for each tensor; adds the memories to ``uses``."""
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
            view = _View(number, x.shape, x.stride(), int(x.storage_offset()) - base.offset)
            self._views[view] += 1
            return view
        if isinstance(x, (tuple, list)) and next(tensors_in(x), None) is not None:
            make = getattr(type(x), "_make", type(x))
            return _Parts(make, tuple(self._place(part, uses) for part in x))
        return x

    def _getter(self, place: Any) -> Getter:
        """Gives the argument that :meth:`_place` was made from."""
        if isinstance(place, _Parts):
            make, parts = place.make, tuple(map(self._getter, place.parts))
            return lambda memories: make([get(memories) for get in parts])
        if not isinstance(place, _View):
            return lambda _: place
        number, shape, strides, offset = place
        base = self._bases[number]
        if (shape, strides, offset) == (base.shape, base.strides, 0):
            return itemgetter(number)
        if not base.given:
            return lambda memories: torch.as_strided(memories[number], shape, strides, offset)

        def of_given(memories: Memories) -> Tensor:
            given = memories[number]
            return torch.as_strided(given, shape, strides, given.storage_offset() + offset)

        return of_given


class _View(NamedTuple):
    """A tensor, as what it is of a memory."""

    memory: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class _Parts(NamedTuple):
    """A tuple or list of some kind, with tensors in it."""

    make: Callable
    parts: tuple


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
    torch.ops.aten.add.Tensor: torch.add,
    torch.ops.aten.add_.Tensor: Tensor.add_,
    torch.ops.aten.sum.dim_IntList: torch.sum,
    torch.ops.aten.sum.IntList_out: torch.sum,
    torch.ops.aten.silu.default: torch.nn.functional.silu,
    torch.ops.aten.sigmoid.default: torch.sigmoid,
    torch.ops.aten.clone.default: torch.clone,
    torch.ops.aten.zero_.default: Tensor.zero_,
    torch.ops.aten._foreach_add_.List: torch._foreach_add_,
}
"""Functions that do the same as operations, and take less time to call."""


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


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
