"""One rank's attention: keys and values gathered a chunk of KV heads at a time, also in backward.

Each chunk is one call of the backend, whose own autograd gives the gradients. What its graph saves
of gathered keys and values is only where it lies in them: backward gathers them again.
"""

import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.distributed import ProcessGroup

from nsa.config import NSAConfig
from nsa.distributed.collectives import Gathering, Summing
from nsa.distributed.key_rows import return_rows, take_rows
from nsa.distributed.layout import Layout

CHUNK_BYTES = 1 << 28
"""Gathered keys and values of a chunk, unless one KV head has more."""

NO_LIMIT = sys.maxsize
"""The workspace of a chunk unless the caller limits it. Not the free memory as on one GPU: what
ranks compute again must not depend on what else lies on their devices."""


class Call(NamedTuple):
    """What is not a tensor in a call.

    Attributes:
        layout: this rank's part.
        group: the ranks.
        backend: the package that attends.
        config: block sizes and rules.
        branches: for ``(k_slc, k_win, v_slc, v_win)``, which of the given keys and values it is.
        max_workspace_bytes: the limit of each chunk's workspace.
        recompute_window: as in :func:`nsa.forward`.
    """

    layout: Layout
    group: ProcessGroup
    backend: ModuleType
    config: NSAConfig
    branches: tuple[int, ...]
    max_workspace_bytes: int
    recompute_window: bool


class Inputs(NamedTuple):
    """The differentiable tensors of a call: flat rows of this rank, all compressed blocks.

    Attributes:
        q: ``(T, H, D)``.
        gates: ``(T, H, 3)`` or None.
        gate_proj_weight: ``(H, 3, D)`` or None.
        k_cmp, v_cmp: of the sequences of keys of the layout, ``(M, H_kv, D)`` and
            ``(M, H_kv, Dv)``.
        kv: this rank's keys and values, each once, ``(T, H_kv, ...)``.
    """

    q: Tensor
    gates: Tensor | None
    gate_proj_weight: Tensor | None
    k_cmp: Tensor
    v_cmp: Tensor
    kv: tuple[Tensor, ...]

    @classmethod
    def of(cls, flat: Sequence) -> "Inputs":
        """From all tensors in one row."""
        q, gates, gate_proj_weight, k_cmp, v_cmp, *kv = flat
        return cls(q, gates, gate_proj_weight, k_cmp, v_cmp, tuple(kv))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All but :attr:`kv`."""
        return self[:-1]

    @property
    def num_kv_heads(self) -> int:
        return self.k_cmp.shape[1]


class Chunk(NamedTuple):
    """Some KV heads and the query heads that attend them."""

    kv: slice
    query: slice

    def of(self, name: str, x: Tensor | None) -> Tensor | None:
        """The part of a field of :class:`Inputs`."""
        if x is None:
            return None
        if name == "gate_proj_weight":
            return x[self.query]
        return x[:, self.query] if name in ("q", "gates") else x[:, self.kv]

    def of_indices(self, indices: Tensor | None, config: NSAConfig) -> Tensor | None:
        """The part of ``block_indices``, ``(T, H_kv, n)`` or ``(H, tiles, n)``."""
        if indices is None:
            return None
        return indices[:, self.kv] if config.selection == "token" else indices[self.query]


def attend(call: Call, block_indices: Tensor | None, inputs: Inputs) -> Tensor:
    """Output ``(T, H, Dv)`` of this rank's queries; differentiable once.

    Args:
        block_indices: ``(T, H_kv, n)``, or ``(H, tiles, n)`` in tile mode; None to select.
    """
    flat = (*inputs.tensors, *inputs.kv)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in flat):
        return _AttentionNode.apply(call, block_indices, *flat)
    out = _empty_output(call, inputs)
    for chunk, keys in _Chunks(call, inputs):
        arguments = {name: chunk.of(name, x) for name, x in _named(inputs)}
        out[:, chunk.query] = _run(call, chunk, block_indices, arguments, keys)
    return out


def chunks(call: Call, inputs: Inputs) -> list[Chunk]:
    """The chunks, equal on all ranks: they follow from shapes and never from free memory."""
    heads = inputs.num_kv_heads
    rows = call.layout.ranks * call.layout.rows
    one = sum(rows * x.shape[-1] * x.element_size() for x in inputs.kv)
    size = max(1, min(heads, CHUNK_BYTES // max(1, one)))
    size = math.ceil(heads / math.ceil(heads / size))
    group = inputs.q.shape[1] // heads
    starts = range(0, heads, size)
    return [
        Chunk(slice(at, min(at + size, heads)), slice(at * group, min(at + size, heads) * group))
        for at in starts
    ]


class _Chunks:
    """Each chunk with its gathered keys and values. The next are gathered while one is computed."""

    def __init__(self, call: Call, inputs: Inputs):
        self.call, self.inputs = call, inputs

    def __iter__(self):
        parts = chunks(self.call, self.inputs)
        coming = self._gather(parts[0])
        for at, chunk in enumerate(parts):
            received = [gathering.wait() for gathering in coming]
            coming = self._gather(parts[at + 1]) if at + 1 < len(parts) else []
            yield chunk, [take_rows(x, self.call.layout) for x in received]

    def _gather(self, chunk: Chunk) -> list[Gathering]:
        return [Gathering(x[:, chunk.kv], self.call.group) for x in self.inputs.kv]


def _run(
    call: Call, chunk: Chunk, block_indices: Tensor | None, inputs: dict[str, Any], keys: Sequence
) -> Tensor:
    """The backend's output for a chunk. ``inputs`` are those of :class:`Inputs` without ``kv``."""
    k_slc, k_win, v_slc, v_win = (keys[i] for i in call.branches)
    extra = {} if call.layout.segments is None else {"segments": call.layout.segments}
    return call.backend.forward(
        inputs["q"],
        (k_slc, k_slc, k_win),
        (v_slc, v_slc, v_win),
        config=call.config,
        gates=inputs["gates"],
        gate_proj_weight=inputs["gate_proj_weight"],
        compressed_kv=(inputs["k_cmp"], inputs["v_cmp"]),
        block_indices=chunk.of_indices(block_indices, call.config),
        boundaries=call.layout.boundaries,
        max_workspace_bytes=call.max_workspace_bytes,
        recompute_window=call.recompute_window,
        **extra,
    )


