"""The selected branch by itself, for blocks that the caller has chosen: entry and custom ops.

It runs on the kernels of token mode's selected branch, for all KV heads at once. Its ops are small,
so they are used in eager mode too.
"""

from functools import cache, lru_cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.custom_ops import custom_op
from nsa.fused.kernel_inputs import kernel_head_dim
from nsa.fused.op_arguments import op_bounds
from nsa.fused.planning import MAX_PLANS
from nsa.fused.token_inputs import TokenBlocks, make_token_blocks
from nsa.geometry import Geometry
from nsa.host import is_traced, may_keep
from nsa.packing import find_packing
from nsa.precision import accumulation_dtype, without_autocast


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
    boundaries: Boundaries | None,
    return_lse: bool,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See :func:`nsa.selected_attention`. Arguments are checked."""
    value_dim = v.shape[-1]
    cu_seqlens, cu_seqlens_k, _ = op_bounds(boundaries)
    if torch.is_grad_enabled() and not is_traced(q, block_indices, cu_seqlens):
        # The caller may overwrite boundaries before the backward. Tensors of inference mode cannot
        # be saved for it.
        if boundaries is not None and boundaries.packing is None:
            cu_seqlens = _copied(cu_seqlens)
            cu_seqlens_k = _copied(cu_seqlens_k)
        if block_indices.is_inference():
            block_indices = block_indices.clone()
    dim = kernel_head_dim(q.shape[-1], value_dim)
    # Channels of 0 change neither logits nor the real channels.
    q, k, v = (x if x.shape[-1] == dim else pad(x, (0, dim - x.shape[-1])) for x in (q, k, v))
    out, lse = _attention(
        q, k, v, block_indices, cu_seqlens, cu_seqlens_k, block_size, causal, scale, deterministic
    )
    if dim != value_dim:
        out = out[..., :value_dim].contiguous()
    return (out, lse.transpose(-1, -2)) if return_lse else out


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.clone()


@custom_op("selected_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """The output ``(..., H, Dv)`` and the log-sum-exp ``(..., H)`` of batched or packed queries.

    ``deterministic`` is for the backward.
    """
    if not q.numel():
        return _empty_results(q, v)
    flat = partial(_flatten, batched=q.ndim == 4)
    with torch.cuda.device_of(q), without_autocast(q.device):
        blocks = _blocks(q, k, cu_seqlens, cu_seqlens_k, block_size, causal)
        out, lse = kernel_calls.selected_forward(
            flat(q), flat(k), flat(v), flat(block_indices), blocks, block_size, scale, causal,
            # Lists of the caller need not name a band that most neighbours share.
            band=False,
        )  # fmt: skip
    return out.view(*q.shape[:-1], v.shape[-1]), lse.view(q.shape[:-1])


@_attention.register_fake
def _(q, k, v, *_):
    return _empty_results(q, v)


def _empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


@custom_op("selected_attention_backward")
def _gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    causal: bool,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``dlse`` is None if the log-sum-exp was not used."""
    if not q.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    flat = partial(_flatten, batched=q.ndim == 4)
    dlse = None if dlse is None else flat(dlse)
    with torch.cuda.device_of(q), without_autocast(q.device):
        blocks = _blocks(q, k, cu_seqlens, cu_seqlens_k, block_size, causal)
        statistics = kernel_calls.row_statistics(flat(dout), flat(out), flat(lse), dlse)
        grads = kernel_calls.selected_backward(
            flat(dout), flat(q), flat(k), flat(v), statistics, flat(block_indices), blocks,
            block_size, scale, causal, deterministic=deterministic,
        )  # fmt: skip
    dq, dk, dv = (grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@_gradients.register_fake
def _(dout, dlse, out, lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.block_size, ctx.causal, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    out, lse, *tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 10
    if dout is None:
        dout = torch.zeros_like(out)
    options = (ctx.block_size, ctx.causal, ctx.scale, ctx.deterministic)
    return *_gradients(dout, dlse, out, lse, *tensors, *options), *(None,) * 7


_attention.register_autograd(_backward, setup_context=_setup_context)


def _flatten(x: Tensor, batched: bool) -> Tensor:
    """``(B, N, ...)`` as ``(B * N, ...)``; packed ``(T, ...)`` stays."""
    if not batched:
        return x
    # x[0] is a view whatever the strides.
    return x[0] if x.shape[0] == 1 else x.flatten(0, 1)


def _blocks(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_size: int,
    causal: bool,
) -> TokenBlocks:
    """The blocks of all sequences. A Packing keeps them; of batches, the last few are kept."""
    config = _config(block_size, causal)
    if cu_seqlens is None:
        make = _kept_blocks if may_keep(q) else _batched_blocks
        return make(q.shape[0], q.shape[1], k.shape[1], q.device, config)
    packing = find_packing(cu_seqlens, cu_seqlens_k)
    num_queries, num_keys = q.shape[0], k.shape[0]
    if packing is None:
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        return _packed_blocks(cu_seqlens, cu_seqlens_k, num_queries, num_keys, config)
    make_kept = partial(
        _packed_blocks, packing.cu_seqlens, packing.cu_seqlens_k, num_queries, num_keys, config
    )
    return packing.keep(("selected branch", num_queries, num_keys, config), make_kept)


@cache
def _config(block_size: int, causal: bool) -> NSAConfig:
    return NSAConfig(selection="token", compress_block_size=block_size, causal=causal)


def _packed_blocks(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, num_queries: int, num_keys: int, config: NSAConfig
) -> TokenBlocks:
    geometry = Geometry.packed(cu_seqlens, cu_seqlens_k, num_queries, num_keys, config, exact=False)
    return make_token_blocks(geometry, 1)


def _batched_blocks(
    batch: int, num_queries: int, num_keys: int, device: torch.device, config: NSAConfig
) -> TokenBlocks:
    return make_token_blocks(Geometry.equal(batch, num_queries, num_keys, device, config), 1)


_kept_blocks = lru_cache(maxsize=MAX_PLANS)(_batched_blocks)
