"""The plan of a call: the sequences, and how their tokens are laid out for the kernels.

Tensors are ``(B, T, H, D)``; packed input has ``B = 1``. The host reads no lengths, so sizes that
depend on lengths are upper bounds.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.config import NSAConfig
from nsa.fused.compressed_forms import (
    CompressedForm,
    compressed_form,
    is_folded,
    results_in_order,
)
from nsa.fused.kernel_inputs import (
    IN_ORDER,
    Placements,
    TokenBlocks,
    TokenTiles,
    make_token_blocks,
    make_token_tiles,
)
from nsa.fused.row_layouts import AlignedRows, FoldedQueries
from nsa.fused.scoring import Scoring
from nsa.geometry import Geometry
from nsa.host import may_keep
from nsa.packing import Packing

MAX_PLANS = 8
"""Plans of batches to keep. Few, because each keeps index tensors on the device
that are as long as the sequences: about 100 bytes a token if packed."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The sequences of each entry of the batch, and the index tensors that follow from them.

    ``cu_seqlens`` and ``max_seqlen`` are None for batched input, where each entry is one sequence.
    """

    geometry: Geometry
    batch: int
    head_dim: int
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    _token_tiles: dict[tuple[int, int], TokenTiles] = field(default_factory=dict)

    @cached_property
    def config(self) -> NSAConfig:
        return self.geometry.config

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @cached_property
    def compressed_form(self) -> CompressedForm:
        """How the compressed branch is computed."""
        total = self.geometry.compressed.total
        return compressed_form(self.config, packed=self.packed, num_compressed=total)

    @property
    def folds(self) -> bool:
        """Whether the compressed branch folds queries into heads."""
        return is_folded(self.compressed_form, self.geometry.compressed.total)

    @cached_property
    def tokens(self) -> AlignedRows:
        """The tokens, aligned to query tiles."""
        return AlignedRows(self.geometry.keys, self.config.q_tile_size)

    @cached_property
    def folded(self) -> FoldedQueries:
        return FoldedQueries(self.geometry)

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
        selected = self.tokens.placement(num_heads)
        if self.compressed_form is CompressedForm.LISTED:
            return selected, selected
        if self.compressed_form is CompressedForm.FOLDED_ROWS:
            return self.folded.placement(num_heads, num_kv_heads), selected
        return None, selected

    def align_queries(self, q: Tensor) -> Tensor:
        """``q (B, T, H, D)`` in aligned rows, ``(1, B * rows, H, D)``; unchanged in token mode."""
        return q if self.config.selection == "token" else self.tokens.pack(q)

    def query_rows(self, x: Tensor) -> Tensor:
        """A branch's ``(1, B * rows, H, D)`` in the layout that the gates take."""
        return self.tokens.unpack(x) if self.in_order else x

    def folded_queries(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """A branch's ``(1, rows, H_kv * d * G, D)`` in the layout that the gates take."""
        return self.folded.unfold(x, num_kv_heads) if self.in_order else x

    @cached_property
    def block_start(self) -> Tensor:
        """The first token of each compressed block, -1 for blocks of no sequence, int32."""
        keys, compressed = self.geometry.keys, self.geometry.compressed
        stride = self.config.compress_stride
        if compressed.single:
            end, device = compressed.total * stride, self.geometry.device
            return torch.arange(0, end, stride, dtype=torch.int32, device=device)
        start = keys.offset[compressed.owner] + compressed.local * stride
        return torch.where(compressed.real, start, -1).int()

    @cached_property
    def blocks_of_token(self) -> Tensor:
        """The compressed blocks that each token is in, -1 for none, int32 ``(T, l / d)``."""
        config, keys, compressed = self.config, self.geometry.keys, self.geometry.compressed
        # The last block that starts at or before the token, and the blocks before it.
        overlap = config.compress_block_size // config.compress_stride
        earlier = torch.arange(overlap, device=self.geometry.device)
        owner = keys.owner[:, None]
        local = keys.local[:, None] // config.compress_stride - earlier
        inside = (local >= 0) & (local < compressed.count[owner])
        return torch.where(inside, compressed.offset[owner] + local, -1).int()

    @cached_property
    def compressed_bounds(self) -> Tensor:
        """Where the compressed tokens of each sequence start, then where the last end: int32."""
        return self.geometry.compressed.offset.int()

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
        return AlignedRows(self.geometry.compressed, self.cmp_key_block)

    @cached_property
    def tile_key_blocks(self) -> tuple[Tensor, Tensor]:
        """First key block of each tile's sequence in the row, and number of key blocks.

        Int32 ``(tiles,)`` each; the number is 0 for tiles of no sequence.
        """
        return self._tile_blocks(self.tokens, self.key_block)

    @cached_property
    def tile_cmp_key_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same for compressed tokens; and how many key blocks the first query sees whole."""
        geometry = self.geometry
        seen = geometry.num_visible(
            geometry.tile_first, geometry.tile_owner, self.config.compressed_visibility
        )
        blocks = self._tile_blocks(self.compressed, self.cmp_key_block)
        return *blocks, (seen // self.cmp_key_block).int()

    @cached_property
    def token_blocks(self) -> TokenBlocks:
        """What each token may attend in token mode."""
        return make_token_blocks(self.geometry, self.batch)

    def token_tiles(self, tile_tokens: int, step_tokens: int) -> TokenTiles:
        """Tiles of ``tile_tokens`` tokens for the importance kernel, in steps of ``step_tokens``.

        Both depend on the number of heads, so they may differ between chunks.
        """
        key = (tile_tokens, step_tokens)
        if key not in self._token_tiles:
            self._token_tiles[key] = make_token_tiles(self.geometry, *key)
        return self._token_tiles[key]

    @cached_property
    def token_candidates(self) -> tuple[Tensor, Tensor]:
        """Each token's own selection block, and how many it may take: int32 ``(T,)`` each."""
        queries, config = self.geometry.queries, self.config
        own = queries.position // config.select_block_size
        count = own + 1 if config.causal else self.geometry.selection.count[queries.owner]
        return own.int(), torch.where(queries.rows.real, count, 0).int()

    @cached_property
    def token_first(self) -> Tensor:
        """The column of each token's first score, which is 0: int32 ``(T,)``."""
        return torch.zeros_like(self.token_candidates[0])

    @cached_property
    def scoring(self) -> Scoring:
        """What each tile may see and take when it selects."""
        return Scoring(self.geometry, self.batch)

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
        """Upper bound on the tokens of a sequence."""
        return self.geometry.keys.total if self.max_seqlen is None else self.max_seqlen

    @property
    def max_selection_blocks(self) -> int:
        """Upper bound on the selection blocks of a sequence."""
        return num_selection_blocks(self.longest, self.config)


def choose_key_block(block_size: int, config: NSAConfig, head_dim: int) -> int:
    """Keys of a key block, for selection blocks or groups of ``block_size``."""
    # FA4's tiles of 128 keys need 128 queries, and a head dimension that fits shared memory.
    wide = block_size % 128 == 0 and config.q_tile_size % 128 == 0
    return 128 if wide and head_dim <= 128 else 64


@lru_cache(maxsize=64)
def with_scale(config: NSAConfig, scale: float) -> NSAConfig:
    """``config`` with an explicit scale, because padding changes ``D`` and so the default scale."""
    return replace(config, scale=scale)


def make_plan(
    q: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    config: NSAConfig,
    packing: Packing | None = None,
) -> Plan:
    """The plan for ``q (B, N, H, D)``, or for packed ``q (1, T, H, D)`` with ``cu_seqlens``.

    The plan is kept with ``packing``, if given. Otherwise it has a copy of ``cu_seqlens``, which
    nobody changes before backward. The host reads the lengths if ``max_seqlen`` is None.
    """
    if cu_seqlens is None:
        plan = _cached_batched_plan if may_keep(q) else _batched_plan
        return plan(q.shape[0], q.shape[1], q.shape[-1], q.device, config)
    if packing is not None:
        max_seqlen = packing.max_seqlen
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    arguments = (q.shape[1], q.shape[-1], min(max_seqlen, q.shape[1]), config)
    if packing is None:
        return _packed_plan(cu_seqlens.clone(), *arguments)
    return packing.keep(arguments, partial(_packed_plan, packing.cu_seqlens, *arguments))


def _packed_plan(
    cu_seqlens: Tensor, length: int, head_dim: int, max_seqlen: int, config: NSAConfig
) -> Plan:
    geometry = Geometry.packed(cu_seqlens, cu_seqlens, length, length, config, exact=False)
    return Plan(geometry, 1, head_dim, cu_seqlens, max_seqlen)


def _batched_plan(
    batch: int, length: int, head_dim: int, device: torch.device, config: NSAConfig
) -> Plan:
    return Plan(Geometry.equal(1, length, length, device, config), batch, head_dim, None, None)


_cached_batched_plan = lru_cache(maxsize=MAX_PLANS)(_batched_plan)
