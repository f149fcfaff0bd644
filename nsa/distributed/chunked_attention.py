"""One rank's attention: keys and values gathered a chunk of KV heads at a time, also in backward.

Each chunk is one call of the backend, or one for each query segment, and the backend's own autograd
gives the gradients. Its graph does not save gathered keys and values, only their places; backward
gathers them again.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from nsa.distributed.backend_calls import BackendCall
from nsa.distributed.call import Chunk, RankCall, RankInputs, chunks
from nsa.distributed.collectives import Exchanging, Gathering
from nsa.distributed.head_copies import copy_rows
from nsa.distributed.key_rows import RowSums, in_place, runs_to_take, take_rows
from nsa.precision import accumulation_dtype
from nsa.results import Results
from nsa.validation import UnsupportedError


def attend(call: RankCall, block_indices: Tensor | None, inputs: RankInputs) -> Tensor:
    """Output ``(T, H, Dv)`` of this rank's queries, without gradients.

    Args:
        block_indices: ``(T, H_kv, n)``, or ``(H, tiles, n)`` in tile mode; None to select.
    """
    out = _empty_output(call, inputs)
    for chunk, keys, arrive in _Chunks(call, inputs):
        for one in call.layout.calls:
            given = {name: chunk.of_call(name, x, one) for name, x in _named(inputs)}
            own = [x[one.keys] for x in keys]
            target = out[one.rows, chunk.query]
            results = Results(out=target, before_keys=arrive)
            result = _run(call, chunk, one, block_indices, given, own, results)
            _put(target, result)
            del own, given
        # Free these before more is gathered.
        del keys, arrive, results
    return out


class _Chunks:
    """Each chunk, its gathered keys and values, and what is to be called before they are read.

    The next are gathered while one is computed.
    """

    def __init__(self, call: RankCall, inputs: RankInputs):
        self.call, self.inputs = call, inputs

    def __iter__(self):
        parts = chunks(self.call, self.inputs)
        coming = self._gather(parts[0])
        for at, chunk in enumerate(parts):
            arrive = partial(_wait_for_all, coming)
            received = [gathering.rows for gathering in coming]
            coming = self._gather(parts[at + 1]) if at + 1 < len(parts) else []
            if not in_place(self.call.layout):
                arrive()
            yield chunk, [take_rows(x, self.call.layout) for x in received], arrive

    def _gather(self, chunk: Chunk) -> list[Gathering]:
        layout, group = self.call.layout, self.call.group
        runs = runs_to_take(layout)
        return [
            Gathering(x[:, chunk.kv], group, runs, layout.heads, layout.swap)
            for x in self.inputs.kv
        ]


def _wait_for_all(gatherings: list[Gathering]):
    for gathering in gatherings:
        gathering.wait()


def _run(
    call: RankCall,
    chunk: Chunk,
    one: BackendCall,
    block_indices: Tensor | None,
    inputs: dict[str, Any],
    keys: Sequence,
    results: Results,
) -> Tensor:
    """The output of a call of the backend.

    Args:
        inputs: of the call, those of :class:`RankInputs` without ``kv``.
        keys: of the call, for each of ``kv``.
        results: where it may be written.
    """
    # Branches that share keys get the same tensor, by which the backend recognises it.
    forms = [_in_form(x, one) for x in keys]
    k_slc, k_win, v_slc, v_win = (forms[i] for i in call.branches)
    named = {name: _in_form(x, one) for name, x in inputs.items() if name != "gate_proj_weight"}
    extra: dict[str, Any] = {}
    if one.packed:
        extra["boundaries"] = call.layout.boundaries
        if call.layout.segments is not None:
            extra["segments"] = call.layout.segments
    out = call.backend.forward(
        named["q"],
        (k_slc, k_slc, k_win),
        (v_slc, v_slc, v_win),
        config=call.config,
        gates=named["gates"],
        gate_proj_weight=inputs["gate_proj_weight"],
        compressed_kv=(named["k_cmp"], named["v_cmp"]),
        block_indices=_in_form(chunk.of_indices(block_indices, one, call.config), one),
        max_workspace_bytes=call.max_workspace_bytes,
        recompute_window=call.recompute_window,
        deterministic=call.deterministic,
        results=results,
        **extra,
    )
    # squeeze, because the derivative of out[0] first fills a tensor with zeros.
    return out if one.packed else out.squeeze(0)


def _in_form(x: Tensor | None, one: BackendCall) -> Tensor | None:
    """Flat rows, or indices, as the call has them."""
    return x if x is None or one.packed else x[None]


def _put(target: Tensor, result: Tensor):
    """Copy a result to where it belongs, unless the backend wrote it there."""
    if result.data_ptr() != target.data_ptr():
        copy_rows(target, result)


def _named(inputs: RankInputs):
    return zip(RankInputs._fields[:-1], inputs.tensors, strict=True)


def _empty_output(call: RankCall, inputs: RankInputs) -> Tensor:
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


class _CallGraph(NamedTuple):
    """The graph of a call of a chunk: its output, its inputs by name (``kv`` by number), and where
    it may write gradients."""

    out: GradientEdge
    inputs: dict[str | int, GradientEdge]
    results: Results


class _Leaves(torch.autograd.Function):
    """Inputs of a graph that, unlike leaves, do not keep their memory."""

    @staticmethod
    def forward(_, anchor: Tensor, *tensors: Tensor):
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(_, *grads):
        return (None,) * (len(grads) + 1)


class RankAttentionNode(torch.autograd.Function):
    """:func:`attend` of the tensors of :class:`RankInputs`; differentiable once."""

    @staticmethod
    def forward(ctx, call: RankCall, block_indices: Tensor | None, *flat):
        inputs = RankInputs.of(flat)
        needed = dict(zip(_keys(inputs), ctx.needs_input_grad[2:], strict=True))
        saved, graphs = _Saved(), []
        out = _empty_output(call, inputs)
        for chunk, keys, arrive in _Chunks(call, inputs):
            saved.gathered = keys
            for one in call.layout.calls:
                target = out[one.rows, chunk.query]
                results = Results(out=target, before_keys=arrive)
                with torch.enable_grad(), saved.hooks():
                    graph, result = _record(
                        call, chunk, one, block_indices, inputs, keys, needed, results
                    )
                _put(target, result.detach())
                results.out = results.before_keys = None
                graphs.append(graph)
                del result
            saved.gathered = []
            # Free these before more is gathered.
            del keys, arrive
        ctx.save_for_backward(*flat, *saved.tensors)
        ctx.call, ctx.graphs, ctx.saved = call, graphs, saved
        saved.tensors = []
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        needed = ctx.needs_input_grad[2:]
        # Read once, because checkpointing unpacks once.
        tensors = ctx.saved_tensors
        flat, saved = tensors[: len(needed)], tensors[len(needed) :]
        grads = _RankGradients.apply(dout, ctx.call, ctx.graphs, ctx.saved, saved, needed, *flat)
        return None, None, *grads


class _RankGradients(torch.autograd.Function):
    """A separate node, so that with ``create_graph`` a second derivative raises an error."""

    @staticmethod
    def forward(
        _,
        dout: Tensor,
        call: RankCall,
        graphs: list[_CallGraph],
        saved: _Saved,
        tensors,
        needed,
        *flat,
    ):
        inputs = RankInputs.of(flat)
        names = _keys(inputs)
        grads = {
            name: _empty_gradient(name, x, call)
            for name, x, need in zip(names, flat, needed, strict=True)
            if need
        }
        saved.tensors = list(tensors)
        sums: list[Exchanging] = []
        coming = iter(graphs)
        for chunk, keys, arrive in _Chunks(call, inputs):
            arrive()
            saved.gathered = keys
            key_sums = _key_sums(call, keys, grads)
            totals = {
                at: RowSums(call.layout, x, rounded=key_sums is not None)
                for at, x in enumerate(keys)
                if at in grads
            }
            for one in call.layout.calls:
                graph = next(coming)
                graph.results.dq = chunk.of_call("q", grads.get("q"), one)
                graph.results.keys = None if key_sums is None else key_sums.of_call(one.keys)
                results = torch.autograd.grad(
                    graph.out, tuple(graph.inputs.values()), dout[one.rows, chunk.query],
                    retain_graph=True, allow_unused=True,
                )  # fmt: skip
                for name, result in zip(graph.inputs, results, strict=True):
                    _store(chunk, one, name, result, grads, totals)
                graph.results.dq = graph.results.keys = None
                del results, result
            saved.gathered = []
            own = {at: grads[at][:, chunk.kv] for at in totals}
            exchanges = _exchange(key_sums, call, totals, own)
            del key_sums
            _finish(sums)
            sums = exchanges
            # Free these before more is gathered.
            del keys, arrive, totals
        _finish(sums)
        saved.tensors = []
        return tuple(
            None if name not in grads else grads[name].to(x.dtype)
            for name, x in zip(names, flat, strict=True)
        )

    @staticmethod
    def backward(_, *__):
        raise UnsupportedError(
            "nsa.distributed.forward can be differentiated once, not twice: its gradients have no "
            "derivative"
        )


def _keys(inputs: RankInputs) -> list[str | int]:
    """A name for each tensor: a field's, or the number of one of ``kv``."""
    return [*RankInputs._fields[:-1], *range(len(inputs.kv))]


