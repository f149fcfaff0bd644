"""Compressed keys and values of the layer, by its compressors."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.compressor import block_places, gather_blocks, kept_items
from nsa.host import needs_gradients
from nsa.joint_products import Projections, compress_both, parameters_of_both
from nsa.rope import Positions
from nsa.validation import check_config

Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports this one."""


def compress_tokens(
    layer: Layer,
    k: Tensor,
    v: Tensor,
    boundaries: Boundaries | None,
    fused: bool,
    positions: Positions | None = None,
    both: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compressed keys, rotated to the centres of their blocks, and compressed values.

    ``positions`` are those of the centres if the tokens are parts of sequences. ``both`` is ``k``
    and ``v`` as heads of one tensor.
    """
    config = check_config(layer.config)
    places = block_places(k, boundaries, config, fused)
    bounds, locate, index = places.block_bounds, None, None
    if boundaries is not None and bounds is not None:
        kept = kept_items(boundaries, ("blocks", config), bounds, places.blocks)
        locate, index = kept, lambda: kept()[1]
    gather = partial(gather_blocks, places=places, locate=locate, fused=fused)
    pair, compressors = None, (layer.compress_k, layer.compress_v)
    if fused and both is not None:
        pair = compress_both(compressors, both, places)
    if pair is None:
        pair = tuple(layer._run(c, x, gather) for c, x in zip(compressors, (k, v), strict=True))
    k_cmp, v_cmp = pair
    if k.ndim == 4:
        counts = (k.shape[0], places.entry_blocks)
        k_cmp, v_cmp = (c.unflatten(0, counts) for c in (k_cmp, v_cmp))
    if positions is None:
        centre = (config.compress_block_size - 1) / 2
        positions = Positions(centre, config.compress_stride, bounds, index)
    return layer._rotate([k_cmp], positions, fused)[0], v_cmp


def rotate_and_compress(
    layer: Layer, projections: Projections, boundaries: Boundaries | None
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Rotated queries and keys, and the compressed pair, by one op of a compiled call on the fused
    backend; None if its parts must be called."""
    if not torch.compiler.is_compiling() or projections.both is None or layer.compress_k is None:
        return None
    from nsa.fused import compiled_heads, layer_ops

    q, keys, _ = projections.heads
    both, theta = projections.both, layer.rope_theta
    found = parameters_of_both((layer.compress_k, layer.compress_v), both)
    if found is None or not (layer_ops.can_rotate(q, theta) and layer_ops.can_gather(both)):
        return None
    parameters = [p for pair in zip(*found, strict=True) for p in pair]
    places = block_places(both, boundaries, check_config(layer.config), True)
    save = needs_gradients(q, both, *parameters)
    options = (*places, theta, save)
    q, k, *pair, _ = compiled_heads.rotate_and_compress(q, keys[0], both, parameters, *options)
    return q, (k,), tuple(pair)
