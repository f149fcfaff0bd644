"""One autograd node over the whole: of the custom op, where something traces, or of its own.

A custom op takes the host some 0.1 ms more a pass, which short sequences wait for.
"""

import torch
from torch import Tensor

from nsa.fused import ops
from nsa.fused.call import Call, with_scale
from nsa.fused.pipeline import Inputs, Saved
from nsa.tracing import is_traced

NUM_INPUTS = len(Inputs._fields)


def attention(inputs: Inputs, call: Call, scale: float, save: bool) -> Tensor:
    """Output ``(B, T, H, Dv)``, differentiable once where ``save``.

    Args:
        inputs: the differentiable arguments.
        call: what to compute of them; its ``config`` is the caller's.
        scale: for the ``config``.
        save: whether there will be a backward.
    """
    if is_traced(inputs.q):
        *indices, config, chunks, recompute = call
        rest = (config.encoded, scale, chunks, save, recompute)
        return ops.attention(*inputs, *indices, *rest)[0]
    call = call._replace(config=with_scale(call.config, scale))
    if not save:
        return call.forward(inputs, save)[0]
    return _Attention.apply(call, *inputs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, *inputs):
        out, saved = call.forward(Inputs(*inputs), save=True)
        ctx.save_for_backward(
            *inputs, call.block_indices, call.cu_seqlens, *(x for part in saved for x in part)
        )
        ctx.call = call._replace(block_indices=None, cu_seqlens=None)
        return out

    @staticmethod
    def backward(ctx, dout):
        inputs, block_indices, cu_seqlens, saved = _split(ctx.saved_tensors)
        call = ctx.call._replace(block_indices=block_indices, cu_seqlens=cu_seqlens)
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


def _split(tensors: tuple) -> tuple[tuple, Tensor | None, Tensor | None, tuple]:
    """Inputs, ``block_indices``, ``cu_seqlens`` and the rest of what either node saves."""
    return tensors[:NUM_INPUTS], *tensors[NUM_INPUTS : NUM_INPUTS + 2], tensors[NUM_INPUTS + 2 :]


def _setup_context(ctx, inputs, output):
    tensors, rest = inputs[:NUM_INPUTS], inputs[NUM_INPUTS:]
    block_indices, cu_seqlens, max_seqlen, config, scale, chunks, save, recompute = rest
    _, saved = output
    ctx.save_for_backward(*tensors, block_indices, cu_seqlens, *saved)
    ctx.plan = (max_seqlen, config, scale, chunks, recompute)
    ctx.saved = save
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    # One gradient for each argument of the op; those after the tensors have none.
    none = (None,) * 8
    if dout is None:
        return (None,) * NUM_INPUTS + none
    if not ctx.saved:
        raise RuntimeError("nsa::attention was called with save=False, so it has no backward")
    inputs, block_indices, cu_seqlens, saved = _split(ctx.saved_tensors)
    grads = ops.attention_backward(
        dout.contiguous(), *inputs, block_indices, cu_seqlens, *ctx.plan, list(saved)
    )
    return (
        *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True)),
        *none,
    )


ops.attention.register_autograd(_backward, setup_context=_setup_context)