def _record(
    call: RankCall,
    chunk: Chunk,
    one: BackendCall,
    block_indices: Tensor | None,
    inputs: RankInputs,
    keys: Sequence[Tensor],
    needed: dict,
    results: Results,
) -> tuple[_CallGraph, Tensor]:
    """Run a call of a chunk and keep its graph."""
    given: dict[str | int, Any] = {
        name: None if x is None else chunk.of_call(name, x.detach(), one)
        for name, x in _named(inputs)
    }
    given |= {at: x[one.keys] for at, x in enumerate(keys)}
    wanted = [name for name, need in needed.items() if need]
    anchor = torch.empty(0, device="cpu", requires_grad=True)
    leaves = _Leaves.apply(anchor, *(given[name] for name in wanted))
    given |= dict(zip(wanted, leaves, strict=True))
    edges = {name: get_gradient_edge(given[name]) for name in wanted}
    named = {name: given[name] for name, _ in _named(inputs)}
    own = [given[i] for i in range(len(keys))]
    result = _run(call, chunk, one, block_indices, named, own, results)
    return _CallGraph(get_gradient_edge(result), edges, results), result


def _empty_gradient(name: str | int, x: Tensor, call: RankCall) -> Tensor:
    """What the calls write a gradient to. Gradients of weights are added, so they start at 0."""
    if name == "gate_proj_weight":
        return torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))
    if call.heads_apart and not isinstance(name, str):
        rows, heads, dim = x.shape
        return x.new_empty(heads, rows, dim).transpose(0, 1)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _store(chunk: Chunk, one: BackendCall, name, result: Tensor | None, grads: dict, totals: dict):
    """Write the gradient of an input of a call, or add it to that of other calls."""
    if not isinstance(name, str):
        if result is not None:
            totals[name].add(result, one)
        return
    target = chunk.of_call(name, grads[name], one)
    assert target is not None
    if name == "gate_proj_weight":
        if result is not None:
            target += result
    elif result is None:
        target.zero_()
    else:
        _put(target, result)


