"""The derivative of ``nsa::attention``: one autograd node over the whole."""

from nsa.fused import pipeline
from nsa.fused.ops import attention, attention_backward

NUM_INPUTS = len(pipeline.Inputs._fields)


def _setup_context(ctx, inputs, output):
    *tensors, block_indices, cu_seqlens, max_seqlen, config, scale, save = inputs
    _, *saved, blocks, groups = output
    # The caller's block indices, else those that were selected.
    blocks = blocks if block_indices is None else block_indices
    ctx.save_for_backward(*tensors, blocks, cu_seqlens, *saved, groups)
    ctx.max_seqlen, ctx.config, ctx.scale, ctx.saved = max_seqlen, config, scale, save
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    # One gradient for each argument of the op; those after the tensors have none.
    none = (None,) * 6
    if dout is None:
        return (None,) * NUM_INPUTS + none
    if not ctx.saved:
        raise RuntimeError("nsa::attention was called with save=False, so it has no backward")
    *tensors, blocks, cu_seqlens, o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win, groups = (
        ctx.saved_tensors
    )
    grads = attention_backward(
        dout.contiguous(), *tensors, blocks, cu_seqlens, ctx.max_seqlen, ctx.config, ctx.scale,
        o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win, groups if groups.numel() else None,
    )  # fmt: skip
    return (
        *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)),
        *none,
    )


attention.register_autograd(_backward, setup_context=_setup_context)
