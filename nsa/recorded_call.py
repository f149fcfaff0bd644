"""A recorded call: its operations and launches, forward and backward, as one autograd node.

It knows tensors by their memory. The memory of each tensor that is given, and of each that an
operation allocates, has a number; all others are constants. An argument of a step is a view of a
memory. The first numbers are those of the given tensors. Each call allocates its results, what it
saves, and one arena in which all others lie, see :mod:`nsa.recorded_memory`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from nsa.derivatives import FirstDerivatives
from nsa.packing import Packing
from nsa.precision import without_autocast
from nsa.recorded_code import Code
from nsa.recorded_graphs import Graphs

_below_autograd = torch._C._AutoDispatchBelowAutograd
"""Without it autograd keeps account of views and versions of what nobody else sees, which takes the
host longer than the views themselves."""

_no_modes = torch._C.DisableTorchFunction
"""Without it the mode of a default device sees each step, which takes the host longer."""


class RecordedPart:
    """A function of a recording: of a list of tensors.

    Args:
        forms: shapes, strides and dtypes of its results and arenas.
        device: where it allocates them.
        code: of the list and these.
        as_graphs: whether it is to be captured.
    """

    def __init__(
        self, forms: Sequence[tuple], device: torch.device, code: Code, *, as_graphs: bool
    ):
        self._forms, self._device, self._give = forms, device, code.give
        self._run = Graphs(code.run).run if as_graphs else code.run

    def __call__(self, given: list[Tensor]) -> Any:
        x = given[0]
        with torch.cuda.device_of(x), without_autocast(x.device), _below_autograd(), _no_modes():
            memories = given + self.allocate()
            self._run(memories)
            return self._give(memories)

    def allocate(self) -> list[Tensor]:
        """The results and arenas."""
        if self._device.type == "cuda":
            # As Inductor allocates, in half the time. A call runs on its device. PyTorch 2.11 takes
            # tuples alone, not sizes.
            return [_empty_strided_cuda(*form) for form in self._forms]
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
            for shape, strides, dtype in self._forms
        ]


class Recording(NamedTuple):
    """A recorded call. The first memories are the tensors that are given.

    Attributes:
        run_plan: gives a list of what follows from boundaries alone and :attr:`run_forward` takes
            after the given tensors, from the boundaries; None if that is nothing.
        run_forward: gives the output, a tensor or a list of them, and a list of what the backward
            needs, from the given tensors.
        saved: the memories of what the backward needs. After them, in one arena, comes all that the
            forward makes for it.
        run_backward: gives the gradients of the given tensors, None for one without, from the
            output's gradient and what is saved. It writes to the arena. None without any.
    """

    run_plan: RecordedPart | None
    run_forward: RecordedPart
    saved: tuple[int, ...]
    run_backward: RecordedPart | None

    def plan(self, packing: Packing | None) -> list[Tensor]:
        """What follows from the boundaries alone, which the Packing keeps."""
        if packing is None or self.run_plan is None:
            return []
        return packing.keep(self.run_plan, partial(self.run_plan, packing.bounds))

    def forward(self, given: Sequence[Tensor], plan: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
        """The output, and what the backward needs."""
        return self.run_forward([*given, *plan])

    def backward(self, dout: Tensor, saved: Sequence[Tensor], *, keep: bool) -> list[Tensor | None]:
        """The gradients of the given tensors; ``keep`` says whether what is ``saved`` is needed
        again."""
        if type(dout) is not Tensor:
            dout = _plain(dout)
        if not dout.is_contiguous() or dout.data_ptr() % 16:
            dout = dout.clone(memory_format=torch.contiguous_format)
        assert self.run_backward is not None  # as there is a gradient
        *tensors, arena = saved
        return self.run_backward([dout, *tensors, arena.clone() if keep else arena])


def _plain(dout: Tensor) -> Tensor:
    """A copy of a subclass, which launches could not read, and whose operations give more of it."""
    with torch._C.DisableTorchFunctionSubclass():
        copy = dout.clone(memory_format=torch.contiguous_format)
    if type(copy) is not Tensor:
        raise TypeError(f"the output's gradient must be a plain tensor, got {type(copy).__name__}")
    return copy


class RecordingNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, plan: list[Tensor], *given):
        out, saved = recording.forward(given, plan)
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
        recording, num_saved = ctx.recording, len(ctx.recording.saved) + 1
        if torch.is_grad_enabled():  # create_graph

            def run(dout: Tensor, *saved: Tensor) -> list[Tensor | None]:
                return recording.backward(dout, saved[:num_saved], keep=True)

            return None, None, *FirstDerivatives.apply(run, dout, *ctx.saved_tensors)
        saved = ctx.saved_tensors[:num_saved]
        # Unless the graph is kept, no other backward may take what this one writes to, also if it
        # fails in the middle.
        ctx.maybe_clear_saved_tensors()
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        return None, None, *recording.backward(dout, saved, keep=keep)


# Without what its class adds for transforms of torch.func, in which nothing is recorded.
run_node = super(torch.autograd.Function, RecordingNode).apply
