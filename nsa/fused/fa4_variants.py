"""Which of FlashAttention-4's kernels for SM90 a call needs, and their tiles; imports no FA4.

The tiles follow FA4 4.0.0b36 (``flash_attn/cute/interface.py``), which measured them, at the head
dimensions that :mod:`nsa.fused.constraints` pads to: 64, 96, 128 and 256.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nsa.config import NSAConfig
from nsa.fused.hardware import SHARED_BYTES, WGMMA_ROWS

TALL = 256
"""Queries of a tall tile, see :func:`tall_tile`."""

Window = tuple[int | None, int | None]
"""Keys visible to the left and to the right of a query beside its own; None is no bound."""


class Mask(NamedTuple):
    """The part of a mask that a kernel is compiled for. The bounds of a window are arguments.

    Attributes:
        causal: no key after the query, and no other bound.
        left, right: a window bounds the keys before, or after, the query.
        block_ends: (stride, first): key ``j`` is a block that ends at ``j * stride + first``, and a
            query sees the blocks that end before or at it. No tile is skipped.
        limited: each query has its own limit, and sees the keys before it.
        block_stride: the stride of ``block_ends`` where tiles are skipped; ``first`` is the bound
            on the right, and in backward that on the left is the tiles of queries of a CTA.
    """

    causal: bool = False
    left: bool = False
    right: bool = False
    block_ends: tuple[int, int] | None = None
    limited: bool = False
    block_stride: int | None = None

    @property
    def local(self) -> bool:
        return self.left or self.right

    @property
    def skips_tiles(self) -> bool:
        return self.causal or self.local


# Cached, because the calls of a plan use the same few masks.
@lru_cache(maxsize=64)
def dense_mask(
    causal: bool, window: Window, block_ends: tuple[int, int] | None
) -> tuple[Mask, Window]:
    """The mask of a dense call, and the bounds of the window as the kernels take them."""
    left, right = window
    if block_ends is not None:
        if causal or window != (None, None):
            # FA4 would obey only these in forward, and only the others in backward.
            raise ValueError(
                f"block_ends excludes causal and window_size, got causal={causal} and {window}"
            )
        return Mask(block_ends=block_ends), window
    if causal:
        right = 0
    if left is None and right == 0:
        return Mask(causal=True), (None, None)
    return Mask(left=left is not None, right=right is not None), (left, right)


class Variant(NamedTuple):
    """Everything in a call on which its main kernel depends.

    Attributes:
        dtype: of queries, keys and values.
        head_dim: of queries and keys.
        value_dim: of values.
        group: query heads of a KV head.
        mask: the mask.
        packed: sequences are packed.
        many: there are so many sequences that the kernel looks up where the tiles of each start.
        blocks: (queries, keys) of a block of block lists; None without lists.
        repeated: for q, k, v, and in backward dout, the dimensions of stride 0; empty if no tensor
            has any.
        deterministic: in backward, CTAs add to float32 sums in a fixed order.
        heads_per_cta: in backward, heads that share keys and one CTA; it divides the group.
        near_block: in backward, keys of a block if statistics are by kind of key, else None.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    mask: Mask = Mask()
    packed: bool = False
    many: bool = False
    blocks: tuple[int, int] | None = None
    repeated: tuple[tuple[int, ...], ...] = ()
    deterministic: bool = False
    heads_per_cta: int = 1
    near_block: int | None = None

    @property
    def pack_heads(self) -> bool:
        """Whether a tile of the forward holds the queries of a group's heads. FA4's rule."""
        # Lists are by query head. Packing would read one head's list for the whole group.
        return self.group > 1 and self.blocks is None and self.mask.block_stride is None

    def plain(self) -> "Variant":
        """The fields on which the kernels before and after the main one of a backward depend."""
        return Variant(
            self.dtype, self.head_dim, self.value_dim, 1, packed=self.packed, many=self.many
        )

    @property
    def adds_keys(self) -> bool:
        """Whether CTAs of several heads add to the gradients of one KV head, in float32."""
        return self.group > self.heads_per_cta


