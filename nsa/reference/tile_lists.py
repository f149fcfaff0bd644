"""Selections of the tiles that hold new tokens behind a cache; the first of them may be open."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.cache.append import NewTokens
from nsa.cache.context import gather_compressed, segments_of
from nsa.cache.places import Places, write
from nsa.cache.state import Cache
from nsa.geometry import Geometry, QuerySegments, Segments
from nsa.reference.selection import select_blocks, select_groups


@dataclass(frozen=True, eq=False)
class TileLists:
    """Blocks and groups of the tiles that hold new tokens, one sequence after another.

    Attributes:
        tiles: those of each sequence.
        first: the first of them, int64 ``(B,)``.
        blocks: int32 ``(tiles, H, list_width)``; those of a tile's end, even if the sequence ends
            earlier.
        groups: int32 ``(tiles, H, group_list_width)``, or None to attend all compressed tokens.
    """

    cache: Cache
    tokens: NewTokens
    tiles: Segments
    first: Tensor
    blocks: Tensor
    groups: Tensor | None

    @property
    def tile(self) -> Tensor:
        """The index of each tile in its sequence, int64 ``(tiles,)``."""
        return self.first[self.tiles.owner] + self.tiles.local

    @property
    def real_blocks(self) -> Tensor:
        """``blocks`` without those past the end of the sequence."""
        count = num_selection_blocks(self.tokens.end, self.cache.config)
        count = count[self.tiles.owner, None, None]
        return torch.where(self.blocks < count, self.blocks, -1)

    def with_blocks(self, block_indices: Tensor) -> "TileLists":
        """With the caller's blocks, ``(H, tiles, n)`` or ``(B, H, tiles, n)``."""
        rows = block_indices.transpose(-3, -2)
        if rows.ndim == 4:
            rows = rows[self.tiles.owner, self.tiles.local]
        return replace(self, blocks=fit_slots(rows, self.blocks.shape[-1]))

    def in_layout_of(self, q: Tensor) -> Tensor:
        """Real blocks in the layout of ``block_indices``, -1 in rows that a sequence lacks."""
        rows = fit_slots(self.real_blocks, self.cache.config.num_selected_blocks)
        if q.ndim == 4:
            most = max(self.tiles.counts, default=0)
            batch = rows.new_full((q.shape[0], most, *rows.shape[1:]), -1)
            batch[self.tiles.owner, self.tiles.local] = rows
            rows = batch
        return rows.transpose(-3, -2).contiguous()

    def of_tiles(self, geometry: Geometry) -> tuple[Tensor, Tensor | None]:
        """Blocks and groups of the tiles of ``geometry``, which divide these."""
        owner = geometry.tile_owner
        tile = geometry.tile_first // self.cache.config.q_tile_size
        row = self.tiles.offset[owner] + tile - self.first[owner]
        return self.real_blocks[row], None if self.groups is None else self.groups[row]

    def store(self):
        """Keep the lists of the last tiles in the cache."""
        owner, count = self.tiles.owner, self.tiles.count
        last = self.tiles.local >= count[owner] - self.cache.layout.tile_slots
        places = Places(owner, self.cache.list_slot(self.tile), last)
        for kept, lists in (
            (self.cache.block_lists, self.blocks),
            (self.cache.group_lists, self.groups),
        ):
            if kept is not None and lists is not None:
                write(kept, places, lists)


def select_lists(q: Tensor, cache: Cache, tokens: NewTokens, new_k_cmp: Tensor) -> TileLists:
    """Select for each tile that begins in the call; an open tile keeps its selection.

    Args:
        q: queries of the new tokens, ``(T, H, D)``.
        new_k_cmp: compressed keys of the candidates, ``(M, H_kv, D)``.
    """
    cache.use_num_heads(q.shape[1])
    assert cache.block_lists is not None
    config, size = cache.config, cache.config.q_tile_size
    first = tokens.start // size
    past = torch.where(tokens.end > tokens.start, -(-tokens.end // size), first)
    tiles = segments_of(past - first)
    owner = tiles.owner
    tile = first[owner] + tiles.local
    slot = cache.list_slot(tile)
    blocks = cache.block_lists[owner, slot]
    groups = None if cache.group_lists is None else cache.group_lists[owner, slot]
    begins = (tile * size >= tokens.start[owner]).nonzero()[:, 0]
    if len(begins):
        owner, position = owner[begins], tile[begins] * size
        queries = q[tokens.offset[owner] + position - tokens.start[owner]]
        # Each query is a segment of its own, and a sequence ends with its last tile, so that blocks
        # forced at the end of a tile are there before the tokens are.
        length = past * size * (tiles.count > 0)
        rows = Segments(torch.arange(len(begins) + 1, device=q.device), len(begins))
        segments = QuerySegments(rows, position, owner)
        geometry = Geometry(segments, segments_of(length), config)
        k_cmp = gather_compressed(cache, tokens, cache.k_cmp_pages, new_k_cmp, length)
        most = num_selection_blocks(cache.max_length, config)
        selected = select_blocks(queries, k_cmp, geometry)
        selected = torch.where(selected < most, selected, -1)
        blocks[begins] = fit_slots(selected, blocks.shape[-1])
        if groups is not None:
            groups[begins] = fit_slots(select_groups(queries, k_cmp, geometry), groups.shape[-1])
    return TileLists(cache, tokens, tiles, first, blocks, groups)


def fit_slots(lists: Tensor, width: int) -> Tensor:
    """Lists of ``width`` slots; they name no more than that."""
    lists = lists[..., :width]
    return torch.nn.functional.pad(lists, (0, width - lists.shape[-1]), value=-1)
