"""The fused forward and backward as one autograd node, in Python or as a torch.library custom op.

torch.compile can trace a custom op: the code inside is opaque, and a fake implementation gives the
shapes. An op costs about 0.1 ms more host time per pass, which delays short sequences, so it is
used only while something traces.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa import recordings
from nsa.boundaries import boundaries_of, with_packing
from nsa.derivatives import FirstDerivatives
from nsa.fused import pipeline
from nsa.fused.call_tensors import SAVED_TENSORS, Inputs, Saved
from nsa.fused.custom_ops import custom_op
from nsa.fused.op_arguments import OpOptions, decoded_config, schema_of
from nsa.fused.plan import Plan
from nsa.fused.planning import make_plan
from nsa.fused.schedule import ChunkSchedule, fewest_chunks, run_backward, run_forward, split_heads
from nsa.fused.sizes import make_sizes
from nsa.fused.strides import as_rows, is_alone
from nsa.packing import find_packing, power_of_two
from nsa.results import Results
from nsa.validation import UnsupportedError

NUM_INPUTS = len(Inputs._fields)


class AttentionNode(torch.autograd.Function):
    """The node that is used while nothing traces."""

    @staticmethod
    def forward(
        ctx,
        plan: Plan,
        schedule: ChunkSchedule,
        results: Results | None,
        block_indices: Tensor | None,
        *inputs,
    ):
        out, saved = run_forward(Inputs(*inputs), block_indices, plan, schedule, results, save=True)
        tensors = (x for part in saved for x in part.tensors())
        ctx.save_for_backward(*inputs, block_indices, *tensors)
        ctx.plan, ctx.schedule, ctx.results = plan, schedule, results
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors
        # Unless there may be another backward, so that what is used up frees its memory.
        ctx.maybe_clear_saved_tensors()
        inputs, block_indices = tensors[:NUM_INPUTS], tensors[NUM_INPUTS]
        saved = Saved.of_chunks(tensors[NUM_INPUTS + 1 :], recompute=ctx.schedule.recompute)
        del tensors
        plan, schedule, dout = ctx.plan, ctx.schedule, as_rows(dout)
        # With create_graph gradients are tensors of their own.
        creates_graph = torch.is_grad_enabled()
        results = None if creates_graph else ctx.results

        def run(dout: Tensor, *inputs) -> Inputs:
            given = Inputs(*inputs)
            return run_backward(dout, given, block_indices, saved, plan, schedule, results)

        grads = FirstDerivatives.apply(run, dout, *inputs) if creates_graph else run(dout, *inputs)
        return None, None, None, None, *grads


def _split(arguments: Sequence) -> tuple[Inputs, OpOptions]:
    return Inputs(*arguments[:NUM_INPUTS]), OpOptions(*arguments[NUM_INPUTS:])


@custom_op("attention", f"({schema_of(Inputs)}, {schema_of(OpOptions)}) -> (Tensor, Tensor[])")
def attention(*arguments):
    """Output ``(B, T, H, Dv)`` and, with ``save``, those of :meth:`Saved.tensors` of each chunk
    that there are, see :func:`saved_names`. If boundaries are not ``owned``, copies of them come
    last.
    """
    inputs, options = _split(arguments)
    found = run_recorded(run_attention, inputs, options, num_keys=inputs.k.shape[1])
    out, *saved = found or run_attention(inputs, options)
    return out, saved


def run_attention(inputs: Inputs, options: OpOptions) -> list[Tensor]:
    """The inside of :func:`attention`."""
    q, plan = inputs.q, options.plan(inputs.q, inputs.k)
    check_pairs(q.shape[:2].numel(), inputs.k.shape[2], options)
    out, saved = run_forward(
        inputs, options.block_indices, plan, options.schedule, save=options.save
    )
    tensors = [owned(x, q) for part in saved for x in part.tensors() if x is not None]
    return [out, *tensors, *(x.clone() for x in options.returned_bounds)]


def run_recorded(
    function: Callable[..., list[Tensor]],
    inputs: Any,
    options: OpOptions,
    others: Sequence[Tensor] = (),
    *,
    num_keys: int,
    constants: tuple[Hashable, ...] = (),
) -> list[Tensor] | None:
    """``function(*constants, inputs, options, *others)`` as a recording; None if it is to run step
    by step.

    ``inputs`` are a NamedTuple of tensors or None. A backward has ``others``.
    """
    optional, bounds = (*inputs, options.block_indices), options.bounds
    present = [x is not None for x in (*optional, options.cu_seqlens, options.cu_seqlens_k)]
    packing = find_packing(*bounds) if options.owned else None
    longest = options.max_seqlen_k
    if longest is not None:
        # One recording for some bounds, as for eager calls; the results have the same shapes.
        longest = min(num_keys, power_of_two(longest))
    plain = options._replace(
        block_indices=None, cu_seqlens=None, cu_seqlens_k=None, max_seqlen_k=longest
    )
    num_bounds = len(bounds)

    def call(*tensors: Tensor) -> list[Tensor]:
        end = len(tensors) - num_bounds
        following = iter(tensors[:end])
        # Copies, which no Packing owns: its plan would be of its boundaries alone.
        copies = [x.clone() for x in tensors[end:]]
        *parts, blocks = (next(following) if x else None for x in present[:-2])
        first, second = (*copies, None, None)[:2]
        own = plain._replace(block_indices=blocks, cu_seqlens=first, cu_seqlens_k=second)
        return function(*constants, inputs._make(parts), own, *following)

    given = [*(x for x in optional if x is not None), *others]
    return recordings.run_op(
        (function, *constants, plain, *present, packing is not None),
        call,
        given if packing is not None else [*given, *bounds],
        packing,
        trains=options.save,
        backward=len(others) > 0,
    )


def owned(x: Tensor | None, like: Tensor) -> Tensor:
    """``x``, contiguous, or an empty tensor: in memory of its own, as results of an op must be."""
    if x is None:
        return like.new_empty(0)
    if x.numel() == 0:
        # Two of them may share a storage, which is as empty as they are.
        return x.new_empty(x.shape)
    return x if is_alone(x) else x.clone(memory_format=torch.contiguous_format)


def check_pairs(tokens: int, num_kv_heads: int, options: OpOptions):
    """Raise if a chunk has more pairs than the kernels can count, which tracing cannot check."""
    chunks = options.chunks
    fewest = fewest_chunks(tokens, num_kv_heads, options.scaled_config)
    if chunks < fewest:
        raise UnsupportedError(
            f"backend='fused' needs KV heads in {fewest} chunks for so many tokens and selected "
            f"blocks, got {chunks}: torch.compile cannot choose that; set max_workspace_bytes, or "
            "split the batch"
        )


@attention.register_fake
def _(*arguments):
    inputs, options = _split(arguments)
    out = inputs.q.new_empty(*inputs.q.shape[:-1], inputs.v.shape[-1])
    given = inputs.k_cmp is not None
    return out, fake_saved(out, inputs.v, options, given=given) if options.save else []


def fake_saved(out: Tensor, v: Tensor, options: OpOptions, *, given: bool) -> list[Tensor]:
    """What :func:`attention` gives after the output, with ``save``.

    ``given`` says whether compressed keys were.
    """
    # Shapes of outputs, whose channels are those of the values.
    whole = make_sizes(
        out,
        options.scaled_config,
        options.boundaries,
        num_keys=v.shape[1],
        num_kv_heads=v.shape[2],
    )
    names, saved = saved_names(options, given=given), []
    dtypes = dict.fromkeys(("block_indices", "groups"), torch.int32)
    for heads in split_heads(out.shape[2], v.shape[2], options.chunks):
        shapes = whole.of_heads(heads.kv.stop - heads.kv.start).saved_shapes()
        for name in names:
            dtype = torch.float32 if name.startswith("lse") else dtypes.get(name, out.dtype)
            saved.append(out.new_empty(shapes[name], dtype=dtype))
    return saved + [torch.empty_like(x) for x in options.returned_bounds]


def saved_names(options: OpOptions, *, given: bool) -> list[str]:
    """Which of :meth:`Saved.tensors` there are. ``given`` says whether compressed keys are."""
    selected = [] if options.block_indices is not None else ["block_indices"]
    if options.scaled_config.num_cmp_selected_blocks is not None:
        selected.append("groups")
    if options.recompute:
        return selected
    window = [] if options.recompute_window else ["o_win", "lse_win"]
    compressed = [] if given else ["k_cmp", "v_cmp"]
    return ["o_cmp", "lse_cmp", "o_slc", "lse_slc", *window, *compressed, *selected]


def saved_of_chunks(
    tensors: Sequence[Tensor], num_heads: int, num_kv_heads: int, options: OpOptions, *, given: bool
) -> list[Saved]:
    """What backward needs, from what :func:`fake_saved` describes, without boundaries."""
    names, rest, found = saved_names(options, given=given), iter(tensors), []
    for _ in split_heads(num_heads, num_kv_heads, options.chunks):
        part = dict(zip(names, rest, strict=False))
        found += [part.get(name) for name in SAVED_TENSORS]
    return Saved.of_chunks(found, recompute=options.recompute)


@custom_op(
    "attention_backward",
    f"(Tensor dout, {schema_of(Inputs)}, {schema_of(OpOptions)}, Tensor[] saved) -> Tensor[]",
)
def attention_backward(dout, *arguments):
    """Gradients of the :class:`Inputs` of :func:`attention`, empty where None."""
    *call, saved = arguments
    inputs, options = _split(call)
    others, num_keys = (dout, *saved), inputs.k.shape[1]
    found = run_recorded(run_attention_backward, inputs, options, others, num_keys=num_keys)
    return found or run_attention_backward(inputs, options, dout, *saved)


def run_attention_backward(
    inputs: Inputs, options: OpOptions, dout: Tensor, *saved: Tensor
) -> list[Tensor]:
    """The inside of :func:`attention_backward`."""
    heads, kv_heads, given = inputs.q.shape[2], inputs.k.shape[2], inputs.k_cmp is not None
    parts = saved_of_chunks(saved, heads, kv_heads, options, given=given)
    plan = options.plan(inputs.q, inputs.k)
    grads = run_backward(dout, inputs, options.block_indices, parts, plan, options.schedule)
    return [owned(grad, inputs.q) for grad in grads]


@attention_backward.register_fake
def _(dout, *arguments):
    inputs = Inputs(*arguments[:NUM_INPUTS])
    # Gradients are contiguous whatever the strides of the inputs.
    return [inputs.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def split_saved(options: OpOptions, saved: list[Tensor]) -> tuple[list[Any], OpOptions]:
    """The tensors that a backward needs beside the inputs of an op, and its other options."""
    bounds = [options.cu_seqlens, options.cu_seqlens_k]
    copies = len(options.returned_bounds)
    if copies:
        bounds[:copies], saved = saved[-copies:], saved[:-copies]
    others = options._replace(block_indices=None, cu_seqlens=None, cu_seqlens_k=None)
    return [options.block_indices, *bounds, *saved], others


def join_saved(options: OpOptions, tensors: Sequence[Any]) -> tuple[OpOptions, list[Tensor]]:
    """The reverse of :func:`split_saved`: the options and what was saved."""
    blocks, cu_seqlens, cu_seqlens_k, *saved = tensors
    bounds = dict(cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
    return options._replace(block_indices=blocks, **bounds), saved


def _setup_context(ctx, inputs, output):
    tensors, options = _split(inputs)
    saved, ctx.options = split_saved(options, output[1])
    ctx.save_for_backward(*tensors, *saved)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    # One gradient for each argument of the op; those after the inputs have none.
    none = (None,) * len(OpOptions._fields)
    if dout is None:
        return (None,) * NUM_INPUTS + none
    if not ctx.options.save:
        raise RuntimeError("nsa::attention was called with save=False, so it has no backward")
    # Read once, because selective checkpointing unpacks once.
    tensors = ctx.saved_tensors
    inputs, (options, saved) = tensors[:NUM_INPUTS], join_saved(ctx.options, tensors[NUM_INPUTS:])
    grads = attention_backward(dout.contiguous(), *inputs, *options, saved)
    return (
        *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)),
        *none,
    )


attention.register_autograd(_backward, setup_context=_setup_context)


@custom_op("select_blocks")
def select_blocks(
    q: Tensor,
    k: Tensor,
    compress_k_weight: Tensor | None,
    compressed: bool,
    num_keys: int,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    config: str,
    scale: float,
) -> Tensor:
    """See :func:`nsa.fused.pipeline.select`; the rest as in :class:`OpOptions`."""
    boundaries = with_packing(boundaries_of(cu_seqlens, max_seqlen_k, cu_seqlens_k))
    plan = make_plan(
        q, decoded_config(config, scale), boundaries, num_keys=num_keys, num_kv_heads=k.shape[2]
    )
    return pipeline.select(q, k, compress_k_weight, compressed, plan)


@select_blocks.register_fake
def _(
    q, k, compress_k_weight, compressed, num_keys,
    cu_seqlens, cu_seqlens_k, max_seqlen_k, config, scale,
):  # fmt: skip
    boundaries = boundaries_of(cu_seqlens, max_seqlen_k, cu_seqlens_k)
    sizes = make_sizes(
        q, decoded_config(config, scale), boundaries, num_keys=num_keys, num_kv_heads=k.shape[2]
    )
    return q.new_empty(sizes.saved_shapes()["block_indices"], dtype=torch.int32)
