"""The fused forward and backward as torch.library custom ops, so that torch.compile can trace them.

Inside an op the code is opaque to tracing; the fake implementations give the shapes. Optional
tensors that an op returns are empty where there is nothing to return, because an op's outputs are
always tensors.
"""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.fused import pipeline
from nsa.fused.layout import make_plan, num_tiles_bound


@lru_cache(maxsize=64)
def _config(encoded: str, scale: float) -> NSAConfig:
    # The scale is explicit because padding changes the head dimension it would follow from.
    return replace(NSAConfig.decode(encoded), scale=scale)


@torch.library.custom_op("nsa::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slc: Tensor | None,
    v_slc: Tensor | None,
    k_win: Tensor | None,
    v_win: Tensor | None,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    block_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    config: str,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output ``(B, T, H, Dv)`` and, where ``save``, :class:`nsa.fused.pipeline.Saved`.

    Selected blocks are returned only where the caller gave none.
    """
    inputs = pipeline.Inputs(
        q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
        compress_k_weight, compress_v_weight, k_cmp, v_cmp,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        plan = make_plan(q, cu_seqlens, max_seqlen, _config(config, scale))
        out, saved = pipeline.forward(inputs, block_indices, plan)
    if not save:
        return (out, *(q.new_empty(0) for _ in saved))
    if block_indices is not None:
        saved = saved._replace(block_indices=None)
    return (out, *(q.new_empty(0) if x is None else x for x in saved))


@attention.register_fake
def _(q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight, compress_k_weight,
      compress_v_weight, k_cmp, v_cmp, block_indices, cu_seqlens, max_seqlen, config, scale,
      save):  # fmt: skip
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if not save:
        return (out, *(q.new_empty(0) for _ in pipeline.Saved._fields))
    config = _config(config, scale)
    batch, length, num_heads = q.shape[:3]
    lse_cmp, lse_slc, lse_win = _lse_shapes(q, cu_seqlens, config)
    tiles = num_tiles_bound(length, cu_seqlens, config)
    no_blocks = q.new_empty(0)
    blocks = (batch, tiles, num_heads, config.num_selected_blocks)
    groups = (batch, tiles, num_heads, config.num_cmp_selected_blocks)
    sparse = config.num_cmp_selected_blocks is not None
    return (
        out,
        torch.empty_like(out), q.new_empty(lse_cmp, dtype=torch.float32),
        torch.empty_like(out), q.new_empty(lse_slc, dtype=torch.float32),
        torch.empty_like(out), q.new_empty(lse_win, dtype=torch.float32),
        no_blocks if block_indices is not None else q.new_empty(blocks, dtype=torch.int32),
        q.new_empty(groups, dtype=torch.int32) if sparse else no_blocks,
    )  # fmt: skip


def _lse_shapes(q: Tensor, cu_seqlens: Tensor | None, config: NSAConfig) -> list[tuple]:
    """Shapes of the log-sum-exp of each branch, in the layouts of :mod:`nsa.fused.attention`."""
    batch, length, num_heads = q.shape[:3]
    leading = (batch,) if cu_seqlens is None else ()
    rows = num_tiles_bound(length, cu_seqlens, config) * config.q_tile_size
    in_rows, in_order = (1, num_heads, batch * rows), (*leading, num_heads, length)
    if config.num_cmp_selected_blocks is not None:
        lse_cmp = in_rows
    elif not config.causal:
        lse_cmp = in_order
    else:
        folded = num_compressed_blocks(length, config)
        if config.compressed_visibility == "started":
            folded = folded + (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        lse_cmp = (*leading, num_heads * config.compress_block_size, folded)
    if num_compressed_blocks(length, config) == 0:
        lse_cmp = (0,)
    return [lse_cmp, in_rows, in_order]


@torch.library.custom_op("nsa::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slc: Tensor | None,
    v_slc: Tensor | None,
    k_win: Tensor | None,
    v_win: Tensor | None,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    config: str,
    scale: float,
    o_cmp: Tensor,
    lse_cmp: Tensor,
    o_slc: Tensor,
    lse_slc: Tensor,
    o_win: Tensor,
    lse_win: Tensor,
    groups: Tensor | None,
) -> list[Tensor]:
    """Gradients of the first thirteen arguments of :func:`attention`, empty where None."""
    inputs = pipeline.Inputs(
        q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
        compress_k_weight, compress_v_weight, k_cmp, v_cmp,
    )  # fmt: skip
    saved = pipeline.Saved(
        o_cmp, lse_cmp, o_slc, lse_slc, o_win, lse_win, block_indices, groups
    )  # fmt: skip
    with torch.cuda.device_of(q):
        plan = make_plan(q, cu_seqlens, max_seqlen, _config(config, scale))
        grads = pipeline.backward(dout, inputs, saved, plan)
    return [q.new_empty(0) if grad is None else grad for grad in grads]


@attention_backward.register_fake
def _(dout, q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight, compress_k_weight,
      compress_v_weight, k_cmp, v_cmp, *_):  # fmt: skip
    inputs = (q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
              compress_k_weight, compress_v_weight, k_cmp, v_cmp)  # fmt: skip
    # Gradients are contiguous whatever the strides of the inputs.
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]
