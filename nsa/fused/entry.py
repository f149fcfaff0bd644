"""The entry points of the fused backend: convert arguments to the kernels' layout, call the ops."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.blocks import num_query_tiles
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused import ops, pipeline
from nsa.fused.call_tensors import Inputs
from nsa.fused.compressed_forms import num_compressed_bound
from nsa.fused.constraints import deterministic_limit
from nsa.fused.kernel_inputs import Pair, kernel_head_dim, multiplies_gates
from nsa.fused.op_arguments import OpOptions, op_bounds
from nsa.fused.planning import make_plan, with_scale
from nsa.fused.schedule import make_schedule, run_forward
from nsa.fused.sizes import Sizes, make_sizes
from nsa.fused.strides import are_rows
from nsa.host import is_traced, needs_gradients
from nsa.results import Results
from nsa.validation import UnsupportedError

Branches = tuple[Tensor, Tensor, Tensor]
Given = TypeVar("Given", Tensor, Tensor | None)
"""A tensor, or None if it is not given."""


def forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    config: NSAConfig,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: Pair | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool = False,
    results: Results | None = None,
) -> Tensor:
    """See :func:`nsa.forward`; arguments are valid and within :mod:`nsa.fused.constraints`."""
    if gates is not None:
        gate_proj_weight = None
    weights = (gate_proj_weight, compress_k_weight, compress_v_weight)
    given = (q, *k, *v, gates, *weights, *(compressed_kv or ()))
    value_dim = v[0].shape[-1]
    dim, scale = kernel_head_dim(q.shape[-1], value_dim), config.softmax_scale(q.shape[-1])
    if results is not None:
        in_place = dim == q.shape[-1] == value_dim and all(map(are_rows, (*k, *v)))
        if compressed_kv is None or not in_place or is_traced(q):
            # Keys are compressed or copied first.
            results.may_read_keys()
            results = None
    if q.numel() == 0:
        return _empty_output(q, value_dim, given)
    save = needs_gradients(*given)
    if save and deterministic:
        limit = deterministic_limit(q, v[0], config)
        if limit is not None:
            raise UnsupportedError(f"backend='fused' cannot do this: {limit}")
    inputs = Inputs(
        **_keys_and_values(k, v, dim),
        **_compressed_pair(compressed_kv, k[0].shape[-3], boundaries, config, dim),
        q=kernel_rows(q, dim),
        gates=_batched(gates),
        gate_proj_weight=_contiguous(widen(gate_proj_weight, dim)),
        compress_k_weight=widen_square(compress_k_weight, dim),
        compress_v_weight=widen_square(compress_v_weight, dim),
    )
    sizes = make_sizes(
        inputs.q, config, boundaries, num_keys=inputs.k.shape[1], num_kv_heads=inputs.k.shape[2],
        gated_gradients=multiplies_gates(q.dtype, inputs.gates, inputs.gate_proj_weight),
        deterministic=deterministic,
    )  # fmt: skip
    schedule = make_schedule(inputs, sizes, save=save, max_workspace_bytes=max_workspace_bytes)
    schedule = schedule._replace(recompute_window=recompute_window, deterministic=deterministic)
    block_indices = _unit_major(block_indices, sizes, save)
    if is_traced(*inputs, block_indices, *_tensors_of(boundaries)):
        # The arguments of an op have no names.
        options = OpOptions.of(block_indices, boundaries, config, scale, schedule, save=save)
        out = ops.attention(*inputs, *options)[0]
    else:
        plan = make_plan(
            inputs.q, with_scale(config, scale), boundaries,
            num_keys=inputs.k.shape[1], num_kv_heads=inputs.k.shape[2],
        )  # fmt: skip
        if save:
            out = ops.AttentionNode.apply(plan, schedule, results, block_indices, *inputs)
        else:
            out, _ = run_forward(inputs, block_indices, plan, schedule, results, save=False)
    # squeeze, because the derivative of out[0] first fills a tensor with zeros.
    out = out if q.ndim == 4 else out.squeeze(0)
    return out if dim == value_dim else out[..., :value_dim].contiguous()


def _tensors_of(boundaries: Boundaries | None) -> tuple[Tensor, ...]:
    return () if boundaries is None else (boundaries.cu_seqlens, boundaries.cu_seqlens_k)


def _keys_and_values(k: Branches, v: Branches, dim: int) -> dict[str, Any]:
    """Those of :class:`Inputs`, with heads of ``dim`` channels: one if the branches share them."""
    if k[0] is k[1] is k[2] and v[0] is v[1] is v[2]:
        rows, values = kernel_rows(k[0], dim), kernel_rows(v[0], dim)
        return dict(k=rows, v=values, k_slc=None, v_slc=None, k_win=None, v_win=None)
    k_first, k_slc, k_win = (kernel_rows(x, dim) for x in k)
    v_first, v_slc, v_win = (kernel_rows(x, dim) for x in v)
    return dict(k=k_first, v=v_first, k_slc=k_slc, v_slc=v_slc, k_win=k_win, v_win=v_win)


def _compressed_pair(
    pair: Pair | None, num_keys: int, boundaries: Boundaries | None, config: NSAConfig, dim: int
) -> dict[str, Any]:
    """The caller's compressed keys and values as in :class:`Inputs`."""
    if pair is None:
        return dict(k_cmp=None, v_cmp=None)
    k_cmp, v_cmp = (_pad_compressed(x, num_keys, boundaries, config) for x in pair)
    return dict(k_cmp=kernel_rows(k_cmp, dim), v_cmp=kernel_rows(v_cmp, dim))


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    config: NSAConfig,
    compress_k_weight: Tensor | None = None,
    compressed_kv: Pair | None = None,
    boundaries: Boundaries | None = None,
    cache: None = None,
) -> Tensor:
    """See :func:`nsa.select_blocks`; ``k`` is the compressed branch's."""
    if q.numel() == 0:
        return _empty_selection(q, k.shape[-2], config)
    dim, scale = kernel_head_dim(q.shape[-1], q.shape[-1]), config.softmax_scale(q.shape[-1])
    compressed, num_keys = compressed_kv is not None, k.shape[-3]
    if compressed_kv is not None:
        k = _pad_compressed(compressed_kv[0], num_keys, boundaries, config)
    rows, k = kernel_rows(q, dim), kernel_rows(k, dim)
    weight = None if compressed else widen_square(compress_k_weight, dim)
    if is_traced(rows, k, weight, *_tensors_of(boundaries)):
        bounds = op_bounds(boundaries)
        blocks = ops.select_blocks(
            rows, k, weight, compressed, num_keys, *bounds, config.encoded, scale
        )
    else:
        plan = make_plan(
            rows, with_scale(config, scale), boundaries,
            num_keys=num_keys, num_kv_heads=k.shape[2],
        )  # fmt: skip
        blocks = pipeline.select(rows, k, weight, compressed, plan)
    if config.selection == "token":
        return blocks if q.ndim == 4 else blocks[0]
    blocks = blocks.transpose(1, 2)
    if boundaries is None:
        return blocks.contiguous()
    return blocks[0, :, : _num_tiles(boundaries, config)].contiguous()


