"""How tokens are laid out for the kernels: aligned rows, folded queries, and the plan of a call.

Tensors here are ``(B, T, H, D)``: batched input as it is, packed input with ``B = 1``. Nothing
reads a length on the host, so sizes that depend on them are upper bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from nsa.blocks import (
    Geometry,
    Segments,
    SingleSegment,
    num_compressed_blocks,
    num_query_tiles,
    num_selection_blocks,
    prefix_sum,
)
from nsa.config import NSAConfig
from nsa.fused import own_kernels
from nsa.fused.importance import TokenTiles, make_token_tiles
from nsa.fused.placement import Placement
from nsa.fused.scoring import Scoring
from nsa.fused.token_blocks import TokenBlocks, make_token_blocks
from nsa.tracing import is_capturing


class AlignedRows:
    """All items of a batch in one row, each sequence starting at a multiple of ``alignment``.

    Lists that name only a sequence's own blocks then keep sequences apart, and the padding after a
    sequence comes after each of its queries.

    Args:
        items: the sequences in each of the ``B`` entries.
        alignment: the multiple, in items.
    """

    def __init__(self, items: Segments, alignment: int):
        self.items = items
        self.alignment = alignment
        self.single = items.single
        self.segments = self._align(items, alignment)
        """Where each sequence lies in the row of one entry of the batch."""

    @staticmethod
    def _align(items: Segments, alignment: int) -> Segments:
        if items.single:
            return SingleSegment(-(-items.total // alignment) * alignment, items.device)
        offset = prefix_sum(-(-items.count // alignment) * alignment)
        return Segments(offset, (items.total // alignment + items.num_sequences) * alignment)

    @property
    def rows(self) -> int:
        """Rows of one entry of the batch, an upper bound."""
        return self.segments.total

    @cached_property
    def _row_of_item(self) -> Tensor:
        """The row that holds each item, -1 for items of no sequence, int64 ``(T,)``."""
        items = self.items
        row = self.segments.offset[items.owner] + items.local
        return torch.where(items.real, row, -1)

    @cached_property
    def _item_of_row(self) -> Tensor:
        """The item that each row holds, -1 where it holds none, int64 ``(rows,)``."""
        segments, items = self.segments, self.items
        item = items.offset[segments.owner] + segments.local
        return torch.where(segments.local < items.count[segments.owner], item, -1)

    def pack(self, x: Tensor) -> Tensor:
        """``(B, T, H, D)`` to ``(1, B * rows, H, D)`` with zeros in the padding."""
        if not self.single:
            return _gather(x, self._item_of_row).view(1, -1, *x.shape[2:])
        missing = self.rows - x.shape[1]
        if missing:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
        return x.reshape(1, -1, *x.shape[2:])

    def unpack(self, rows: Tensor) -> Tensor:
        """``(1, B * rows, H, D)`` to ``(B, T, H, D)``."""
        x = rows.unflatten(1, (-1, self.rows))[0]
        if not self.single:
            return _gather(x, self._row_of_item)
        return x[:, : self.items.total].contiguous()

    def placement(self, num_heads: int) -> Placement:
        """Where the heads of each item lie in the rows of a batch of one."""
        return Placement(self._row_of_item.int(), num_heads, num_heads, 0)


class FoldedQueries:
    """Queries that see the same compressed blocks, folded into the heads of their KV head.

    All queries with the same ``(t + 1 - l) // d`` see the same complete blocks. Row ``r`` of a
    sequence holds the ``d`` queries that see exactly the blocks ``0 .. r``, so that the
    complete-block rule is the causal mask of a sequence of ``N_cmp`` rows. Queries that see no
    block are left out. With started blocks row ``r`` holds the queries with ``t // d == r``, in
    ``N_cmp + l / d`` rows; the last of them see all blocks.
    """

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        config = geometry.config
        self.size = config.compress_stride
        self.started = config.compressed_visibility == "started"
        # Position of the first query of row 0.
        self.lead = 0 if self.started else config.compress_block_size - 1
        self.extra = extra_rows(config)
        """Rows of a sequence beyond its blocks."""
        counts = geometry.compressed.count + self.extra
        total = geometry.compressed.total + self.extra * len(counts)
        self.rows = Segments(prefix_sum(counts), total)

    @cached_property
    def _token(self) -> Tensor:
        """The token of each row and slot, -1 where there is none: ``(rows, d)``."""
        tokens, rows = self.geometry.tokens, self.rows
        slot = torch.arange(self.size, device=rows.device)
        position = rows.local[:, None] * self.size + self.lead + slot
        real = position < tokens.count[rows.owner, None]
        real &= rows.real[:, None]
        return torch.where(real, tokens.offset[rows.owner, None] + position, -1)

    @cached_property
    def _place(self) -> tuple[Tensor, Tensor]:
        """The row and slot of each token, row -1 where it has none: ``(T,)`` each."""
        tokens = self.geometry.tokens
        position = tokens.local - self.lead
        row = self.rows.offset[tokens.owner] + position // self.size
        return torch.where((position >= 0) & tokens.real, row, -1), position % self.size

    def fold(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """``(B, T, H, D)`` to ``(B, rows, H_kv * d * G, D)``; empty slots are 0."""
        # One row of the gather is a token's group of heads.
        head = torch.arange(num_kv_heads, device=x.device)[:, None]
        token = self._token[:, None]
        index = torch.where(token >= 0, token * num_kv_heads + head, -1)  # (rows, H_kv, d)
        grouped = x.reshape(x.shape[0], -1, 1, x[0, 0].numel() // num_kv_heads)
        folded = _gather(grouped, index.flatten())
        return folded.view(x.shape[0], self.rows.total, -1, x.shape[-1])

    def unfold(self, folded: Tensor, num_kv_heads: int) -> Tensor:
        """``(B, rows, H_kv * d * G, D)`` to ``(B, T, H, D)``; queries left out are 0."""
        row, slot = (x[:, None] for x in self._place)
        head = torch.arange(num_kv_heads, device=folded.device)
        index = (row * num_kv_heads + head) * self.size + slot  # (T, H_kv)
        index = torch.where(row >= 0, index, -1)
        width = folded[0, 0].numel() // (num_kv_heads * self.size)
        grouped = folded.reshape(folded.shape[0], -1, 1, width)
        x = _gather(grouped, index.flatten())
        return x.view(folded.shape[0], len(index), -1, folded.shape[-1])

    def placement(self, num_heads: int, num_kv_heads: int) -> Placement:
        """Where :meth:`fold` puts the heads of each token; queries left out have no place."""
        group = num_heads // num_kv_heads
        row, slot = self._place
        place = torch.where(row >= 0, row * (num_kv_heads * self.size) + slot, -1)
        return Placement(place.int(), group, group, self.size * group)

    def unfold_lse(self, lse: Tensor, num_kv_heads: int) -> Tensor:
        """``(H_kv * d * G, rows)`` to ``(1, H, T)``; undefined for queries left out."""
        row, slot = self._place
        index = slot * self.rows.total + row.clamp(min=0)
        by_head = lse.unflatten(0, (num_kv_heads, self.size, -1)).transpose(1, 2).flatten(2)
        return by_head.index_select(2, index).flatten(0, 1)[None]


def extra_rows(config: NSAConfig) -> int:
    """Rows that :class:`FoldedQueries` has in a sequence beside one for each compressed block."""
    started = config.compressed_visibility == "started"
    return config.compress_block_size // config.compress_stride if started else 0


def num_compressed_bound(length: int, cu_seqlens: Tensor | None, config: NSAConfig) -> int:
    """Compressed blocks in ``length`` tokens of one sequence, or at most so many in packed ones."""
    if cu_seqlens is None:
        return num_compressed_blocks(length, config)
    return length // config.compress_stride


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Items ``index (R,)``, 0 where -1, of every entry of the batch: ``(B, R, H, D)``."""
    return own_kernels.gather_rows(x, over_batch(index, *x.shape[:2]))


