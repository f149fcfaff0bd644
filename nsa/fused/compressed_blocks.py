"""Compression alone, as an autograd node: for blocks that other ranks attend."""

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused.compression import compress_pair, compress_pair_backward
from nsa.fused.entry import kernel_rows, widen_square
from nsa.fused.kernel_inputs import Pair, kernel_head_dim
from nsa.fused.plan import Plan
from nsa.fused.planning import make_plan, with_scale
from nsa.precision import without_autocast


def compress_blocks(
    k: Tensor,
    v: Tensor,
    *,
    config: NSAConfig,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    boundaries: Boundaries,
) -> tuple[Pair, Pair | None]:
    """The compressed keys and values of packed ``k (T, H_kv, D)`` and ``v (T, H_kv, Dv)``.

    If possible, also ``k`` and ``v`` for the other branches: then one pass adds all gradients.
    Theirs may have the rows of one head after those of another, and may be overwritten.

    The host knows the lengths of ``boundaries``.
    """
    if not k.shape[0]:
        # All inputs still get gradients, which are 0.
        given = (k, v, compress_k_weight, compress_v_weight)
        zero = sum(x.sum() * 0 for x in given if x is not None)
        return (k[:0] + zero, v[:0] + zero), None
    head_dim, value_dim = k.shape[-1], v.shape[-1]
    dim = kernel_head_dim(head_dim, value_dim)
    rows, values = kernel_rows(k, dim), kernel_rows(v, dim)
    plan = make_plan(rows, with_scale(config, config.softmax_scale(head_dim)), boundaries)
    k_weight, v_weight = widen_square(compress_k_weight, dim), widen_square(compress_v_weight, dim)
    k_cmp, v_cmp, *again = _CompressionNode.apply(plan, rows, values, k_weight, v_weight)
    assert boundaries.lengths is not None
    # The plan has an upper bound on the blocks.
    count = sum(num_compressed_blocks(length, config) for length in boundaries.lengths)
    k_cmp, v_cmp = k_cmp[0, :count, :, :head_dim], v_cmp[0, :count, :, :value_dim]
    adds = head_dim == value_dim == dim and k.requires_grad and v.requires_grad
    # squeeze, because the derivative of x[0] first fills a tensor with zeros.
    return (k_cmp, v_cmp), (again[0].squeeze(0), again[1].squeeze(0)) if adds else None


class _CompressionNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, k: Tensor, v: Tensor, k_weight, v_weight):
        ctx.plan = plan
        ctx.save_for_backward(k, v, k_weight, v_weight)
        ctx.set_materialize_grads(False)
        with torch.cuda.device_of(k), without_autocast(k.device):
            pair = compress_pair(k, v, (k_weight, v_weight), plan)
        return *pair, k.view_as(k), v.view_as(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx, dk_cmp: Tensor, dv_cmp: Tensor, dk_rest: Tensor | None, dv_rest: Tensor | None
    ):
        k, v, k_weight, v_weight = ctx.saved_tensors
        dk_cmp, dv_cmp = dk_cmp.contiguous(), dv_cmp.contiguous()
        addends = None
        if dk_rest is not None and dv_rest is not None:  # or both are None
            addends = ((dk_rest, dv_rest), (dk_rest[:, :0], dv_rest[:, :0]))
        with torch.cuda.device_of(k), without_autocast(k.device):
            (dk, dv), dweights = compress_pair_backward(
                dk_cmp, dv_cmp, k, v, (k_weight, v_weight), ctx.plan, addends
            )
        return None, dk, dv, *dweights
