"""Heads of the layer by their positions, and by its compressors."""

from functools import partial
from typing import Any

from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.compressor import block_places, gather_blocks, kept_items
from nsa.rope import Positions, rotate
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
) -> tuple[Tensor, Tensor]:
    """Compressed keys, rotated to the centres of their blocks, and compressed values.

    ``positions`` are those of the centres if the tokens are parts of sequences.
    """
    config = check_config(layer.config)
    places = block_places(k, boundaries, config, fused)
    if layer.recompute and places.token_bounds is not None:
        # A copy, because the caller may change its own before backward computes blocks again.
        places = places._replace(token_bounds=places.token_bounds.clone())
    bounds, locate, index = places.block_bounds, None, None
    if boundaries is not None and bounds is not None:
        kept = kept_items(boundaries, ("blocks", config), bounds, places.blocks)
        locate, index = kept, lambda: kept()[1]
    gather = partial(gather_blocks, places=places, locate=locate, fused=fused)
    k_cmp, v_cmp = (
        layer._run(compressor, x, gather)
        for compressor, x in ((layer.compress_k, k), (layer.compress_v, v))
    )
    if k.ndim == 4:
        counts = (k.shape[0], places.entry_blocks)
        k_cmp, v_cmp = (c.unflatten(0, counts) for c in (k_cmp, v_cmp))
    if positions is None:
        centre = (config.compress_block_size - 1) / 2
        positions = Positions(centre, config.compress_stride, bounds, index)
    return rotate_heads([k_cmp], positions, layer.rope_theta, fused)[0], v_cmp


def rotate_heads(
    tensors: list[Tensor], positions: Positions, theta: float | None, fused: bool
) -> list[Tensor]:
    """Tensors ``(..., H, D)`` rotated by the positions of their rows."""
    if theta is None:
        return tensors
    if fused:
        from nsa.fused import layer_ops

        if layer_ops.can_rotate(tensors[0], theta):
            return layer_ops.rotate(tensors, positions, theta)
    return [rotate(x, positions, theta) for x in tensors]
