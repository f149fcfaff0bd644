"""How the importance kernel's work is laid out: what it is compiled for, its tiles of tokens.

Plain numbers and tensors, which selection needs before it calls the kernel
(:mod:`nsa.fused.kernels.importance`).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import Geometry, covered_tokens, locate_items, overlap_weights, prefix_sum
from nsa.config import NSAConfig

MAX_GROUP = 32
"""The most query heads of a KV head: they share a thread's columns."""

ROWS = 64
"""Compressed tokens of a tile: the rows of wgmma."""

LANES = 4
"""Lanes of a warp that hold different columns of a row."""

WARPGROUPS = 2
"""Warpgroups of a CTA that have queries."""

TILE_FIELDS = 6
"""Of a tile of tokens, see :class:`TokenTiles`."""

PITCH = 74
"""Words from token to token of the sums in shared memory. With a word skipped after 32 rows, and 10
modulo 32, both the stores (8 rows by 4 tokens of a warp) and the loads (every 4th row) use all
banks."""

_SHARED_BYTES = 227 * 1024


class Rule(NamedTuple):
    """What of a configuration the kernel is compiled for. Sizes are in tokens."""

    block_size: int
    stride: int
    select_size: int
    covered: int
    causal: bool

    @classmethod
    def of(cls, config: NSAConfig) -> "Rule":
        return cls(
            config.compress_block_size,
            config.compress_stride,
            config.select_block_size,
            covered_tokens(config, config.compressed_visibility),
            config.causal,
        )

    @property
    def per_select(self) -> int:
        return self.select_size // self.stride

    @property
    def per_compress(self) -> int:
        return self.block_size // self.stride

    @property
    def rows(self) -> int:
        """Compressed tokens from tile to tile: whole selection blocks."""
        return ROWS // self.per_select * self.per_select

    @property
    def carried(self) -> int:
        """Compressed tokens before a selection block that overlap it."""
        return self.per_compress - 1

    def weights(self) -> list[int]:
        config = NSAConfig(
            selection="token",
            compress_block_size=self.block_size,
            compress_stride=self.stride,
            select_block_size=self.select_size,
        )
        return overlap_weights(config)


class Shape(NamedTuple):
    """How a CTA's queries lie.

    ``tokens`` a lane in a unit, in ``columns`` columns of the unit, at most 128; ``parts`` units
    side by side for a warpgroup; ``stages`` tiles of compressed keys.
    """

    tokens: int
    columns: int
    parts: int
    stages: int

    @property
    def unit_tokens(self) -> int:
        return LANES * self.tokens

    @property
    def tile_tokens(self) -> int:
        return WARPGROUPS * self.parts * self.unit_tokens

    @property
    def lse_pitch(self) -> int:
        # 16 bytes more than a multiple: the four lanes' loads of 16 bytes meet different banks.
        per_lane = self.columns // LANES
        return -(-per_lane // 32) * 32 + 4


@functools.lru_cache(maxsize=None)
def choose_shape(head_dim: int, group: int) -> Shape:
    """The largest shape that fits shared memory with keys loaded ahead."""
    for per_lane, parts in ((32, 2), (32, 1), (16, 2), (16, 1)):
        tokens = max(1, per_lane // group)
        columns = LANES * (-(-tokens * group // 2) * 2)
        shape = Shape(tokens, columns, parts, 0)
        stages = (_SHARED_BYTES - _bytes_but_keys(shape, head_dim)) // (ROWS * head_dim * 2)
        # Without parts side by side two tiles are in use at a time.
        if stages >= (3 if parts == 2 else 4):
            return shape._replace(stages=min(stages, 5))
    # Two at the least, at the largest head size and group.
    return shape._replace(stages=stages)


def _bytes_but_keys(shape: Shape, head_dim: int) -> int:
    """Shared memory of all but the tiles of compressed keys, alignment included."""
    units = WARPGROUPS * shape.parts
    queries = units * shape.columns * head_dim * 2
    sums = WARPGROUPS * 2 * shape.unit_tokens * PITCH * 4
    lse = units * LANES * shape.lse_pitch * 4
    bounds = 2 * shape.tile_tokens * 4
    return queries + sums + lse + bounds + 4096


class TokenTiles(NamedTuple):
    """The tokens of an entry of the batch, in tiles that do not mix sequences.

    Args:
        fields: int32 ``(tiles, 6)``: of each tile its first token, that token's position in the
            sequence, the number of tokens, then of the sequence the first compressed token, how
            many there are, and the number of selection blocks. Tiles past the last have no token.
        first: int32 ``(chunks,)``, the first tile with tokens of each chunk.
        chunk: tokens of a chunk.
        grid: an upper bound of the tiles with tokens of a chunk.
    """

    fields: Tensor
    first: Tensor
    chunk: int
    grid: int


def make_token_tiles(geometry: Geometry, tile_tokens: int, chunk: int) -> TokenTiles:
    """Tiles of ``tile_tokens`` tokens at most, for chunks of ``chunk`` tokens. No host sync."""
    tokens = geometry.tokens
    sequences = len(tokens.count)
    total = tokens.total // tile_tokens + sequences
    offset = prefix_sum(-(-tokens.count // tile_tokens))
    owner, index = locate_items(offset, total)
    position = index * tile_tokens
    start = tokens.offset[owner] + position
    count = (tokens.count[owner] - position).clamp(0, tile_tokens)
    compressed, selection = geometry.compressed, geometry.selection
    fields = torch.stack(
        [
            start,
            position,
            count,
            compressed.offset[owner],
            compressed.count[owner],
            selection.count[owner],
        ],
        dim=1,
    ).int()
    chunks = torch.arange(0, max(1, tokens.total), chunk, device=start.device)
    first = torch.searchsorted(start + count, chunks, right=True).int()
    return TokenTiles(fields, first, chunk, min(total, chunk // tile_tokens + sequences + 1))
