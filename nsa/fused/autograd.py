"""The derivative of ``nsa::attention``: one autograd node over the whole."""

from nsa.fused.ops import attention, attention_backward
from nsa.fused.pipeline import Inputs

NUM_INPUTS = len(Inputs._fields)


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
    saved = ctx.saved_tensors
    tensors, (block_indices, cu_seqlens) = saved[:NUM_INPUTS], saved[NUM_INPUTS : NUM_INPUTS + 2]
    grads = attention_backward(
        dout.contiguous(),
        *tensors,
        block_indices,
        cu_seqlens,
        *ctx.plan,
        list(saved[NUM_INPUTS + 2 :]),
    )
    return (
        *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)),
        *none,
    )


attention.register_autograd(_backward, setup_context=_setup_context)
