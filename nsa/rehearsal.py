"""Makes the recording of a call, which it first rehearses."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from nsa.host import NotRecordable, RecordingMode
from nsa.precision import autocast_dtype, without_autocast
from nsa.recorded_call import Recording
from nsa.recorder import MARK, Recorder

_logger = logging.getLogger("nsa")


def record_call(
    function: Callable[..., Any],
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    differentiable: bool,
    *,
    num_bounds: int = 0,
    rehearse: bool = False,
) -> Recording | None:
    """The recording of a call; None if it cannot be recorded. With gradients it is rehearsed.

    The last ``num_bounds`` of the ``tensors`` are the boundaries of a Packing.
    """
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
        elif rehearse:
            with _Rehearsal():
                function(*leaves)
        recorder = Recorder(given, range(len(tensors) - num_bounds, len(tensors)))
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
        return None
    finally:
        for x in given:
            vars(x.untyped_storage()).pop(MARK, None)


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

    def mark(self, name: str, function: Callable[[], None]) -> None:
        pass
