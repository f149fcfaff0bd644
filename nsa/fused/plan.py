"""The plan of a call: the sequences, and how their tokens are laid out for the kernels.

Tensors are ``(B, T, H, D)`` of queries and ``(B, Tk, H, D)`` of keys; packed input has ``B = 1``.
The host reads no lengths, so sizes that depend on lengths are upper bounds.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.compressed_forms import (
    CompressedForm,
    compressed_form,
    results_in_order,
    skips_key_tiles,
    sums_queries,
)
from nsa.fused.compressed_indices import blocks_of_tokens, queries_of_few_keys, starts_of_blocks
from nsa.fused.fa4_variants import choose_key_block
from nsa.fused.hardware import WGMMA_ROWS
from nsa.fused.kernel_inputs import IN_ORDER, FewKeys, Placement, Placements, StatisticsPlacements
from nsa.fused.near_blocks import fits_near_blocks
from nsa.fused.plan_tables import BOUNDS, NO_TABLES, TableRule, Tables, expect
from nsa.fused.row_layouts import AlignedRows, FoldedQueries
from nsa.fused.scoring import Scoring
from nsa.fused.token_inputs import (
    TokenBlocks,
    TokenTiles,
    blocks_of_tables,
    make_token_blocks,
    make_token_tiles,
)
from nsa.geometry import Geometry


@dataclass(frozen=True, eq=False)
class Plan:
    """The sequences of each entry of the batch, and the index tensors that follow from them.

    The boundaries ``cu_seqlens`` of queries and ``cu_seqlens_k`` of keys, and the bound
    ``max_seqlen_k`` on the keys of a sequence, are None for batched input, where each entry is one
    sequence. With a ``rule`` kernels make the index tensors, else PyTorch does, from the geometry.
    """

    geometry: Geometry
    batch: int
    head_dim: int
    cu_seqlens: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None
    rule: TableRule | None = None
    _token_tiles: dict[tuple[int, int], TokenTiles] = field(default_factory=dict)

    @cached_property
    def config(self) -> NSAConfig:
        return self.geometry.config

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def whole(self) -> bool:
        """Whether each sequence has as many queries as keys, as far as the host knows."""
        return self.geometry.queries.rows is self.geometry.keys

    @cached_property
    def _bounds(self) -> Tensor:
        rule, cu_seqlens, cu_seqlens_k = self._given()
        return kernel_calls.sequence_bounds(cu_seqlens, cu_seqlens_k, rule)

    @cached_property
    def tables(self) -> Tables:
        """What a kernel made: all tables but those of means."""
        return self._make_tables(means=False)

    @cached_property
    def mean_tables(self) -> Tables:
        """The tables of means, which are not needed if the caller compresses."""
        return self._make_tables(means=True)

    def _make_tables(self, means: bool) -> Tables:
        if self.rule is None:
            return NO_TABLES
        rule, cu_seqlens, cu_seqlens_k = self._given()
        return kernel_calls.plan_tables(cu_seqlens, cu_seqlens_k, self._bounds, rule, means)

    def _given(self) -> tuple[TableRule, Tensor, Tensor]:
        """The rule and the boundaries that it is for."""
        rule, cu_seqlens, cu_seqlens_k = self.rule, self.cu_seqlens, self.cu_seqlens_k
        if rule is None or cu_seqlens is None or cu_seqlens_k is None:
            raise ValueError(f"tables need a rule and boundaries, got {rule} and {cu_seqlens}")
        return rule, cu_seqlens, cu_seqlens_k

    def _bounds_of(self, kind: str) -> Tensor | None:
        """Where items of a kind in ``BOUNDS`` start, if a kernel added them up."""
        return None if self.rule is None else self._bounds[BOUNDS.index(kind)]

    @cached_property
    def compressed_form(self) -> CompressedForm:
        """How the compressed branch is computed."""
        total = self.geometry.compressed.total
        return compressed_form(self.config, packed=self.packed, num_compressed=total)

    @property
    def skips_key_tiles(self) -> bool:
        """See :func:`nsa.fused.compressed_forms.skips_key_tiles`."""
        form, total, most = self.compressed_form, self.geometry.compressed.total, self.max_seqlen_k
        longest = self.geometry.keys.total if most is None else most
        return skips_key_tiles(form, total, self.config, whole=self.whole, longest=longest)

    def sums_queries(self, num_heads: int, num_kv_heads: int) -> bool:
        """See :func:`nsa.fused.compressed_forms.sums_queries`."""
        total = self.geometry.compressed.total
        group = num_heads // num_kv_heads
        return sums_queries(self.compressed_form, total, self.batch, num_heads, group)

    @cached_property
    def queries(self) -> AlignedRows:
        """The queries, aligned to tiles."""
        tables = (self.tables.row_of_query, self.tables.query_of_row)
        return AlignedRows(self.geometry.queries.rows, self.config.q_tile_size, tables)

    @cached_property
    def keys(self) -> AlignedRows:
        """The keys, aligned to tiles."""
        if self.whole:
            return self.queries
        tables = (self.tables.row_of_key, self.tables.key_of_row)
        return AlignedRows(self.geometry.keys, self.config.q_tile_size, tables)

    @property
    def keys_in_place(self) -> bool:
        """Whether the selected branch has the keys of a single sequence in rows without padding."""
        keys = self.geometry.keys
        return (
            self.batch == 1
            and keys.single
            and (self.config.selection == "token" or self.keys.rows == keys.total)
        )

    @cached_property
    def folded(self) -> FoldedQueries:
        return FoldedQueries(self.geometry, self.tables, self._bounds_of("folded"))

    @property
    def has_band(self) -> bool:
        """Whether selection is by token and forces blocks, which neighbouring tokens share."""
        forced = self.config.num_initial_blocks + self.config.num_local_blocks
        return self.config.selection == "token" and forced > 0

    @property
    def first_position(self) -> int:
        """The position of the first query of each entry of a batch."""
        return self.geometry.keys.total - self.geometry.queries.rows.total

    @property
    def joins_near_blocks(self) -> bool:
        """See :func:`nsa.fused.near_blocks.fits_near_blocks`; queries begin at a tile of keys."""
        fits = fits_near_blocks(self.config, self.head_dim, packed=self.packed)
        return fits and self.first_position % WGMMA_ROWS == 0

    @property
    def in_order(self) -> bool:
        """Whether outputs and gradients of queries are ``(B, T, H, D)`` in every branch.

        Otherwise those of the compressed and selected branch stay in the layout of their kernels,
        and the gates read them through a :class:`Placement`.
        """
        return results_in_order(self.config, self.packed)

    def query_placements(self, num_heads: int, num_kv_heads: int) -> Placements:
        """Where outputs and gradients of queries lie in the compressed and selected branch.

        Unless :attr:`in_order`, they stay in the layout of the kernels: aligned rows for the
        selected and the sparse compressed branch, folded rows for the dense causal compressed one.
        """
        if self.in_order:
            return IN_ORDER
        selected = self.queries.placement(num_heads)
        if self.compressed_form is CompressedForm.LISTED:
            return selected, selected
        if self.compressed_form is CompressedForm.PACKED:
            return self.folded.placement(num_heads, num_kv_heads), selected
        return None, selected

    def statistics_placements(self, num_heads: int, num_kv_heads: int) -> StatisticsPlacements:
        """Where log-sum-exps and statistics lie in the compressed, selected and window branch.

        Where queries are in order, these are ``(H, B * T)``; in token mode's selected branch
        ``(B * T, H)``. Elsewhere they are in the rows of their kernel: folded ``(rows, heads)``, or
        aligned ``(1, H, rows)``. The compressed branch has none without compressed tokens.
        """
        tokens = self.batch * self.geometry.queries.rows.total
        by_head = Placement(None, 1, num_heads, 0, tokens)
        selected = Placement(None, num_heads, num_heads, 0)
        if self.config.selection == "tile":
            selected = self.queries.statistics_placement(num_heads, self.batch)
        compressed: Placement | None = by_head
        if self.compressed_form is CompressedForm.NONE:
            compressed = None
        elif self.compressed_form is CompressedForm.LISTED:
            compressed = selected
        elif self.compressed_form is CompressedForm.PACKED and not self.in_order:
            compressed = self.folded.placement(num_heads, num_kv_heads)
        return compressed, selected, by_head

    @cached_property
    def few_keys(self) -> FewKeys | None:
        """Queries that see a few compressed keys; None where no query need see few."""
        if not self.config.causal or self.compressed_form is CompressedForm.NONE:
            return None
        tables = self.tables
        if tables.few_query is not None:
            return FewKeys(tables.few_query, expect(tables.few_first), expect(tables.few_count))
        return queries_of_few_keys(self.geometry, self.batch)

    def align_queries(self, q: Tensor) -> Tensor:
        """``q (B, T, H, D)`` in aligned rows, ``(1, B * rows, H, D)``; unchanged in token mode."""
        return q if self.config.selection == "token" else self.queries.pack(q)

    def query_rows(self, x: Tensor) -> Tensor:
        """A branch's ``(1, B * rows, H, D)`` in the layout that the gates take."""
        return self.queries.unpack(x) if self.in_order else x

    def folded_queries(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """A branch's ``(1, rows, H_kv * d * G, D)`` in the layout that the gates take."""
        return self.folded.unfold(x, num_kv_heads) if self.in_order else x

    @cached_property
    def block_start(self) -> Tensor:
        """The first token of each compressed block, -1 for blocks of no sequence, int32."""
        if self.mean_tables.block_start is not None:
            return self.mean_tables.block_start
        return starts_of_blocks(self.geometry)

    @cached_property
    def blocks_of_token(self) -> Tensor:
        """The compressed blocks that each token is in, -1 for none, int32 ``(Tk, l / d)``."""
        if self.mean_tables.blocks_of_token is not None:
            return self.mean_tables.blocks_of_token
        return blocks_of_tokens(self.geometry)

    @cached_property
    def compressed_bounds(self) -> Tensor:
        """Where the compressed tokens of each sequence start, then where the last end: int32."""
        bounds = self._bounds_of("compressed")
        return self.geometry.compressed.offset.int() if bounds is None else bounds

    @property
    def key_block(self) -> int:
        """Keys of a key block in the selected branch."""
        return choose_key_block(self.config.select_block_size, self.config, self.head_dim)

    @property
    def cmp_key_block(self) -> int:
        """Compressed tokens of a key block in the sparse compressed branch."""
        return choose_key_block(self.config.cmp_group_size, self.config, self.head_dim)

    @cached_property
    def compressed(self) -> AlignedRows:
        """The compressed tokens, aligned to blocks of the sparse compressed branch."""
        tables = (self.tables.row_of_compressed, self.tables.compressed_of_row)
        return AlignedRows(self.geometry.compressed, self.cmp_key_block, tables)

    @property
    def ends_align(self) -> bool:
        """Whether the last aligned row of queries stands at the last one of keys.

        A causal mask then needs no limit for each row. Where it holds, aligned rows before have the
        same distance, because queries start at a tile.
        """
        return self.whole or (self.batch == 1 and self.geometry.queries.rows.single)

    @cached_property
    def tile_key_blocks(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """First key block of each tile's sequence in the row, number of key blocks, and how many of
        them the tile's first query sees whole.

        Int32 ``(tiles,)`` each. The second is 0 for tiles of no sequence. The third is None if the
        mask is applied to all blocks.
        """
        tables = self.tables
        if tables.key_blocks is not None:
            return expect(tables.key_block_first), tables.key_blocks, tables.full_key_blocks
        first, count = self._tile_blocks(self.keys, self.key_block)
        if not self.config.causal or self.ends_align:
            return first, count, None
        return first, count, ((self.geometry.tile_first + 1) // self.key_block).int()

    @cached_property
    def key_limit(self) -> Tensor:
        """For each aligned row of queries, the aligned row of the first key that it does not see.

        Int32 ``(rows,)``, for one entry of the batch, in the selected branch of tile mode.
        """
        if self.tables.key_limit is not None:
            return self.tables.key_limit
        queries, rows = self.geometry.queries, self.queries.segments
        owner = queries.sequence_of(rows.owner)
        count = self.geometry.keys.count[owner]
        if self.config.causal:
            count = count.minimum(self.row_position + 1)
        return (self.keys.segments.offset[owner] + count).int()

    @cached_property
    def cmp_key_limit(self) -> Tensor:
        """The same for the aligned rows of compressed tokens, in the sparse compressed branch."""
        if self.tables.cmp_key_limit is not None:
            return self.tables.cmp_key_limit
        geometry = self.geometry
        owner = geometry.queries.sequence_of(self.queries.segments.owner)
        seen = geometry.num_visible(self.row_position, owner, self.config.compressed_visibility)
        return (self.compressed.segments.offset[owner] + seen).int()

    @cached_property
    def row_position(self) -> Tensor:
        """The position of each aligned row of queries in its sequence, int64 ``(rows,)``."""
        rows = self.queries.segments
        return self.geometry.queries.positions(rows.local, rows.owner)

    @cached_property
    def tile_cmp_key_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for compressed tokens."""
        tables = self.tables
        if tables.full_cmp_blocks is not None:
            first, count = expect(tables.cmp_block_first), expect(tables.cmp_blocks)
            return first, count, tables.full_cmp_blocks
        geometry = self.geometry
        seen = geometry.num_visible(
            geometry.tile_first, geometry.tile_owner, self.config.compressed_visibility
        )
        blocks = self._tile_blocks(self.compressed, self.cmp_key_block)
        return *blocks, (seen // self.cmp_key_block).int()

    @cached_property
    def token_blocks(self) -> TokenBlocks:
        """What each token may attend in token mode."""
        if self.rule is not None and self.tables.block_first is not None:
            return blocks_of_tables(self.tables, self.rule)
        return make_token_blocks(self.geometry, self.batch)

    def token_tiles(self, tile_tokens: int, step_tokens: int) -> TokenTiles:
        """Tiles of ``tile_tokens`` tokens for the importance kernel, in steps of ``step_tokens``.

        Both depend on the number of heads, so they may differ between chunks.
        """
        key = (tile_tokens, step_tokens)
        if key not in self._token_tiles:
            made = self.rule is not None and self.rule.tile == tile_tokens
            fields = self.tables.tile_fields if made else None
            self._token_tiles[key] = make_token_tiles(
                self.geometry, tile_tokens, step_tokens, fields
            )
        return self._token_tiles[key]

    @cached_property
    def token_candidates(self) -> tuple[Tensor, Tensor]:
        """Each token's own selection block, and how many it may take: int32 ``(T,)`` each."""
        if self.tables.own_block is not None:
            return self.tables.own_block, expect(self.tables.candidates)
        queries, config = self.geometry.queries, self.config
        own = queries.position // config.select_block_size
        count = own + 1 if config.causal else self.geometry.selection.count[queries.owner]
        return own.int(), torch.where(queries.rows.real, count, 0).int()

    @cached_property
    def token_first(self) -> Tensor:
        """The column of each token's first score, which is 0: int32 ``(T,)``."""
        if self.tables.first_column is not None:
            return self.tables.first_column
        return torch.zeros_like(self.token_candidates[0])

    @cached_property
    def scoring(self) -> Scoring:
        """What each tile may see and take when it selects."""
        return Scoring(self.geometry, self.batch, self.tables)

    def _tile_blocks(self, keys: AlignedRows, key_block: int) -> tuple[Tensor, Tensor]:
        tiles, owner = self.geometry.tiles, self.geometry.tile_owner
        if tiles.single:
            num_blocks = -(-keys.items.total // key_block)
            return self.scoring.first, torch.full_like(self.scoring.first, num_blocks)
        first = keys.segments.offset[owner] // key_block
        count = -(-keys.items.count[owner] // key_block)
        return first.int(), torch.where(tiles.real, count, 0).int()

    @property
    def longest(self) -> int:
        """Upper bound on the keys of a sequence."""
        return self.geometry.keys.total if self.max_seqlen_k is None else self.max_seqlen_k

    @property
    def max_selection_blocks(self) -> int:
        """Upper bound on the selection blocks of a sequence."""
        return num_selection_blocks(self.longest, self.config)
