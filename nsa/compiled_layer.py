"""Which compiled calls of the layer are one op, see :mod:`nsa.fused.plain_layer`."""

from typing import Any

from torch import Tensor, nn

from nsa import backends
from nsa.boundaries import check_boundaries
from nsa.compressor import PLAIN_TYPES, block_places
from nsa.host import needs_gradients
from nsa.joint_products import OF_COMPRESSOR, has_sizes_of, joint_dtype, parameters_of_both
from nsa.layer_checks import check_input
from nsa.linears import MLP
from nsa.packing import Packing
from nsa.plain_modules import plain_parameters
from nsa.validation import check_config, check_deterministic

Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports this one."""

_OF_MLP = [MLP, nn.Linear, nn.SiLU, nn.Linear]


def run_compiled(
    layer: Layer, x: Any, cu_seqlens: Tensor | Packing | None, max_seqlen: int | None
) -> Tensor | None:
    """The layer's output by one op; None if its parts must be called."""
    if layer.recompute or layer.backend == "reference":
        return None
    check_input(layer, x, cu_seqlens)
    boundaries = check_boundaries(cu_seqlens, max_seqlen, x, x)
    plain = plain_parameters(layer._modules, PLAIN_TYPES)
    dtype = None if plain is None else joint_dtype(plain[0], x)
    if plain is None or dtype is None or x.numel() == 0:
        return None
    x = x.to(dtype)
    parameters = _parameters(layer, x, [kind[1] for kind in plain[1] if isinstance(kind, tuple)])
    if parameters is None:
        return None
    from nsa.fused import entry, layer_ops, plain_layer

    config, theta = check_config(layer.config), layer.rope_theta
    # For checks and sizes alone.
    q = x.new_empty(*x.shape[:-1], layer.num_heads, layer.head_dim)
    k = x.new_empty(*x.shape[:-1], layer.num_kv_heads, layer.head_dim)
    if not layer_ops.can_rotate(q, theta) or not backends.uses_fused(layer.backend, q, k, config):
        return None
    save = needs_gradients(x, *parameters)
    # The op computes all gradients, of which most of the work are those of the projections.
    if save and not (layer.q_proj.weight.requires_grad and layer.o_proj.weight.requires_grad):
        return None
    options = entry.options_of_layer(
        q,
        k,
        boundaries,
        config,
        layer.max_workspace_bytes,
        gated=layer.gate_mlp is not None,
        save=save,
        deterministic=check_deterministic(None),
    )
    bounds = block_places(x, boundaries, config, True).block_bounds
    return plain_layer.plain_layer(x, *parameters, bounds, theta, *options)[0]


def _parameters(layer: Layer, x: Tensor, kinds: list[type]) -> list[Tensor | None] | None:
    """The parameters of :class:`nsa.fused.plain_layer.LayerInputs`; None where the modules, of
    these kinds, have others or do something else."""
    if layer.rope_theta is None or layer.num_kv_branches > 1 or layer.compress_k is None:
        return None
    mlp, weight = layer.gate_mlp, layer.gate_proj_weight
    if kinds[: -2 * len(OF_COMPRESSOR)] != [nn.Linear] * 4 + ([] if mlp is None else _OF_MLP):
        return None
    compressors = parameters_of_both((layer.compress_k, layer.compress_v), x)
    linears = [layer.q_proj, layer.k_proj, layer.v_proj]
    if compressors is None or any(linear.bias is not None for linear in linears):
        return None
    weights, of_gates = [linear.weight for linear in linears], [None] * 4
    if mlp is not None:
        of_gates = [mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias]
    known = weight is None or joint_dtype([weight], x) == x.dtype
    if not known or (mlp is not None and None in of_gates) or not has_sizes_of(layer, x, weights):
        return None
    of_compressors = [p for pair in zip(*compressors, strict=True) for p in pair]
    last = [weight, layer.o_proj.weight, layer.o_proj.bias]
    return [*weights, *of_gates, *last, *of_compressors]
