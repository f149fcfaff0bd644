"""Selections of the tiles that begin in a call with a cache (paper section 3.3.2)."""

from dataclasses import replace

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.cache.append import NewTokens
from nsa.cache.context import gather_compressed, segments_of
from nsa.cache.new_tile_lists import NewTileLists, fit_slots, open_lists
from nsa.cache.state import Cache
from nsa.geometry import Geometry
from nsa.reference.selection import select_blocks, select_groups
from nsa.segments import QuerySegments, Segments


def select_lists(q: Tensor, cache: Cache, tokens: NewTokens, new_k_cmp: Tensor) -> NewTileLists:
    """Select for each tile that begins in the call; an open tile keeps its selection.

    Args:
        q: queries of the new tokens, ``(T, H, D)``.
        new_k_cmp: compressed keys of the candidates, ``(M, H_kv, D)``.
    """
    lists, size = open_lists(cache, tokens, q.shape[1]), cache.config.q_tile_size
    position = lists.tile * size
    begins = (position >= tokens.start[lists.tiles.owner]).nonzero()[:, 0]
    if not len(begins):
        return lists
    owner, position = lists.tiles.owner[begins], position[begins]
    queries = q[tokens.offset[owner] + position - tokens.start[owner]]
    # Each query is a segment of its own, and a sequence ends with its last tile, so that blocks
    # forced at the end of a tile are there before the tokens are.
    length = torch.where(lists.tiles.count > 0, (lists.first + lists.tiles.count) * size, 0)
    rows = Segments(torch.arange(len(begins) + 1, device=q.device), len(begins))
    segments = QuerySegments(rows, position, owner)
    geometry = Geometry(segments, segments_of(length), cache.config)
    k_cmp = gather_compressed(cache, tokens, cache.k_cmp_pages, new_k_cmp, length)
    selected = select_blocks(queries, k_cmp, geometry)
    most = num_selection_blocks(cache.max_length, cache.config)
    selected = torch.where(selected < most, selected, -1)
    blocks, groups = lists.blocks.clone(), lists.groups
    blocks[begins] = fit_slots(selected, blocks.shape[-1])
    if groups is not None:
        groups = groups.clone()
        groups[begins] = fit_slots(select_groups(queries, k_cmp, geometry), groups.shape[-1])
    return replace(lists, blocks=blocks, groups=groups)
