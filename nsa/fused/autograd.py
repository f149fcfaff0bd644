"""One autograd node over the whole: of the custom op, where something traces, or of its own.

A custom op takes the host some 0.1 ms more a pass, which short sequences wait for.
"""

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import ops
from nsa.fused.call import Call, with_scale
from nsa.fused.memory import Schedule
from nsa.fused.pipeline import Inputs, Saved
from nsa.fused.plan import make_plan
from nsa.host import is_traced
from nsa.packing import Boundaries

NUM_INPUTS = len(Inputs._fields)


def attention(
    inputs: Inputs,
    block_indices: Tensor | None,
    boundaries: Boundaries | None,
    config: NSAConfig,
    schedule: Schedule,
    *,
    scale: float,
    save: bool,
) -> Tensor:
    """Output ``(B, T, H, Dv)``, differentiable once where ``save``.

    Args:
        inputs: the differentiable arguments.
        block_indices: the caller's, see :func:`nsa.fused.pipeline.forward`; None to select.
        boundaries: of packed sequences; None for a batch.
        config: the caller's.
        schedule: how many KV heads at a time, and what is kept for backward.
        scale: for the ``config``.
        save: whether there will be a backward.
    """
    cu_seqlens, _, max_seqlen, packing = boundaries or (None,) * 4
    if is_traced(*inputs, block_indices, cu_seqlens):
        bounds = (cu_seqlens, max_seqlen, packing is not None)
        rest = (config.encoded, scale, schedule.chunks, save, schedule.recompute)
        return ops.attention(*inputs, block_indices, *bounds, *rest)[0]
    plan = make_plan(inputs.q, cu_seqlens, max_seqlen, with_scale(config, scale), packing)
    call = Call(block_indices, plan, *schedule)
    if not save:
        return call.forward(inputs, save)[0]
    return _Attention.apply(call, *inputs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *inputs):
        out, saved = call.forward(Inputs(*inputs), save=True)
        ctx.save_for_backward(*inputs, call.block_indices, *(x for part in saved for x in part))
        ctx.call = call._replace(block_indices=None)
        return out

    @staticmethod
    def backward(ctx, dout):
        tensors = ctx.saved_tensors
        inputs, block_indices, saved = (
            tensors[:NUM_INPUTS],
            tensors[NUM_INPUTS],
            tensors[NUM_INPUTS + 1 :],
        )
        call = ctx.call._replace(block_indices=block_indices)
        return None, *_Gradients.apply(call, Saved.of_chunks(saved), dout.contiguous(), *inputs)


class _Gradients(torch.autograd.Function):
    """A node of its own, so that with ``create_graph`` it refuses to be differentiated."""

    @staticmethod
    def forward(_, call: Call, saved: list[Saved], dout: Tensor, *inputs):
        return tuple(call.backward(dout, Inputs(*inputs), saved))

    @staticmethod
    def backward(_, *__):
        raise RuntimeError(
            "nsa.forward can be differentiated once, not twice: its gradients have no derivative"
        )


def _setup_context(ctx, inputs, output):
    tensors, rest = inputs[:NUM_INPUTS], inputs[NUM_INPUTS:]
    block_indices, cu_seqlens, max_seqlen, owned, config, scale, chunks, save, recompute = rest
    _, saved = output
    if save and cu_seqlens is not None and not owned:
        *saved, cu_seqlens = saved
    ctx.save_for_backward(*tensors, block_indices, cu_seqlens, *saved)
    ctx.plan = (max_seqlen, config, scale, chunks, recompute)
    ctx.saved = save
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    # One gradient for each argument of the op; those after the tensors have none.
    none = (None,) * 9
    if dout is None:
        return (None,) * NUM_INPUTS + none
    if not ctx.saved:
        raise RuntimeError("nsa::attention was called with save=False, so it has no backward")
    tensors = ctx.saved_tensors
    inputs, (block_indices, cu_seqlens) = tensors[:NUM_INPUTS], tensors[NUM_INPUTS : NUM_INPUTS + 2]
    grads = ops.attention_backward(
        dout.contiguous(), *inputs, block_indices, cu_seqlens, *ctx.plan,
        list(tensors[NUM_INPUTS + 2 :]),
    )  # fmt: skip
    return (
        *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)),
        *none,
    )


ops.attention.register_autograd(_backward, setup_context=_setup_context)
