"""What tiles may see and take when they select, as the kernel reads it."""

from functools import cached_property

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.fused.plan_tables import NO_TABLES, Tables
from nsa.geometry import Geometry


class Scoring:
    """Tensors with one value per tile of an entry, int32 ``(tiles,)`` unless stated otherwise.

    See :mod:`nsa.fused.kernels.top_blocks`. ``tables`` are those of the plan, where a kernel made
    them.
    """

    def __init__(self, geometry: Geometry, batch: int, tables: Tables = NO_TABLES):
        self.geometry = geometry
        self.batch = batch
        self.tables = tables

    @cached_property
    def first(self) -> Tensor:
        """The first compressed token of the tile's sequence."""
        if self.tables.cmp_first is not None:
            return self.tables.cmp_first
        tiles, compressed = self.geometry.tiles, self.geometry.compressed
        if tiles.single:
            return torch.zeros(tiles.total, dtype=torch.int32, device=self.geometry.device)
        return compressed.offset[self.geometry.tile_owner].int()

    @cached_property
    def visible(self) -> Tensor:
        """Compressed tokens of the sequence that are scored, 0 for tiles of no sequence."""
        if self.tables.visible is not None:
            return self.tables.visible
        geometry = self.geometry
        by_first = geometry.config.tile_summary == "first"
        position = geometry.tile_first if by_first else geometry.tile_last
        seen = geometry.num_visible(position, geometry.tile_owner, "complete")
        return geometry.tiles.only_real(seen).int()

    @cached_property
    def candidates(self) -> Tensor:
        """Number of selection blocks that may be taken, 0 for tiles of no sequence.

        Blocks up to the tile's end count even past the end of the sequence. They have no score, but
        forced ones take a slot.
        """
        if self.tables.tile_candidates is not None:
            return self.tables.tile_candidates
        count = self.own + 1
        if not self.geometry.config.causal:
            count = torch.maximum(count, self.num_blocks)
        return self.geometry.tiles.only_real(count).int()

    @cached_property
    def own(self) -> Tensor:
        """The selection block of the tile's last position."""
        if self.tables.own is not None:
            return self.tables.own
        return (self.geometry.tile_end // self.geometry.config.select_block_size).int()

    @cached_property
    def num_blocks(self) -> Tensor:
        """Selection blocks of the tile's sequence."""
        if self.tables.num_blocks is not None:
            return self.tables.num_blocks
        length = self.geometry.keys.count[self.geometry.tile_owner]
        return num_selection_blocks(length, self.geometry.config).int()

    @property
    def forced_past_end(self) -> bool:
        """Whether a forced block may lie past the end of its sequence."""
        geometry, config = self.geometry, self.geometry.config
        if config.num_initial_blocks + config.num_local_blocks == 0:
            return False
        # A full tile ends at a token, so all its blocks start inside the sequence.
        return not geometry.tiles.single or geometry.keys.total % config.q_tile_size != 0

    @cached_property
    def tile_start(self) -> Tensor:
        """The first aligned row of each tile, for all entries of the batch, ``(B * tiles,)``."""
        tiles, size = self.geometry.tiles, self.geometry.config.q_tile_size
        end = self.batch * tiles.total * size
        return torch.arange(0, end, size, dtype=torch.int32, device=tiles.device)

    @cached_property
    def filled(self) -> Tensor | None:
        """The fraction of each tile's rows that are queries, float32; None if all are full."""
        geometry = self.geometry
        if geometry.tiles.single and geometry.queries.rows.total % geometry.config.q_tile_size == 0:
            return None
        count = self.tables.tile_count
        if count is None:
            count = geometry.tile_last - geometry.tile_first + 1
        return count.clamp(min=1).float() / geometry.config.q_tile_size
