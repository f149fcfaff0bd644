"""The stages for new tokens behind a cache. The keys that kernels read from pages, this copies."""

import dataclasses
import math

import torch
from torch import Tensor

from nsa.cache.append import NewTokens, append, new_blocks
from nsa.cache.context import (
    check_all_stored,
    gather_compressed,
    gather_context,
    segments_of,
)
from nsa.cache.new_tile_lists import fit_slots
from nsa.cache.state import Cache, Pair
from nsa.config import NSAConfig
from nsa.geometry import Geometry
from nsa.reference.attention import compressed_attention, selected_attention, window_attention
from nsa.reference.gating import combine_branches
from nsa.reference.selection import select_blocks
from nsa.reference.tile_lists import select_lists
from nsa.segments import QuerySegments, Segments

Branches = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def attend_cached(
    q: Tensor,
    k: Branches,
    v: Branches,
    cache: Cache,
    tokens: NewTokens,
    *,
    gate_proj_weight: Tensor | None,
    gates: Tensor | None,
    compress_weights: tuple[Tensor | None, Tensor | None],
    compressed_kv: Pair | None,
    block_indices: Tensor | None,
) -> Tensor:
    """All stages for new tokens, which then are in the cache. An error leaves it as it was.

    Args:
        q, k, v: of the ``T`` new tokens, ``(T, H, D)`` and so on.
        gate_proj_weight, gates: ``(H, 3, D)`` and ``(T, H, 3)``.
        compress_weights: ``(H_kv, D, D)`` for keys and ``(H_kv, Dv, Dv)`` for values.
        compressed_kv: at least the candidates' ``(M, H_kv, D)`` and ``(M, H_kv, Dv)``.
        block_indices: in the caller's layout.

    Returns:
        ``(T, H, Dv)``.
    """
    check_all_stored(cache, tokens)
    config = cache.config
    k_new, v_new = (
        new_blocks(cache, tokens, kind, x[0], compress_weights[kind], compressed_kv)
        for kind, x in enumerate((k, v))
    )
    context = gather_context(cache, tokens, k, v, (k_new, v_new))
    lists = groups = None
    if config.selection == "tile":
        lists = select_lists(q, cache, tokens, k_new)
        if block_indices is not None:
            lists = lists.with_blocks(block_indices).with_later_blocks()
        # Smaller tiles, so that each sequence's queries start at one; their lists are given.
        size = math.gcd(config.q_tile_size, *_starts(tokens))
        config = dataclasses.replace(config, q_tile_size=size)
    geometry = _geometry(tokens, context.keys, config)
    if lists is not None:
        indices, groups = lists.of_tiles(geometry)
    elif block_indices is not None:
        indices = block_indices.flatten(0, -3)
    else:
        indices = select_blocks(q, context.compressed[0], geometry)
    selected, _ = selected_attention(q, *context.selected, indices, geometry)
    branches = (
        compressed_attention(q, *context.compressed, groups, geometry),
        selected,
        window_attention(q, *context.window, _geometry(tokens, context.window_keys, config)),
    )
    out = combine_branches(branches, q, gates, gate_proj_weight)
    append(cache, tokens, k, v, (k_new, v_new))
    if lists is not None:
        lists.store()
    return out


@torch.no_grad()
def select_cached(
    q: Tensor,
    k: Tensor,
    cache: Cache,
    tokens: NewTokens,
    compress_k_weight: Tensor | None,
    compressed_kv: Pair | None,
) -> Tensor:
    """The blocks that :func:`attend_cached` attends; the cache stays as it is.

    Args:
        q: ``(B, N, H, D)`` or ``(T, H, D)``.
        k: the compressed branch's, ``(T, H_kv, D)``.

    Returns:
        int32 in the layout of ``block_indices``.
    """
    check_all_stored(cache, tokens)
    k_new = new_blocks(cache, tokens, 0, k, compress_k_weight, compressed_kv)
    if cache.config.selection == "tile":
        return select_lists(q.flatten(0, -3), cache, tokens, k_new).in_layout_of(q)
    end = torch.where(tokens.end > tokens.start, tokens.end, 0)
    k_cmp = gather_compressed(cache, tokens, cache.k_cmp_pages, k_new, end)
    geometry = _geometry(tokens, segments_of(end), cache.config)
    indices = fit_slots(
        select_blocks(q.flatten(0, -3), k_cmp, geometry), cache.config.num_selected_blocks
    )
    return indices.unflatten(0, q.shape[:-2])


def _geometry(tokens: NewTokens, keys: Segments, config: NSAConfig) -> Geometry:
    """Geometry of the new tokens as the last ones of ``keys``."""
    rows = Segments(tokens.offset, tokens.position.shape[0])
    return Geometry(QuerySegments(rows, keys.count - rows.count), keys, config)


def _starts(tokens: NewTokens) -> list[int]:
    """Positions of the first new tokens."""
    return tokens.start[tokens.end > tokens.start].tolist()
