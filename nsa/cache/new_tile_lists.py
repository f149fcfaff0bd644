"""Selections of the tiles that hold new tokens in a cache; the first of them may be open."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.cache.append import NewTokens
from nsa.cache.context import segments_of
from nsa.cache.layout import round_up
from nsa.cache.places import CachePlaces, write
from nsa.cache.spans import SliceCopies, Spans
from nsa.cache.state import Cache
from nsa.geometry import Geometry
from nsa.segments import Segments, prefix_sum


@dataclass(frozen=True, eq=False)
class NewTileLists:
    """Blocks and groups of the tiles that hold new tokens, one sequence after another.

    Attributes:
        end: lengths after the call, ``(B,)``.
        tiles: those of each sequence.
        first: the first of them, ``(B,)``.
        blocks: int32 ``(tiles, H, list_width)``; those up to a tile's end, even if the sequence
            ends earlier.
        groups: int32 ``(tiles, H, group_list_width)``, or None to attend all compressed tokens.
    """

    cache: Cache
    end: Tensor
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
        count = num_selection_blocks(self.end, self.cache.config)
        count = count[self.tiles.owner, None, None]
        return torch.where(self.blocks < count, self.blocks, -1)

    def with_blocks(self, block_indices: Tensor) -> "NewTileLists":
        """The same tiles with the caller's blocks, ``(H, tiles, n)`` or ``(B, H, tiles, n)``.

        Raises:
            ValueError: the number of tiles is wrong. Earlier checks miss this where they cannot
                read the lengths, as while torch.compile traces.
        """
        rows = block_indices.transpose(-3, -2)
        wanted = self.tiles.total if rows.ndim == 3 else max(self.tiles.counts, default=0)
        if rows.shape[-3] != wanted:
            raise ValueError(
                f"block_indices must have {wanted} tiles, those with new tokens, got "
                f"{rows.shape[-3]}"
            )
        if rows.ndim == 4:
            rows = rows[self.tiles.owner, self.tiles.local]
        return replace(self, blocks=fit_slots(rows, self.blocks.shape[-1]))

    def with_later_blocks(self) -> "NewTileLists":
        """The same lists with the forced blocks of a tile's end that lie past the end of the
        sequence."""
        config, slots = self.cache.config, self.blocks.shape[-1]
        count = num_selection_blocks(self.end, config)[self.tiles.owner]
        end = (self.tile + 1) * config.q_tile_size - 1
        end = end // config.select_block_size + 1
        initial = (end.clamp(max=config.num_initial_blocks) - count).clamp(min=0)
        local = torch.maximum((end - config.num_local_blocks).clamp(min=0), count + initial)
        total = initial + (end - local).clamp(min=0)
        filled = (self.blocks >= 0).sum(-1, keepdim=True)
        nth = torch.arange(slots, device=filled.device) - filled
        count, initial, local, total = (x[:, None, None] for x in (count, initial, local, total))
        later = torch.where(nth < initial, count + nth, local + nth - initial)
        later = torch.where((nth < total) & (later < self._most_blocks), later, -1)
        return replace(self, blocks=torch.where(nth < 0, self.blocks, later.int()))

    @property
    def _most_blocks(self) -> int:
        return num_selection_blocks(self.cache.max_length, self.cache.config)

    def in_layout_of(self, q: Tensor) -> Tensor:
        """The blocks that exist, in the layout of ``block_indices``; -1 in rows that a sequence
        does not have."""
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
        places = CachePlaces(owner, self.cache.list_slot(self.tile), last)
        for kept, lists in (
            (self.cache.block_lists, self.blocks),
            (self.cache.group_lists, self.groups),
        ):
            if kept is not None and lists is not None:
                write(kept, places, lists)


def open_lists(cache: Cache, tokens: NewTokens, num_heads: int) -> NewTileLists:
    """The lists that the cache keeps, of the tiles that hold new tokens. A tile that begins in the
    call has none yet: its row has any values."""
    cache.use_num_heads(num_heads)
    assert cache.block_lists is not None
    first, count = _touched(tokens.start, tokens.end, cache.config.q_tile_size)
    tiles = segments_of(count)
    slot = cache.list_slot(first[tiles.owner] + tiles.local)
    blocks = cache.block_lists[tiles.owner, slot]
    groups = None if cache.group_lists is None else cache.group_lists[tiles.owner, slot]
    return NewTileLists(cache, tokens.end, tiles, first, blocks, groups)


def keep_lists(cache: Cache, spans: Spans, end: Tensor, rows: Tensor):
    """Keep the lists of the last tiles of each sequence, where all tiles begin in the call.

    Args:
        spans: the new tokens, which start at multiples of ``q_tile_size``.
        end: lengths after the call, ``(B,)``; those before it are still in the cache.
        rows: int32 ``(tiles, H, n)``, one sequence after another.
    """
    cache.use_num_heads(rows.shape[1])
    assert cache.block_lists is not None
    size, slots = cache.config.q_tile_size, cache.layout.tile_slots
    rows = fit_slots(rows, cache.layout.list_width)
    if any(_may_have_later_blocks(length, cache) for length in spans.ends):
        first, count = _touched(cache.lengths, end, size)
        segments = Segments(prefix_sum(count), rows.shape[0])
        rows = NewTileLists(cache, end, segments, first, rows, None).with_later_blocks().blocks
    counts = [-(-count // size) for count in spans.counts]
    if spans.whole:
        rows = rows.unflatten(0, (cache.batch_size, counts[0]))
    copies = SliceCopies(spans)
    kept, parts = copies.sequences(cache.block_lists), copies.parts(rows, counts)
    for lists, part, start, tiles in zip(kept, parts, spans.starts, counts, strict=False):
        for at in range(max(0, tiles - slots), tiles):
            slot = cache.list_slot(start // size + at)
            copies.copy(lists.select(-3, slot), part.select(-3, at))
    copies.run()


def _touched(start: Tensor, end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first tile that has tokens from ``start`` to ``end``, and how many have."""
    first = start // size
    return first, torch.where(end > start, -(-end // size), first) - first


def _may_have_later_blocks(length: int, cache: Cache) -> bool:
    """Whether the last tile of a sequence of ``length`` tokens ends in a block past its end."""
    tile_end = round_up(length, cache.config.q_tile_size)
    last, now = (
        num_selection_blocks(n, cache.config) for n in (min(tile_end, cache.max_length), length)
    )
    return last > now


def fit_slots(lists: Tensor, width: int) -> Tensor:
    """Lists cut or padded to ``width`` slots, which hold all that they name."""
    lists = lists[..., :width]
    return torch.nn.functional.pad(lists, (0, width - lists.shape[-1]), value=-1)