def _key_sums(call: RankCall, keys: Sequence[Tensor], grads: dict):
    """Sums that the calls of a chunk add gradients of keys to, if the backend can."""
    k_slc, k_win, v_slc, v_win = call.branches
    shared = k_slc == k_win and v_slc == v_win and k_slc != v_slc
    runs = call.layout.key_runs if call.layout.separate else None
    if not shared or runs is None or not (k_slc in grads or v_slc in grads):
        return None
    return call.backend.make_key_sums(
        keys[k_slc], keys[v_slc], [count for _, count in runs], call.config,
        deterministic=call.deterministic,
    )  # fmt: skip


def _exchange(
    key_sums, call: RankCall, totals: dict[int, RowSums], own: dict[int, Tensor]
) -> list[Exchanging]:
    """Send the gradients of a chunk, each while the next are rounded. The sums of own rows are for
    ``own``."""
    exchanges = []
    for at, total in totals.items():
        if key_sums is not None:
            which = int(at == call.branches[2])  # 0: keys, 1: values
            total.add_from(partial(key_sums.round_into, which))
            for first, grad in key_sums.windows(which):
                total.add_some(grad, first)
        exchanges.append(Exchanging(total.result(), call.group, own[at]))
    return exchanges


def _finish(sums: list[Exchanging]):
    for exchanging in sums:
        exchanging.wait()
