"""Calls that are recorded once, and then run again for other tensors of the same form.

The forward and backward of a layer make some thousand Python calls, to find out some hundred
operations and launches. These follow from shapes, strides and dtypes alone, never from values. So
the second call of a form is recorded: its operations and launches, forward and backward. Of layers
of one form, it is the second call of the first of them. Later calls run this list, as one autograd
node. The first call has computed what is kept for all, such as the index tensors of a plan, which
the recording holds.

Constants are the index tensors that plans keep. Only the fused backend has them, and it
does not write to them. A recording keeps them alive, as its plan does.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from operator import attrgetter
from threading import Lock
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from nsa.host import RecordingMode, may_keep
from nsa.packing import Packing
from nsa.precision import autocast_dtype
from nsa.recorded_call import Recording, run_node
from nsa.rehearsal import record_call

ENABLED = True
"""Whether calls are recorded. ``nsa.recordings.ENABLED = False`` turns it off, also for layers that
exist."""

MAX_RECORDINGS = 64
"""Recordings to keep: those that were called last."""

MAX_SEEN = 1024
"""Forms without a recording to remember, seen once or refused: those that were called last. Each
new length makes one, so they are counted separately from recordings."""

MAX_ENTRIES = 16
"""Kinds of tensors to know recordings of one key by. Which tensors require gradients, though none
is wanted, makes several of one recording."""

MAX_ELEMENTS = 1 << 26
"""Elements of the first tensor up to which calls are recorded, such as 8K tokens of 64 heads of 128
channels. The host is faster than the GPU in larger ones, and recording takes the memory and time of
a forward and backward more."""


def run(
    key: Hashable,
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    packing: Packing | None = None,
) -> Tensor | None:
    """``function(*tensors)``, without its Python from the third call of a form on.

    It is None, and the function is for the caller to call, in the first call and where calls are
    not recorded.

    Args:
        key: all that the operations of ``function`` depend on, beside the tensors.
        function: gives one new, contiguous tensor, differentiable in those of ``tensors`` and
            ``parameters`` that require gradients. It depends on no other tensors, but on what is
            kept for all calls of the key.
        tensors: at least one.
        parameters: leaves that ``function`` has at hand.
        packing: its :attr:`~nsa.Packing.bounds` are given to ``function`` after the ``tensors``.
            What follows from them alone is computed once, and kept there. The key says whether
            there is one.
    """
    bounds = [] if packing is None else packing.bounds
    tensors = (*tensors, *bounds)
    given = (*tensors, *parameters)
    recording = _find_again(key, given, parameters)
    if recording is None:
        if not _may_record(given, parameters):
            return None
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        form = _form_of_call(key, given, differentiable)
        seen = _Seen(ref(parameters[0]) if parameters else None)
        record = partial(
            record_call, function, tensors, parameters, differentiable, num_bounds=len(bounds)
        )
        recording = _find(form, given, seen, record, lambda first: first.by_same(parameters))
    if recording is None:
        return None
    plan = recording.plan(packing)
    if recording.run_backward is not None:
        return run_node(recording, plan, *given)
    return recording.forward(given, plan)[0]


def run_op(
    key: Hashable,
    function: Callable[..., list[Tensor]],
    tensors: Sequence[Tensor],
    packing: Packing | None = None,
    *,
    trains: bool,
    backward: bool = False,
) -> list[Tensor] | None:
    """The same for the inside of a custom op, which is how compiled calls come here.

    The results are new, contiguous tensors, each in memory of its own, and have no gradients.

    Args:
        key, function, tensors, packing: as in :func:`run`.
        trains: whether the call is, or will be followed by, a ``backward``. A form is then recorded
            in the second step that has it.
        backward: whether the op is a backward.
    """
    step = _steps.number(backward=backward)
    bounds = [] if packing is None else packing.bounds
    tensors = (*tensors, *bounds)
    with torch.no_grad():
        recording = _find_again(key, tensors, ())
        if recording is None:
            if not _may_record(tensors, ()):
                return None
            form = _form_of_call(key, tensors, False)
            seen = _Seen(None, step if trains else -1)
            record = partial(
                record_call, function, tensors, (), False, num_bounds=len(bounds), rehearse=True
            )
            recording = _find(form, tensors, seen, record, lambda first: first.step < step)
        if recording is None:
            return None
        return recording.forward(tensors, recording.plan(packing))[0]


def _form_of_call(key: Hashable, given: Sequence[Tensor], differentiable: bool) -> tuple:
    device = given[0].device
    modes = (differentiable, torch.is_inference_mode_enabled(), autocast_dtype(device))
    strides = [None if x.is_contiguous() else x.stride() for x in given]
    describe = _form_with_gradients if differentiable else _form
    return (key, device, modes, *strides, *map(describe, given))


def _find_again(
    key: Hashable, given: Sequence[Tensor], parameters: Sequence[Tensor]
) -> Recording | None:
    """The recording of a call, if :func:`_find` has given it for this form.

    PyTorch compares the tensors, in a third of the time that it takes to write down their form.
    """
    entries = _entries.get(_key_of_entry(key, given))
    if not entries or not _is_unobserved(given[0], parameters) or not _are_in_order(given):
        return None
    for entry in entries:
        if entry.guards.check(*given):
            with _lock:
                if entry.form in _recordings:
                    _recordings.move_to_end(entry.form)
            return entry.recording
    return None


def _find(
    form: tuple,
    given: Sequence[Tensor],
    seen: "_Seen",
    record: Callable[[], Recording | None],
    is_again: Callable[["_Seen"], bool],
) -> Recording | None:
    """The recording of a form, that of the ``given`` tensors, if there is one.

    The first call keeps ``seen``. The first later call for which ``is_again(seen)`` is true keeps
    what ``record()`` returns.
    """
    with _lock:
        recording = _recordings.get(form)
        if recording is not None:
            _recordings.move_to_end(form)
            _add_entry(form, recording, given)
            return recording
        first = _seen.setdefault(form, seen)
        _seen.move_to_end(form)
        _forget(_seen, MAX_SEEN)
    # One at a time, because recorders mark memories. Others run step by step instead of waiting,
    # which could be for their own thread: an autograd thread whose backward calls this again.
    is_new = first is seen
    if is_new or first is _REFUSED or not is_again(first):
        return None
    if not _one_records.acquire(blocking=False):
        return None
    try:
        recording = record()
    finally:
        _one_records.release()
    with _lock:
        if recording is None:
            _seen[form] = _REFUSED
            return None
        _seen.pop(form, None)
        _recordings[form] = recording
        _add_entry(form, recording, given)
        for old in _forget(_recordings, MAX_RECORDINGS):
            _remove_entries(old)
    return recording


def _add_entry(form: tuple, recording: Recording, given: Sequence[Tensor]) -> None:
    key = _key_of_entry(form[0], given)
    entries = _entries.get(key, ())
    if len(entries) < MAX_ENTRIES:
        dims: dict[str, Any] = dict(
            dynamic_dims_sizes=[list(x.shape) for x in given],
            dynamic_dims_strides=[list(x.stride()) for x in given],
        )
        _entries[key] = (*entries, _Entry(TensorGuards(*given, **dims), form, recording))


def _remove_entries(form: tuple) -> None:
    for key, entries in list(_entries.items()):
        others = tuple(entry for entry in entries if entry.form != form)
        if others:
            _entries[key] = others
        else:
            del _entries[key]


def _key_of_entry(key: Hashable, given: Sequence[Tensor]) -> Hashable:
    # Guards raise for another number of tensors, such as those of a layer with biases.
    return key, len(given), autocast_dtype(given[0].device), torch.is_grad_enabled()


def _forget(forms: OrderedDict[Any, Any], most: int) -> list:
    """Keep those that were called last; gives the others."""
    return [forms.popitem(last=False)[0] for _ in range(len(forms) - most)]


class _Steps:
    """Counts training steps by the ops that run: one begins with a forward after a backward."""

    def __init__(self):
        self._number, self._in_backward = 0, False

    def number(self, *, backward: bool) -> int:
        if self._in_backward and not backward:
            self._number += 1
        self._in_backward = backward
        return self._number


_steps = _Steps()


def clear() -> None:
    """Forget all recordings, which frees the index tensors that they hold. Later calls are recorded
    again."""
    with _lock:
        _recordings.clear()
        _entries.clear()
        _seen.clear()


def launch(kernel: Callable, *arguments) -> None:
    """Launch a compiled kernel. If the call is recorded, this is a step of it."""
    recorder = RecordingMode.current()
    if recorder is not None:
        recorder.note(kernel, arguments, {}, None)
    kernel(*arguments)


_REFUSED = object()


class _Seen(NamedTuple):
    """Of a form that was called once: the first parameter then, None without any; and of an op the
    step, -1 if it does not train."""

    first: "ref[Tensor] | None"
    step: int = -1

    def by_same(self, parameters: Sequence[Tensor]) -> bool:
        """Whether a call is not of another layer in the same step, after which the form may never
        come again."""
        first = None if self.first is None else self.first()
        return first is None or any(first is p for p in parameters[:1])


class _Entry(NamedTuple):
    """A recording of ``_recordings``, and what tells whether tensors in the same modes are of its
    form."""

    guards: TensorGuards
    form: tuple
    recording: Recording


_recordings: OrderedDict[tuple, Recording] = OrderedDict()
_entries: dict[Hashable, tuple[_Entry, ...]] = {}
"""By :func:`_key_of_entry`."""
_seen: OrderedDict[Hashable, Any] = OrderedDict()
_lock = Lock()
_one_records = Lock()
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _may_record(given: Sequence[Tensor], parameters: Sequence[Tensor]) -> bool:
    """Whether nobody looks at single operations, or changes what they do."""
    device = given[0].device
    return (
        given[0].numel() <= MAX_ELEMENTS
        and _is_unobserved(given[0], parameters)
        and _PLAIN_TYPES.issuperset(map(type, given))
        and _are_in_order(given)
        and [x.device for x in given].count(device) == len(given)
    )


def _is_unobserved(x: Tensor, parameters: Sequence[Tensor]) -> bool:
    """What :func:`_may_record` asks of the call; the rest is about its tensors."""
    # Lists of one attribute, which take the host less time than a generator.
    return (
        ENABLED
        and may_keep(x)
        and not torch._C._len_torch_dispatch_stack()
        and not _sees_functions()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.is_anomaly_enabled()
        and True not in [bool(p._backward_hooks) for p in parameters]
        and False not in [p.is_leaf for p in parameters]
    )


def _sees_functions() -> bool:
    """Whether a mode sees functions of PyTorch, but for that of a default device."""
    depth = torch._C._len_torch_function_stack()
    at = torch._C._get_function_stack_at
    return depth > 0 and any(type(at(i)) is not DeviceContext for i in range(depth))


def _are_in_order(given: Sequence[Tensor]) -> bool:
    """Whether tensors have strides, without which guards end the process, and aligned memory."""
    return (
        True not in [x.is_nested for x in given]
        and [x.layout for x in given].count(torch.strided) == len(given)
        and [x.data_ptr() % 16 for x in given].count(0) == len(given)
    )


_form = attrgetter("shape", "dtype")
_form_with_gradients = attrgetter("shape", "dtype", "requires_grad")
