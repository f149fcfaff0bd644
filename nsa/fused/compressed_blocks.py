"""Compression alone, as an autograd node: for blocks that other ranks attend."""

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused.compression import compress_pair, compress_pair_backward
from nsa.fused.entry import kernel_rows, widen_square
from nsa.fused.kernel_inputs import kernel_head_dim
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
) -> tuple[Tensor, Tensor]:
    """The compressed keys and values of packed ``k (T, H_kv, D)`` and ``v (T, H_kv, Dv)``.

    The host knows the lengths of ``boundaries``.
    """
    if not k.shape[0]:
        # All inputs still get gradients, which are 0.
        given = (k, v, compress_k_weight, compress_v_weight)
        zero = sum(x.sum() * 0 for x in given if x is not None)
        return k[:0] + zero, v[:0] + zero
    head_dim, value_dim = k.shape[-1], v.shape[-1]
    dim = kernel_head_dim(head_dim, value_dim)
    rows, values = kernel_rows(k, dim), kernel_rows(v, dim)
    plan = make_plan(rows, with_scale(config, config.softmax_scale(head_dim)), boundaries)
    k_weight, v_weight = widen_square(compress_k_weight, dim), widen_square(compress_v_weight, dim)
    k_cmp, v_cmp = _CompressionNode.apply(plan, rows, values, k_weight, v_weight)
    assert boundaries.lengths is not None
    # The plan has an upper bound on the blocks.
    count = sum(num_compressed_blocks(length, config) for length in boundaries.lengths)
    return k_cmp[0, :count, :, :head_dim], v_cmp[0, :count, :, :value_dim]


class _CompressionNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: Plan, k: Tensor, v: Tensor, k_weight, v_weight):
        ctx.plan = plan
        ctx.save_for_backward(k, v, k_weight, v_weight)
        with torch.cuda.device_of(k), without_autocast(k.device):
            return compress_pair(k, v, (k_weight, v_weight), plan)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dk_cmp: Tensor, dv_cmp: Tensor):
        k, v, k_weight, v_weight = ctx.saved_tensors
        dk_cmp, dv_cmp = dk_cmp.contiguous(), dv_cmp.contiguous()
        with torch.cuda.device_of(k), without_autocast(k.device):
            (dk, dv), dweights = compress_pair_backward(
                dk_cmp, dv_cmp, k, v, (k_weight, v_weight), ctx.plan
            )
        return None, dk, dv, *dweights
