"""Compressed keys and values of the layer, by its compressors."""

from functools import partial
from typing import Any

from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.compressor import block_places, gather_blocks, kept_items
from nsa.joint_products import compress_both
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