def forward_tile(variant: Variant) -> tuple[int, int]:
    """(queries, keys) of a tile of the forward."""
    if variant.blocks is not None:
        if tall_tile(variant):
            return TALL, variant.blocks[1]
        return _sparse_forward_tile(variant.head_dim, *variant.blocks)
    return _measured_tile(variant) or _dense_forward_tile(variant)


def tall_tile(variant: Variant) -> bool:
    """Whether each of two warp groups of the forward has 128 queries.

    They read a block of 64 keys from shared memory once for them, and from L2 once for all 256.
    With a limit of each query, ptxas waits after each matrix instruction.
    """
    if variant.blocks is None or variant.mask.limited or not 96 < variant.head_dim <= 128:
        return False
    return variant.blocks[0] % TALL == 0 and variant.blocks[1] == 64


def forward_stages(variant: Variant) -> int:
    """Tiles of keys, and of values, that shared memory holds in the forward."""
    return 4 if tall_tile(variant) else 2


def values_from_registers(variant: Variant) -> bool:
    """Whether the forward multiplies values by probabilities in registers."""
    return not 64 < variant.head_dim <= 96


def closing_fits(variant: Variant) -> bool:
    """Whether a forward can end with the sum of the branches: TMA loads its queries, and shared
    memory has room for its rows of two more branches and for their gates."""
    if variant.packed or variant.blocks is not None or variant.value_dim != variant.head_dim:
        return False
    (rows, keys), stages = forward_tile(variant), forward_stages(variant)
    elements = (3 * rows + 2 * stages * keys) * variant.head_dim
    if not values_from_registers(variant):
        elements += rows * keys
    # Barriers of 8 bytes, and three gates a row, in whole KiB.
    others = 8 * (4 * stages + 3) + 12 * rows
    fits = 2 * elements + -(-others // 1024) * 1024 <= SHARED_BYTES
    return fits and rows % variant.group == 0 and rows in (2 * WGMMA_ROWS, 3 * WGMMA_ROWS)


def _dense_forward_tile(variant: Variant) -> tuple[int, int]:
    head_dim, mask = variant.head_dim, variant.mask
    if head_dim <= 64:
        return 192, 128
    if head_dim <= 96:
        return 192, 128 if mask.skips_tiles else 144
    if head_dim <= 128:
        return 128, 128
    return 128, 64 if mask.local else 80


def _measured_tile(variant: Variant) -> tuple[int, int] | None:
    """A faster tile than FA4's own 128 by 128; None if FA4's is the best.

    If 192 rows of several heads share a window of some hundred keys, it takes 0.69 ms instead of
    0.82 (32K tokens, H=32, H_kv=8, w=512). With one head, 128 by 128 is faster. The same holds for
    few keys with ``block_ends`` (8K tokens over 127, 0.088 ms instead of 0.094). Without either,
    128 by 160 is faster for folded queries, 14.2 ms instead of 15.4 (256K tokens, l=64), and not
    slower for those that see blocks.
    """
    group, mask = variant.group, variant.mask
    if mask.block_stride is not None and 96 < variant.head_dim <= 128:
        return 128, 160
    if group == 1 or not 96 < variant.head_dim <= 128:
        return None
    if mask.left or mask.block_ends is not None:
        return (192, 80) if 192 % group == 0 else None
    # A window with only a right bound belongs to folded queries with started blocks.
    return None if mask.right else (128, 160)


def _sparse_forward_tile(head_dim: int, query_block: int, key_block: int) -> tuple[int, int]:
    queries = 192 if head_dim <= 96 and query_block % 192 == 0 else 128
    keys = 128 if head_dim <= 128 else 80
    if query_block % queries:
        queries = 64
    tile = queries, min(keys, key_block)
    if query_block % queries or key_block % 64 or key_block != tile[1]:
        raise ValueError(
            f"block lists need blocks of a multiple of 64 queries and of 64 or, up to head "
            f"dimension 128, 128 keys, got {query_block} and {key_block}"
        )
    return tile


def choose_key_block(block_size: int, config: NSAConfig, head_dim: int) -> int:
    """Keys of a key block, for selection blocks or groups of ``block_size``."""
    # Tiles of 128 keys need 128 queries, and a head dimension that fits shared memory.
    wide = block_size % 128 == 0 and config.q_tile_size % 128 == 0
    return 128 if wide and head_dim <= 128 else 64


class BackwardTile(NamedTuple):
    """Tile and pipeline of the backward, in the terms of FA4's ``FlashAttentionBackwardSm90``.

    Attributes:
        queries, keys: queries and keys of a tile.
        stages: pipeline stages in which queries are loaded; ``dout_stages`` are those of dout,
            ``sums_stages`` those of P and dS.
        swap_scores: S and dP are computed transposed; ``swap_keys`` (dK, dV) and ``swap_queries``
            (dQ) likewise.
        key_atoms: warp groups side by side along the keys of dK and dV; ``query_atoms`` along the
            queries of dQ.
        one_group: one warp group computes dQ.
    """

    queries: int
    keys: int
    stages: int = 2
    dout_stages: int = 2
    sums_stages: int = 2
    swap_scores: bool = True
    swap_keys: bool = False
    swap_queries: bool = False
    key_atoms: int = 2
    query_atoms: int = 1
    one_group: bool = False

    @property
    def channels(self) -> int:
        """The channels of float32 sums are rounded up to a multiple of this."""
        return 64 if self.swap_keys else 32


def backward_tile(variant: Variant) -> BackwardTile:
    """Tile and pipeline of the backward."""
    tile = _backward_tile(variant)
    if variant.blocks is not None:
        query_block, key_block = variant.blocks
        if query_block % tile.queries or key_block != tile.keys:
            raise ValueError(
                f"block lists in backward need blocks of a multiple of {tile.queries} queries and "
                f"of {tile.keys} keys at head dimension {variant.head_dim}, got {query_block} and "
                f"{key_block}"
            )
    return tile


def _backward_tile(variant: Variant) -> BackwardTile:
    head_dim, blocks = variant.head_dim, variant.blocks
    if head_dim <= 64:
        return BackwardTile(128, 128, query_atoms=2)
    if head_dim <= 96:
        return BackwardTile(64, 128, one_group=True)
    if head_dim <= 128:
        wide = not variant.mask.skips_tiles and (blocks is None or blocks[0] % 80 == 0)
        return BackwardTile(80, 128, swap_queries=True) if wide else BackwardTile(64, 128)
    narrow: dict[str, Any] = dict(dout_stages=1, sums_stages=1, swap_scores=False, key_atoms=1)
    if blocks is not None:
        return BackwardTile(64, 64, stages=1, **narrow)
    return BackwardTile(64, 48, swap_keys=True, **narrow)


class SumsOrder(NamedTuple):
    """Where a backward that skips tiles has the float32 gradients of a head's queries.

    Tiles of ``rows`` queries follow one another. A tile has a part for each warp group that
    computes it, of 64 rows and ``columns`` channels: all channels of 64 rows, or some of all rows.
    In a part, the 8 columns from ``8 * j`` on of 64 rows lie together, those of 16 rows after one
    another. There, for each of 8 rows ``r`` and 4 pairs ``c`` of columns, are two neighbours of row
    ``r`` and those of row ``r + 8``.
    """

    rows: int
    columns: int


@lru_cache(maxsize=None)
def sums_order(head_dim: int) -> SumsOrder:
    """That of all masks that skip tiles, without lists."""
    causal = Mask(causal=True)
    tile = backward_tile(Variant(torch.bfloat16, head_dim, head_dim, 1, causal))
    groups = 1 if tile.one_group else 2
    return SumsOrder(tile.queries, head_dim * tile.query_atoms // groups)
