"""Which calls of the layer run as a whole, see :mod:`nsa.fused.plain_layer`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nsa import backends
from nsa.boundaries import check_boundaries
from nsa.compressor import PLAIN_TYPES, BlockCompressor, block_places
from nsa.host import is_traced, needs_gradients
from nsa.layer_checks import check_input
from nsa.linears import MLP
from nsa.packing import Packing
from nsa.plain_modules import names_of_types, parameters_by_name, plain_parameters
from nsa.precision import autocast_dtype
from nsa.validation import check_config, check_deterministic

Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports this one."""

_OF_MLP = [MLP, nn.Linear, nn.SiLU, nn.Linear]
_OF_COMPRESSOR = [BlockCompressor, *_OF_MLP]


def run_whole(
    layer: Layer, x: Any, cu_seqlens: Tensor | Packing | None, max_seqlen: int | None
) -> Tensor | None:
    """The layer's output by one autograd node or custom op; None if its modules must be called."""
    whole = _find(layer, x, cu_seqlens, max_seqlen)
    if whole is None:
        return None
    from nsa.fused import plain_layer_ops
    from nsa.fused.constraints import deterministic_limit

    given, common = whole
    deterministic, last = check_deterministic(None), (given.out, given.out_bias)
    save = needs_gradients(*(t for t in given if all(t is not other for other in last)))
    if not save and needs_gradients(*last):
        return None  # nothing of attention would be saved
    q = plain_layer_ops.heads_of(given.x, layer.num_heads, layer.head_dim)
    if save and deterministic and deterministic_limit(q, q, common["config"]) is not None:
        return None  # which backend then computes this, or the error, is not for here
    return plain_layer_ops.forward(
        given,
        **common,
        max_workspace_bytes=layer.max_workspace_bytes,
        recompute_window=layer.saves_less(x),
        deterministic=deterministic,
        save=save,
    )


def project_whole(
    layer: Layer, x: Any, cu_seqlens: Tensor | Packing | None, max_seqlen: int | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None] | None:
    """Queries, keys and compressed keys and values that :func:`run_whole` attends, without
    gradients: those of modules may differ by rounding. None if modules must be called."""
    whole = None if torch.compiler.is_compiling() else _find(layer, x, cu_seqlens, max_seqlen)
    if whole is None:
        return None
    from nsa.fused import plain_layer_ops

    return plain_layer_ops.heads(whole[0], **whole[1])


def _find(
    layer: Layer, x: Any, cu_seqlens: Tensor | Packing | None, max_seqlen: int | None
) -> tuple[Any, dict[str, Any]] | None:
    """The :class:`nsa.fused.layer_call.LayerInputs` of a call, and other arguments; None if the
    layer's modules must be called."""
    if layer.recompute or layer.backend == "reference" or layer.has_own_parts():
        return None
    check_input(layer, x, cu_seqlens)
    if not (layer.backend == "fused" or x.is_cuda) or x.numel() == 0:
        return None
    boundaries = check_boundaries(cu_seqlens, max_seqlen, x, x)
    parameters = _parameters(layer, x)
    if parameters is None or not _needs_gradients_alone(x, *parameters):
        return None
    from nsa.fused import layer_ops, plain_layer_ops
    from nsa.fused.layer_call import LayerInputs

    config, x = check_config(layer.config), x.to(_joint_dtype(x))
    q = plain_layer_ops.heads_of(x, layer.num_heads, layer.head_dim)
    k = plain_layer_ops.heads_of(x, layer.num_kv_heads, layer.head_dim)
    fused = backends.uses_fused(layer.backend, q, k, config)
    if not fused or not layer_ops.can_rotate(q, layer.rope_theta):
        return None
    places, bounds = None, None
    if layer.compress_k is not None:
        places = block_places(x, boundaries, config, True)
        bounds = places.block_bounds
    return LayerInputs._make([x, *parameters, bounds]), dict(
        theta=layer.rope_theta,
        heads=layer.num_heads,
        kv_heads=layer.num_kv_heads,
        config=config,
        boundaries=boundaries,
        places=places,
    )