def _named(inputs: Inputs):
    return zip(Inputs._fields[:-1], inputs.tensors, strict=True)


def _empty_output(call: Call, inputs: Inputs) -> Tensor:
    value = inputs.kv[call.branches[2]]
    return inputs.q.new_empty(*inputs.q.shape[:2], value.shape[-1])


class _Saved:
    """What the graphs of the chunks save.

    The node saves :attr:`tensors` itself, so that checkpointing and offloading see them. Of
    gathered keys and values only the place is saved.
    """

    def __init__(self):
        self.tensors: list[Tensor] = []
        self.gathered: list[Tensor] = []

    def hooks(self):
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor):
        for at, keys in enumerate(self.gathered):
            same = x.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
            if same and x.dtype == keys.dtype and x.numel():
                return at, x.shape, x.stride(), x.storage_offset()
        self.tensors.append(x.detach())
        return len(self.tensors) - 1

    def _unpack(self, packed) -> Tensor:
        if isinstance(packed, int):
            return self.tensors[packed]
        at, *place = packed
        return self.gathered[at].as_strided(*place)


class _Part(NamedTuple):
    """The graph of a chunk: its output, and its inputs by name (``kv`` by number)."""

    out: GradientEdge
    inputs: dict[str | int, GradientEdge]


class _Leaves(torch.autograd.Function):
    """Inputs of a graph that, unlike leaves, do not keep their memory."""

    @staticmethod
    def forward(_, anchor: Tensor, *tensors: Tensor):
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(_, *grads):
        return (None,) * (len(grads) + 1)