def over_batch(index: Tensor, batch: int, stride: int) -> Tensor:
    """Indices into one entry of the batch, -1 for none, as int32 indices into all entries.

    ``(R, ...)`` to ``(B * R, ...)``.
    """
    if batch == 1:
        return index.int()
    offset = torch.arange(batch, device=index.device).view(-1, *(1,) * index.ndim) * stride
    return torch.where(index >= 0, index + offset, -1).flatten(0, 1).int()


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call computes: the sequences of each entry of the batch, and how they lie.

    ``cu_seqlens`` and ``max_seqlen`` are None for batched input, where each entry is one sequence.
    """

    geometry: Geometry
    head_dim: int
    cu_seqlens: Tensor | None
    max_seqlen: int | None

    @property
    def config(self) -> NSAConfig:
        return self.geometry.config

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @cached_property
    def tokens(self) -> AlignedRows:
        """The tokens, aligned to query tiles."""
        return AlignedRows(self.geometry.tokens, self.config.q_tile_size)

    @cached_property
    def folded(self) -> FoldedQueries:
        return FoldedQueries(self.geometry)

    @property
    def in_order(self) -> bool:
        """Whether outputs and gradients of queries are ``(B, T, H, D)`` in every branch.

        Else the compressed and selected branch have them as their kernels do, and the gates read
        them through a :class:`Placement`.
        """
        return not self.packed or self.config.selection == "token"

    def query_rows(self, x: Tensor) -> Tensor:
        """A branch's ``(1, B * rows, H, D)`` as the gates take it."""
        return self.tokens.unpack(x) if self.in_order else x

    def folded_queries(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """A branch's ``(1, rows, H_kv * d * G, D)`` as the gates take it."""
        return self.folded.unfold(x, num_kv_heads) if self.in_order else x

    @cached_property
    def block_start(self) -> Tensor:
        """The first token of each compressed block, -1 for blocks of no sequence, int32."""
        tokens, compressed = self.geometry.tokens, self.geometry.compressed
        stride = self.config.compress_stride
        if compressed.single:
            end, device = compressed.total * stride, self.geometry.device
            return torch.arange(0, end, stride, dtype=torch.int32, device=device)
        start = tokens.offset[compressed.owner] + compressed.local * stride
        return torch.where(compressed.real, start, -1).int()

    @cached_property
    def blocks_of_token(self) -> Tensor:
        """The compressed blocks that each token is in, -1 for none, int32 ``(T, l / d)``."""
        config, tokens, compressed = self.config, self.geometry.tokens, self.geometry.compressed
        # The one that starts last at or before the token, and those before it.
        overlap = config.compress_block_size // config.compress_stride
        earlier = torch.arange(overlap, device=self.geometry.device)
        owner = tokens.owner[:, None]
        local = tokens.local[:, None] // config.compress_stride - earlier
        inside = (local >= 0) & (local < compressed.count[owner])
        return torch.where(inside, compressed.offset[owner] + local, -1).int()

    @property
    def key_block(self) -> int:
        """Keys of one entry of a block list of the selected branch."""
        return choose_key_block(self.config.select_block_size, self.config, self.head_dim)

    @property
    def cmp_key_block(self) -> int:
        """Compressed tokens of one entry of a block list of the sparse compressed branch."""
        return choose_key_block(self.config.cmp_group_size, self.config, self.head_dim)

    @cached_property
    def compressed(self) -> AlignedRows:
        """The compressed tokens, aligned to blocks of the sparse compressed branch."""
        return AlignedRows(self.geometry.compressed, self.cmp_key_block)

    @cached_property
    def tile_key_blocks(self) -> tuple[Tensor, Tensor]:
        """Of each tile's sequence the first key block in the row, and how many there are.

        Int32 ``(tiles,)`` each; tiles of no sequence have none.
        """
        return self._tile_blocks(self.tokens, self.key_block)

    @cached_property
    def tile_cmp_key_blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of compressed tokens, and how many blocks the tile's first query sees whole."""
        geometry = self.geometry
        seen = geometry.num_visible(
            geometry.tile_first, geometry.tiles.owner, self.config.compressed_visibility
        )
        blocks = self._tile_blocks(self.compressed, self.cmp_key_block)
        return *blocks, (seen // self.cmp_key_block).int()

    @cached_property
    def token_blocks(self) -> Callable[[int], TokenBlocks]:
        """Function of the entries of the batch: what each token may attend in token mode."""
        return lru_cache(maxsize=1)(partial(make_token_blocks, self.geometry))

    @cached_property
    def token_tiles(self) -> Callable[[int, int], TokenTiles]:
        """Function of the tokens of a tile and of a chunk: the tiles of the importance kernel."""
        return lru_cache(maxsize=1)(partial(make_token_tiles, self.geometry))

    @cached_property
    def token_candidates(self) -> tuple[Tensor, Tensor]:
        """Each token's own selection block, and how many it may take, int32 ``(T,)`` each."""
        tokens, config = self.geometry.tokens, self.config
        own = tokens.local // config.select_block_size
        count = own + 1 if config.causal else self.geometry.selection.count[tokens.owner]
        return own.int(), torch.where(tokens.real, count, 0).int()

    @cached_property
    def scoring(self) -> Scoring:
        """What each tile may see and take when it selects."""
        return Scoring(self.geometry)

    def _tile_blocks(self, keys: AlignedRows, key_block: int) -> tuple[Tensor, Tensor]:
        tiles = self.geometry.tiles
        if tiles.single:
            count = -(-keys.items.total // key_block)
            return self.scoring.first, torch.full_like(self.scoring.first, count)
        first = keys.segments.offset[tiles.owner] // key_block
        count = -(-keys.items.count[tiles.owner] // key_block)
        return first.int(), torch.where(tiles.real, count, 0).int()

    @property
    def longest(self) -> int:
        """Upper bound of the tokens of a sequence."""
        return self.max_seqlen if self.packed else self.geometry.tokens.total

    @property
    def max_compressed(self) -> int:
        """Upper bound of the compressed tokens of a sequence."""
        return num_compressed_blocks(self.longest, self.config)

    @property
    def max_selection_blocks(self) -> int:
        """Upper bound of the selection blocks of a sequence."""
        return num_selection_blocks(self.longest, self.config)


def choose_key_block(block_size: int, config: NSAConfig, head_dim: int) -> int:
    """Keys of an entry of a block list, for blocks or groups of ``block_size``."""
    # FA4's tiles of 128 keys need as many queries, and channels that fit shared memory.
    wide = block_size % 128 == 0 and config.q_tile_size % 128 == 0
    return 128 if wide and head_dim <= 128 else 64


def num_tiles_bound(length: int, cu_seqlens: Tensor | None, config: NSAConfig) -> int:
    """Query tiles in ``length`` tokens of one sequence, or at most so many in packed ones."""
    if cu_seqlens is None:
        return num_query_tiles(length, config)
    return length // config.q_tile_size + cu_seqlens.shape[0] - 1


def num_units_bound(length: int, cu_seqlens: Tensor | None, config: NSAConfig) -> int:
    """What selects together in ``length`` tokens: the tokens, or the tiles that there may be."""
    token = config.selection == "token"
    return length if token else num_tiles_bound(length, cu_seqlens, config)


def make_plan(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, config) -> Plan:
    """The plan for ``q (B, N, H, D)``, or for packed ``q (1, T, H, D)`` with ``cu_seqlens``.

    Reads the lengths on the host where ``max_seqlen`` is None.
    """
    if cu_seqlens is None:
        # What a plan computes while a graph is captured exists only when the graph is replayed.
        plan = _batched_plan if is_capturing(q) else _cached_batched_plan
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
        return plan(q.shape[1], q.shape[-1], q.device, config, stream)
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    tokens = Segments(cu_seqlens.long(), q.shape[1])
    return Plan(Geometry(tokens, config, exact=False), q.shape[-1], cu_seqlens, max_seqlen)


def _batched_plan(
    length: int, head_dim: int, device: torch.device, config: NSAConfig, _stream: int | None
) -> Plan:
    """Plan of one length; ``_stream`` because its tensors are computed when first used, in order
    with the work of that stream alone."""
    return Plan(Geometry.single(length, device, config), head_dim, None, None)


# Few, because each keeps index tensors as long as the sequence on the device.
_cached_batched_plan = lru_cache(maxsize=8)(_batched_plan)
