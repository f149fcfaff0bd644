"""A layer of plain modules as one autograd node, or as one custom op while something traces.

torch.compile cannot see what a recorded call does, and an op, a product or a Triton kernel takes
the host longer than a step of a recording. So the inside of the op is recorded. What its backward
needs are results of the op, whose shapes follow from those of its inputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.derivatives import FirstDerivatives
from nsa.fused import ops
from nsa.fused.call_tensors import Inputs, Saved
from nsa.fused.compressed_forms import num_compressed_bound
from nsa.fused.custom_ops import custom_op
from nsa.fused.kernel_inputs import kernel_head_dim, multiplies_gates
from nsa.fused.layer_call import DIFFERENTIABLE, LayerCall, LayerInputs, LayerSaved
from nsa.fused.op_arguments import OpOptions, schema_of
from nsa.fused.plain_layer import project, run_layer, run_layer_backward
from nsa.fused.planning import make_plan, with_scale
from nsa.fused.schedule import ChunkSchedule, make_schedule
from nsa.fused.sizes import make_sizes

NUM_INPUTS = len(LayerInputs._fields)
_NUM_SAVED = len(LayerSaved._fields)


def heads_of(x: Tensor, heads: int, head_dim: int) -> Tensor:
    """A tensor with the shape and dtype that heads of ``x`` have, for checks and sizes alone."""
    return x[..., :1, None].expand(*x.shape[:-1], heads, head_dim)


def _heads_of_attention(given: LayerInputs, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """The same for queries and keys as attention gets them."""
    dim = len(given.q) // heads
    dim = kernel_head_dim(dim, dim)
    return heads_of(given.rows, heads, dim), heads_of(given.rows, kv_heads, dim)


def forward(
    given: LayerInputs,
    *,
    theta: float,
    heads: int,
    kv_heads: int,
    config: NSAConfig,
    boundaries: Boundaries | None,
    places: BlockPlaces | None,
    max_workspace_bytes: int | None,
    recompute_window: bool,
    deterministic: bool,
    save: bool,
) -> Tensor:
    """The layer's output.

    ``places`` are the blocks of the compressors, if any. ``save`` says whether ``x`` or a parameter
    needs a gradient, those of the output projection left out.
    """
    scale = config.softmax_scale(len(given.q) // heads)
    q, k = _heads_of_attention(given, heads, kv_heads)
    gated = given.gate is not None
    sizes = make_sizes(
        q, config, boundaries, num_keys=k.shape[1], num_kv_heads=kv_heads,
        gated_gradients=multiplies_gates(q.dtype, q if gated else None, None if gated else q),
        deterministic=deterministic,
    )  # fmt: skip
    inputs = Inputs._make([q, k, k, *(None,) * (len(Inputs._fields) - 3)])
    schedule = make_schedule(inputs, sizes, save=save, max_workspace_bytes=max_workspace_bytes)
    schedule = schedule._replace(recompute_window=recompute_window, deterministic=deterministic)
    if torch.compiler.is_compiling():
        options = OpOptions.of(None, boundaries, config, scale, schedule, save=save)
        return plain_layer(*given, theta, heads, kv_heads, *options)[0]
    plan = make_plan(
        q, with_scale(config, scale), boundaries, num_keys=k.shape[1], num_kv_heads=kv_heads
    )
    if places is not None:
        # Those of the plan, because the caller may change its own before backward.
        places = places._replace(token_bounds=plan.cu_seqlens)
    if places is not None and plan.packed and not places.blocks:
        # Attention takes as many rows as there could be blocks.
        bound = num_compressed_bound(q.shape[1], True, config)
        places = places._replace(blocks=bound, entry_blocks=bound)
    call = LayerCall.of(given, theta, heads, kv_heads, places=places, plan=plan, schedule=schedule)
    if not save:
        return run_layer(call, given, save=False)[0]
    # Aliases keep the current memory, because `leaf.data` may be set to another.
    return PlainLayerNode.apply(call, *(None if x is None else x.view_as(x) for x in given))


def heads(
    given: LayerInputs,
    *,
    theta: float,
    heads: int,
    kv_heads: int,
    config: NSAConfig,
    boundaries: Boundaries | None,
    places: BlockPlaces | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Queries, keys of the first branch, and compressed keys and values of :func:`forward`."""
    plan = make_plan(heads_of(given.rows, heads, len(given.q) // heads), config, boundaries)
    call = LayerCall.of(
        given, theta, heads, kv_heads, places=places, plan=plan, schedule=ChunkSchedule(1, False)
    )
    found = project(call, given)
    pair = None
    if places is not None:
        pair = call.layer_form(found.k_cmp), call.layer_form(found.v_cmp)
    return call.layer_form(found.q), call.layer_form(found.k), pair


class PlainLayerNode(torch.autograd.Function):
    """The node that is used while nothing traces."""

    @staticmethod
    def forward(ctx, call: LayerCall, *tensors):
        given = LayerInputs(*tensors)
        y, saved, of_attention = run_layer(call, given, save=True)
        assert saved is not None
        if not ctx.needs_input_grad[1 + DIFFERENTIABLE.index("out")]:
            saved = saved._replace(out=None)
        chunks = (x for part in of_attention for x in part.tensors())
        ctx.save_for_backward(*given, *saved, *chunks)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx, dout):
        tensors, wanted = list(ctx.saved_tensors), ctx.needs_input_grad[1:-1]
        # Unless there may be another backward, so that what is used up frees its memory.
        ctx.maybe_clear_saved_tensors()
        given, of_call = LayerInputs(*tensors[:NUM_INPUTS]), tensors[NUM_INPUTS:]
        del tensors
        run = partial(_gradients, ctx.call, wanted, of_call)
        if torch.is_grad_enabled():  # create_graph
            return None, *FirstDerivatives.apply(run, dout, *given), None
        return None, *run(dout, *given), None


def _gradients(
    call: LayerCall, wanted: Sequence[bool], tensors: list, dout: Tensor, *given
) -> list[Tensor | None]:
    """See :func:`run_layer_backward`. ``tensors``, which were saved, are emptied."""
    saved = [LayerSaved(*tensors[:_NUM_SAVED])]
    chunks = Saved.of_chunks(tensors[_NUM_SAVED:], recompute=call.schedule.recompute)
    tensors.clear()
    return run_layer_backward(call, LayerInputs(*given), dout, saved, chunks, wanted)


_SCHEMA = (
    f"{schema_of(LayerInputs)}, float theta, SymInt heads, SymInt kv_heads, {schema_of(OpOptions)}"
)


def _split(arguments: Sequence) -> tuple[LayerInputs, tuple[float, int, int], OpOptions]:
    numbers: Any = tuple(arguments[NUM_INPUTS : NUM_INPUTS + 3])
    return LayerInputs(*arguments[:NUM_INPUTS]), numbers, OpOptions(*arguments[NUM_INPUTS + 3 :])


@custom_op("plain_layer", f"({_SCHEMA}) -> (Tensor, Tensor[])")
def plain_layer(*arguments):
    """The layer's output and, with ``save``, what its backward needs."""
    given, numbers, options = _split(arguments)
    num_keys = given.x.shape[-2]
    found = ops.run_recorded(run_op, given, options, constants=numbers, num_keys=num_keys)
    out, *saved = found or run_op(*numbers, given, options)
    return out, saved


def _call_of_op(
    theta: float, heads: int, kv_heads: int, given: LayerInputs, options: OpOptions
) -> LayerCall:
    plan, places = options.plan(*_heads_of_attention(given, heads, kv_heads)), None
    if given.first_k is not None:
        rows = given.rows
        blocks = num_compressed_bound(rows.shape[1], plan.packed, plan.config)
        places = BlockPlaces(
            block_size=plan.config.compress_block_size,
            stride=plan.config.compress_stride,
            blocks=rows.shape[0] * blocks,
            entry_tokens=rows.shape[1],
            entry_blocks=blocks,
            token_bounds=plan.cu_seqlens,
            block_bounds=given.block_bounds,
        )
    return LayerCall.of(
        given, theta, heads, kv_heads, places=places, plan=plan, schedule=options.schedule
    )


def run_op(
    theta: float, heads: int, kv_heads: int, given: LayerInputs, options: OpOptions
) -> list[Tensor]:
    """The inside of :func:`plain_layer`."""
    x, call = given.x, _call_of_op(theta, heads, kv_heads, given, options)
    ops.check_pairs(x.shape[:-1].numel(), kv_heads, options)
    y, saved, of_attention = run_layer(call, given, save=options.save)
    if saved is None:
        return [y]
    tensors = [*saved, *(x for part in of_attention for x in part.tensors())]
    bounds = (x.clone() for x in options.returned_bounds)
    return [y, *(ops.owned(part, x) for part in tensors if part is not None), *bounds]


def _saved_shapes(
    given: LayerInputs, heads: int, kv_heads: int, options: OpOptions
) -> dict[str, tuple[int, ...]]:
    """Shapes of what the layer saves, by the names in :class:`LayerSaved`."""
    leading, head_dim = tuple(given.x.shape[:-1]), len(given.q) // heads
    batch = leading if len(leading) == 2 else (1, *leading)
    dim = kernel_head_dim(head_dim, head_dim)
    keys = (*batch, kv_heads, dim)
    shapes = {"out": (*leading, heads * head_dim), "q": (*batch, heads, dim), "k": keys, "v": keys}
    if len(given.k) > kv_heads * head_dim:
        shapes |= dict.fromkeys(("k_slc", "v_slc", "k_win", "v_win"), keys)
    if given.gate is not None:
        shapes |= {"hidden": (*leading, len(given.gate)), "gates": (*batch, heads, 3)}
    if given.first_k is not None:
        packed, (hidden, channels) = options.cu_seqlens is not None, given.first_k.shape
        blocks = num_compressed_bound(leading[-1], packed, options.scaled_config)
        rows = (2, batch[0] * blocks * kv_heads)
        shapes |= {"rows": (*rows, channels), "rows_hidden": (*rows, hidden)}
        shapes |= dict.fromkeys(("k_cmp", "v_cmp"), (batch[0], blocks, kv_heads, dim))
    return {name: shapes[name] for name in LayerSaved._fields if name in shapes}


@plain_layer.register_fake
def _(*arguments):
    given, (_, heads, kv_heads), options = _split(arguments)
    x, shapes = given.x, _saved_shapes(given, heads, kv_heads, options)
    y = x.new_empty(*x.shape[:-1], given.out.shape[0])
    if not options.save:
        return y, []
    out, v = x.new_empty(shapes["q"]), x.new_empty(shapes["v"])
    of_attention = ops.fake_saved(out, v, options, given="k_cmp" in shapes)
    return y, [*map(x.new_empty, shapes.values()), *of_attention]


@custom_op(
    "plain_layer_backward", f"(Tensor dout, {_SCHEMA}, Tensor[] saved, bool[] wanted) -> Tensor[]"
)
def plain_layer_backward(dout, *arguments):
    """Gradients of those tensors in :class:`LayerInputs` that are ``wanted``."""
    *call, saved, wanted = arguments
    given, numbers, options = _split(call)
    others, num_keys, wanted = (dout, *saved), given.x.shape[-2], tuple(wanted)
    found = ops.run_recorded(
        run_op_backward, given, options, others, constants=(wanted, *numbers), num_keys=num_keys
    )
    return found or run_op_backward(wanted, *numbers, given, options, *others)


def run_op_backward(
    wanted: tuple[bool, ...],
    theta: float,
    heads: int,
    kv_heads: int,
    given: LayerInputs,
    options: OpOptions,
    dout: Tensor,
    *tensors: Tensor,
) -> list[Tensor]:
    """The inside of :func:`plain_layer_backward`."""
    call = _call_of_op(theta, heads, kv_heads, given, options)
    names = _saved_shapes(given, heads, kv_heads, options)
    none: dict[str, Any] = dict.fromkeys(LayerSaved._fields)
    none |= zip(names, tensors, strict=False)
    saved = [LayerSaved(**none)]
    chunks = ops.saved_of_chunks(
        tensors[len(names) :], heads, kv_heads, options, given="k_cmp" in names
    )
    grads = run_layer_backward(call, given, dout, saved, chunks, wanted)
    return [ops.owned(grad, given.x) for grad in grads if grad is not None]


@plain_layer_backward.register_fake
def _(dout, *arguments):
    wanted = arguments[-1]
    return [x.new_empty(x.shape) for x, want in zip(arguments, wanted, strict=False) if want]


def _setup_context(ctx, inputs, output):
    given, ctx.numbers, options = _split(inputs)
    tensors, ctx.options = ops.split_saved(options, output[1])
    ctx.save_for_backward(*given, *tensors)


def _backward(ctx, dout, _):
    tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[: len(DIFFERENTIABLE)]
    given, options, saved = tensors[:NUM_INPUTS], *ops.join_saved(ctx.options, tensors[NUM_INPUTS:])
    if not wanted[DIFFERENTIABLE.index("out")]:
        saved[0] = dout.new_empty(0)  # so that the first, `out`, is not kept
    found = iter(
        plain_layer_backward(dout.contiguous(), *given, *ctx.numbers, *options, saved, wanted)
    )
    grads = [next(found) if want else None for want in wanted]
    return *grads, *(None,) * (1 + len(ctx.numbers) + len(OpOptions._fields))


plain_layer.register_autograd(_backward, setup_context=_setup_context)
