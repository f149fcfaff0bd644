"""Which calls of the layer are recorded, see :mod:`nsa.recordings`."""

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa import recordings
from nsa.compressor import PLAIN_TYPES
from nsa.packing import Packing
from nsa.plain_modules import plain_parameters
from nsa.validation import check_config

Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports this one."""


def run_recorded(layer: Layer, x: Any, cu_seqlens: Tensor | Packing | None) -> Tensor | None:
    """The layer's output by :func:`nsa.recordings.run`; None if the call is to run step by step."""
    plain = _parameters_to_record(layer, x)
    if plain is None:
        return None
    parameters, kinds = plain
    form = (
        type(layer),
        check_config(layer.config),
        *(layer.dim, layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.value_head_dim),
        *(layer.num_kv_branches, layer.rope_theta, layer.max_workspace_bytes, layer.backend),
        *(layer.gate_mlp is None, layer.gate_proj_weight is None, layer.compress_k is None),
        kinds,
    )
    if cu_seqlens is None:
        return recordings.run(form, layer._forward, (x,), parameters)
    packing = None
    if type(cu_seqlens) is Packing and x.ndim == 2:
        packing = cu_seqlens.unread(x.shape[0])
    if packing is None:
        return None
    # A recording is for other values of the boundaries too, so it reads none. Step by step, the
    # Packing itself is faster.
    most = packing.max_seqlen
    function = partial(layer._forward, max_seqlen=most)
    return recordings.run((*form, most), function, (x,), parameters, packing)


def _parameters_to_record(layer: Layer, x: Any) -> tuple[list[Tensor], tuple[Hashable, ...]] | None:
    """All parameters, and the modules that they are of; None if calls cannot be recorded."""
    if not recordings.ENABLED or torch.compiler.is_compiling() or layer.recompute:
        return None
    if not isinstance(x, Tensor) or layer.backend == "reference":
        return None
    plain = plain_parameters(layer._modules, PLAIN_TYPES)
    if plain is None or layer.gate_proj_weight is None:
        return plain
    parameters, kinds = plain
    return [*parameters, layer.gate_proj_weight], kinds
