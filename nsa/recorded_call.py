"""A recorded call: its operations and launches, forward and backward, as one autograd node.

It knows tensors by their memory. The memory of each tensor that is given, and of each that an
operation allocates, has a number; all others are constants. An argument of a step is a view of a
memory. What PyTorch allocates is allocated in each call, and freed after its last use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa.precision import without_autocast

Memories = list[Any]
"""By number, a tensor that has the memory; None before it is allocated and after its last use."""

Getter = Callable[[Memories], Any]
"""Gives an argument of a step."""


class Step(NamedTuple):
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
        steps, output: of the forward; the output is a tensor, or a list of them.
        saved: memories that the backward needs.
        dout: the memory of the output's gradient; None without a backward.
        backward_steps, gradients: of the backward. There is a gradient for each given tensor, None
            for one without.
    """

    memories: int
    steps: tuple[Step, ...]
    output: Getter
    saved: tuple[int, ...]
    dout: int | None
    backward_steps: tuple[Step, ...]
    gradients: tuple[Getter | None, ...]

    def forward(self, given: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The output, and what the backward needs."""
        memories: Memories = [*given, *(None,) * (self.memories - len(given))]
        with torch.cuda.device_of(given[0]), without_autocast(given[0].device):
            _run(self.steps, memories)
        return self.output(memories), [memories[number] for number in self.saved]

    def backward(self, dout: Tensor, saved: list[Tensor]) -> list[Tensor | None]:
        """The gradients of the given tensors. ``saved`` is emptied, so that steps free memory."""
        memories: Memories = [None] * self.memories
        for number in reversed(self.saved):
            memories[number] = saved.pop()
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


def _run(steps: tuple[Step, ...], memories: Memories) -> None:
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


class RecordingNode(torch.autograd.Function):
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
        saved = list(ctx.saved_tensors[: len(ctx.recording.saved)])
        # Unless there may be another backward.
        ctx.maybe_clear_saved_tensors()
        return None, *ctx.recording.backward(dout, saved)


class _Gradients(torch.autograd.Function):
    """A separate node, so that with ``create_graph`` a second derivative raises an error."""

    @staticmethod
    def forward(_, recording: Recording, dout: Tensor, *saved):
        return tuple(recording.backward(dout, list(saved[: len(recording.saved)])))

    @staticmethod
    def backward(_, *__):
        raise RuntimeError(
            "nsa.forward can be differentiated once, not twice: its gradients have no derivative"
        )