def _num_tiles(boundaries: Boundaries, config: NSAConfig) -> int:
    """Query tiles of all packed sequences. Waits for the device if their lengths are unknown."""
    if boundaries.lengths is None:
        return int(num_query_tiles(boundaries.cu_seqlens.diff(), config).sum())
    return sum(num_query_tiles(length, config) for length in boundaries.lengths)


def _contiguous(x: Given) -> Given:
    return None if x is None else x.contiguous()


def _batched(x: Given) -> Given:
    """``(B, T, ...)``, with ``B = 1`` for packed ``(T, H, ...)``; contiguous."""
    if x is None:
        return None
    return x.contiguous() if x.ndim == 4 else x[None].contiguous()


def widen(x: Given, dim: int) -> Given:
    """``x`` with zero channels up to ``dim``. They change neither logits nor the real channels."""
    if x is None or x.shape[-1] == dim:
        return x
    return pad(x, (0, dim - x.shape[-1]))


def kernel_rows(x: Given, dim: int) -> Given:
    """Queries, keys or values in the layout of the kernels."""
    # What is traced must have no strides that a guard would hold on to.
    if x is None or x.shape[-1] != dim or is_traced(x) or not are_rows(x):
        return _batched(widen(x, dim))
    return x if x.ndim == 4 else x[None]


def widen_square(x: Tensor | None, dim: int) -> Tensor | None:
    """``(H_kv, D, D)`` with zero channels up to ``dim`` on both sides; contiguous."""
    if x is None:
        return None
    missing = dim - x.shape[-1]
    return pad(x, (0, missing, 0, missing)).contiguous()


def _pad_compressed(
    x: Tensor, num_keys: int, boundaries: Boundaries | None, config: NSAConfig
) -> Tensor:
    """Compressed tokens; those of packed sequences of unknown lengths with rows up to their bound.

    Known lengths have as many tokens as rows. The kernels need a row at least.
    """
    if boundaries is None or (boundaries.lengths_k is not None and x.shape[0] > 0):
        return x
    bound = num_compressed_bound(num_keys, True, config)
    if not is_traced(x) and x.shape[0] == bound:
        return x  # padding by nothing would copy
    return pad(x, (0, 0, 0, 0, 0, bound - x.shape[0]))


def _unit_major(indices: Tensor | None, sizes: Sizes, save: bool) -> Tensor | None:
    """The caller's ``block_indices`` in the layout of the kernels.

    In tile mode ``(B, H, tiles, n)`` or ``(H, tiles, n)`` becomes ``(B, tiles, H, n)``; packed
    input gets empty tiles up to the upper bound of ``sizes``. In token mode the result is
    ``(B, T, H_kv, n)``, from that or ``(T, H_kv, n)``. With ``save`` it is a copy, because the
    caller may overwrite the original before the backward.
    """
    if indices is None:
        return None
    if sizes.token_mode:
        return _batched(indices.clone() if save else indices)
    indices = pad(indices, (0, 0, 0, sizes.tiles - indices.shape[-2]), value=-1)
    indices = indices if indices.ndim == 4 else indices[None]
    return indices.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _empty_output(q: Tensor, value_dim: int, differentiable: tuple) -> Tensor:
    """The empty output for no tokens, which still sends (zero) gradients to every input."""
    out = q.new_zeros(*q.shape[:-1], value_dim)
    return out + sum(x.sum() * 0 for x in differentiable if x is not None)


def _empty_selection(q: Tensor, num_kv_heads: int, config: NSAConfig) -> Tensor:
    """The selection for no tokens or heads: empty slots in the right shape."""
    if config.selection == "token":
        shape = (q.shape[-3], num_kv_heads)
    else:
        shape = (q.shape[-2], num_query_tiles(q.shape[-3], config))
    shape = (*q.shape[:-3], *shape, config.num_selected_blocks)
    return torch.full(shape, -1, dtype=torch.int32, device=q.device)