class _AttentionNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, block_indices: Tensor | None, *flat):
        inputs = Inputs.of(flat)
        needed = dict(zip(_keys(inputs), ctx.needs_input_grad[2:], strict=True))
        saved, parts = _Saved(), []
        out = _empty_output(call, inputs)
        for chunk, keys in _Chunks(call, inputs):
            saved.gathered = keys
            with torch.enable_grad(), saved.hooks():
                part, result = _record(call, chunk, block_indices, inputs, keys, needed)
            out[:, chunk.query] = result.detach()
            parts.append(part)
            del result
            saved.gathered = []
        ctx.save_for_backward(*flat, *saved.tensors)
        ctx.call, ctx.parts, ctx.saved = call, parts, saved
        saved.tensors = []
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        needed = ctx.needs_input_grad[2:]
        # Read once, because checkpointing unpacks once.
        tensors = ctx.saved_tensors
        flat, saved = tensors[: len(needed)], tensors[len(needed) :]
        arguments = (dout, ctx.call, ctx.parts, ctx.saved, saved, needed)
        return None, None, *_Gradients.apply(*arguments, *flat)


class _Gradients(torch.autograd.Function):
    """A separate node, so that with ``create_graph`` a second derivative raises an error."""

    @staticmethod
    def forward(
        _, dout: Tensor, call: Call, parts: list[_Part], saved: _Saved, tensors, needed, *flat
    ):
        inputs = Inputs.of(flat)
        names = _keys(inputs)
        grads = {
            name: torch.empty_like(x, memory_format=torch.contiguous_format)
            for name, x, need in zip(names, flat, needed, strict=True)
            if need
        }
        saved.tensors = list(tensors)
        sums: list[tuple[Tensor, Summing]] = []
        for part, (chunk, keys) in zip(parts, _Chunks(call, inputs), strict=True):
            saved.gathered = keys
            results = torch.autograd.grad(
                part.out, tuple(part.inputs.values()), dout[:, chunk.query],
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
            saved.gathered = []
            _finish(sums)
            for name, result in zip(part.inputs, results, strict=True):
                _store(call, chunk, name, grads, result, keys, sums)
        _finish(sums)
        saved.tensors = []
        return tuple(grads.get(name) for name in names)

    @staticmethod
    def backward(_, *__):
        raise RuntimeError(
            "nsa.distributed.forward can be differentiated once, not twice: its gradients have no "
            "derivative"
        )


def _keys(inputs: Inputs) -> list[str | int]:
    """A name for each tensor: a field's, or the number of one of ``kv``."""
    return [*Inputs._fields[:-1], *range(len(inputs.kv))]


def _record(
    call: Call,
    chunk: Chunk,
    block_indices: Tensor | None,
    inputs: Inputs,
    keys: Sequence[Tensor],
    needed: dict,
) -> tuple[_Part, Tensor]:
    """Run a chunk and keep its graph."""
    given: dict[str | int, Any] = {
        name: None if x is None else chunk.of(name, x.detach()) for name, x in _named(inputs)
    }
    given |= dict(enumerate(keys))
    wanted = [name for name, need in needed.items() if need]
    anchor = torch.empty(0, device="cpu", requires_grad=True)
    leaves = _Leaves.apply(anchor, *(given[name] for name in wanted))
    given |= dict(zip(wanted, leaves, strict=True))
    edges = {name: get_gradient_edge(given[name]) for name in wanted}
    named = {name: given[name] for name, _ in _named(inputs)}
    result = _run(call, chunk, block_indices, named, [given[i] for i in range(len(keys))])
    return _Part(get_gradient_edge(result), edges), result


def _store(call: Call, chunk: Chunk, name, grads: dict, result, keys, sums: list):
    """Write a gradient of a chunk, or begin to sum that of keys or values over ranks."""
    if isinstance(name, str):
        target = chunk.of(name, grads[name])
        assert target is not None
        target.copy_(torch.zeros_like(target) if result is None else result)
        return
    if result is None:
        result = torch.zeros_like(keys[name])
    addends = return_rows(result, call.layout)
    sums.append((grads[name][:, chunk.kv], Summing(addends, call.group)))


def _finish(sums: list[tuple[Tensor, Summing]]):
    for target, summing in sums:
        target.copy_(summing.wait())
    sums.clear()