def _needs_gradients_alone(*tensors: Tensor | None) -> bool:
    """Whether nothing else differentiates the call, nor looks at what the modules do.

    :func:`check_input` has refused transforms of torch.func.
    """
    if torch.compiler.is_compiling():
        return True
    return forward_ad._current_level < 0 and not is_traced(*tensors)


def _parameters(layer: Layer, x: Tensor) -> list[Tensor | None] | None:
    """The parameters of :class:`nsa.fused.layer_call.LayerInputs`; None if the modules are not
    plain, or do something else than those of which it has parameters."""
    if layer.rope_theta is None or layer.head_dim != layer.value_head_dim:
        return None
    plain = _plain_parameters(layer)
    mlp, compressors = layer.gate_mlp, [layer.compress_k, layer.compress_v]
    compressors = [module for module in compressors if module is not None]
    kinds = [nn.Linear] * 4 + _OF_MLP * (mlp is not None) + _OF_COMPRESSOR * len(compressors)
    if plain is None or plain[1] != " ".join(kind.__name__ for kind in kinds):
        return None
    linears = [layer.q_proj, layer.k_proj, layer.v_proj]
    weights = [linear.weight for linear in linears]
    of_gates = _of_mlps([] if mlp is None else [mlp])
    of_compressors = [module.position for module in compressors]
    of_compressors += _of_mlps([module.mlp for module in compressors])
    inner, weight = [*of_gates, *of_compressors], layer.gate_proj_weight
    if any(linear.bias is not None for linear in linears) or any(p is None for p in inner):
        return None
    first, second = of_compressors[::2], of_compressors[1::2]
    if [p.shape for p in first] != [p.shape for p in second]:
        return None
    known = [*plain[0], *([] if weight is None else [weight])]
    if _joint_dtype(x, *known) is None or not _have_sizes(layer, x, weights, of_gates[:1]):
        return None
    last = [weight, layer.o_proj.weight, layer.o_proj.bias]
    none: list[Tensor | None] = [None] * 10
    return [*weights, *(of_gates or none[:4]), *last, *(of_compressors or none)]


def _plain_parameters(layer: Layer) -> tuple[list[Tensor], str] | None:
    """See :func:`nsa.plain_modules.plain_parameters`; here with names of types."""
    if not torch.compiler.is_dynamo_compiling():
        found = plain_parameters(layer._modules, PLAIN_TYPES)
        return None if found is None else (found[0], names_of_types(found[1]))
    names = layer.plain_names()
    return None if names is None else parameters_by_name(layer, names)


def _of_mlps(mlps: Sequence[MLP]) -> list[Tensor]:
    """The first weight of each, then the first bias of each, and so of the last layers."""
    names = [(at, name) for at in (0, 2) for name in ("weight", "bias")]
    return [getattr(mlp[at], name) for at, name in names for mlp in mlps]


def _joint_dtype(x: Tensor, *parameters: Tensor) -> torch.dtype | None:
    """The dtype in which linear layers compute. None if they differ, or if a parameter is not a
    plain tensor."""
    if not all(type(p) in (Tensor, nn.Parameter) for p in parameters):
        return None
    given, wanted = {x.dtype, *(p.dtype for p in parameters)}, autocast_dtype(x.device)
    # Autocast leaves float64 alone.
    if wanted is None or torch.float64 in given:
        return x.dtype if len(given) == 1 else None
    return wanted


def _have_sizes(
    layer: Layer, x: Tensor, weights: Sequence[Tensor], first_of_gates: Sequence[Tensor]
) -> bool:
    """Whether the product has the sizes that the layer splits it into."""
    keys = layer.num_kv_branches * layer.num_kv_heads
    rows = [heads * layer.head_dim for heads in (layer.num_heads, keys, keys)]
    same = [len(weight) for weight in weights] == rows
    return same and all(w.shape[1:] == x.shape[-1:] for w in (*weights, *first_of_gates))
