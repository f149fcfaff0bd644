"""What torch.compile, graph capture and autograd see, and when the host may read or keep values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


class RecordingMode(TorchDispatchMode):
    """A mode that records the operations of an eager call, see :mod:`nsa.recordings`."""

    of_plan = False
    """Whether launches are those of a plan, see :func:`launches_of_plan`."""

    @staticmethod
    def current() -> "RecordingMode | None":
        """The mode on this thread, if no other mode is."""
        if torch._C._len_torch_dispatch_stack() != 1:
            return None
        mode = torch._C._get_dispatch_stack_at(0)
        return mode if isinstance(mode, RecordingMode) else None

    def note(self, function: Callable, args: Sequence, kwargs: dict, result: Any) -> None:
        """Note a call of ``function`` that gave ``result``: a tensor, several, or None."""
        raise NotImplementedError

    def mark(self, name: str, function: Callable[[], None]) -> None:
        """Note a mark of :mod:`nsa.recorded_streams`, which ``function`` carries out later."""
        raise NotImplementedError


@contextmanager
def launches_of_plan() -> Iterator[None]:
    """Say that launches write index tensors which no other launch writes to.

    Those that follow from boundaries alone are then made once for all calls with a Packing.
    """
    recorder = RecordingMode.current()
    if recorder is None:
        yield
        return
    recorder.of_plan = True
    try:
        yield
    finally:
        recorder.of_plan = False


class NotRecordable(Exception):
    """Raised where a call does what may differ in a later call of the same form."""


def refuse_recording(reason: str) -> None:
    """Keep the call from being recorded, if it is."""
    if RecordingMode.current() is not None:
        raise NotRecordable(reason)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something intercepts each operation and must see custom ops instead of kernels.

    That is torch.compile, a dispatch mode (such as fake tensors or selective checkpointing), or a
    tensor subclass among ``tensors``.
    """
    return (
        torch.compiler.is_compiling()
        or (torch._C._len_torch_dispatch_stack() > 0 and RecordingMode.current() is None)
        or not _PLAIN_TYPES.issuperset(map(type, tensors))
    )


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph captures the work on the device of ``x``."""
    return x.is_cuda and is_capturing_on(x.device)


def is_capturing_on(device: torch.device) -> bool:
    """Whether a CUDA graph captures the work on a device."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.is_current_stream_capturing()


def may_keep(x: Tensor) -> bool:
    """Whether a tensor computed now on the device of ``x`` may be kept for later calls.

    Traced tensors may have no data, so they are not kept. On a GPU only the default stream allows
    it: a tensor computed on another stream is ready only for later work of that stream, and one
    from a graph capture exists only in replays. The memory may also belong to someone else:
    torch.compile(mode="reduce-overhead") runs a call once on its own stream in the memory of the
    coming graph, and fails if anything but the results stays there.
    """
    if is_traced(x):
        return False
    if not x.is_cuda:
        return True
    # The default stream is CUDA's null stream. A torch.cuda.Stream would take ten times as long.
    return torch._C._cuda_getCurrentRawStream(x.device.index) == 0 and not is_capturing(x)


def has_readable_values(x: Tensor) -> bool:
    """Whether the host can read values of ``x``; on a GPU it waits for them."""
    if torch.compiler.is_compiling() or is_capturing(x):
        return False
    return not has_no_values(x)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from ``tensors``."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_no_values(x: Tensor) -> bool:
    """Whether this is a meta or a fake tensor, as torch.export has; not in torch.compile."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return x.is_meta or (is_traced(x) and detect_fake_mode([x]) is not None)


def in_function_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) runs; not in torch.compile."""
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._are_functorch_transforms_active()
