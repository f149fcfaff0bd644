"""The plain data that the kernels of decoding get, and the sizes of what they exchange.

*Stride slots.* A compressed block is complete with the last token of a stride of ``d`` tokens, and
lies in the slot of that stride: block ``j`` in slot ``j + o`` of its sequence, where ``o = l/d -
1``. The first ``o`` slots of a sequence are never used. A query at position ``t`` sees the slots
``o <= slot < (t + 1) // d``.

*Units and parts.* A unit is a sequence, a KV head and up to :attr:`DecodeShape.unit_tokens` of the
new tokens. The compressed branch takes the tiles of 64 slots of all units one after another, and
each CTA an equal share of them. What a CTA has of a unit is a part, in slot ``CTA + unit``.
"""

from typing import NamedTuple

from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.hardware import SHARED_BYTES

TILE_KEYS = 64
"""Keys of a tile."""

SLOT_GROUP = 16
"""Slots of a group, whose sums are recorded relative to one reference."""

UNIT_ROWS = 128
"""The most query rows of a unit: heads of a KV head times tokens."""

MAX_TOKENS = 8
"""The most new tokens of a sequence that decode together."""

MAX_LISTED = 64
"""The most blocks that a token selects."""

LEAST_SHARE = 2
"""The least tiles that a CTA of the compressed branch takes if half of the CTAs then suffice,
because each part must be added up."""

MAX_UNITED = 128
"""The most blocks that the tokens of a unit select, where a CTA attends them together."""

CLUSTERS = (1, 2, 4, 8)
"""CTAs that may share a list of the selected branch."""

NO_REFERENCE = -(1 << 30)
"""The reference of a row that has seen no key."""


class Pool(NamedTuple):
    """Keys ``(pages, rows, H_kv, D)`` and values ``(pages, rows, H_kv, Dv)`` in pages.

    Channels must be adjacent; other strides are free.
    """

    k: Tensor
    v: Tensor


class DecodeRule(NamedTuple):
    """The part of the configuration that the kernels are compiled for.

    Args:
        compress_size: tokens of a compressed block.
        stride: tokens from one compressed block to the next.
        select_size: tokens of a selection block.
    """

    compress_size: int
    stride: int
    select_size: int

    @classmethod
    def of(cls, config: NSAConfig) -> "DecodeRule":
        return cls(config.compress_block_size, config.compress_stride, config.select_block_size)

    @property
    def per_select(self) -> int:
        """Strides of a selection block."""
        return self.select_size // self.stride

    @property
    def carried(self) -> int:
        """Strides by which a compressed block begins before its last one: ``o``."""
        return self.compress_size // self.stride - 1

    @property
    def group_blocks(self) -> int:
        """Selection blocks of a group of slots."""
        return SLOT_GROUP // self.per_select

    @property
    def thread_blocks(self) -> int:
        """Blocks of a group of which a thread has all of its 4 slots, 1 if threads share them."""
        return max(1, 4 // self.per_select)


class TileRule(NamedTuple):
    """The part of the configuration that the selection of tile mode is compiled for.

    Args:
        compress_size: tokens of a compressed block.
        select_size: tokens of a selection block.
    """

    compress_size: int
    select_size: int

    @property
    def per_select(self) -> int:
        """Compressed blocks of a selection block."""
        return self.select_size // self.compress_size


class TileLists(NamedTuple):
    """Where tile mode's lists lie: tile ``u`` of a sequence at slot ``u % tile_slots``.

    Args:
        blocks: int32 ``(B, tile_slots, H, n)``, contiguous.
        tile_size: queries of a tile.
    """

    blocks: Tensor
    tile_size: int


class DecodeShape(NamedTuple):
    """Sizes of a call, none of which depends on lengths.

    Args:
        batch: sequences.
        tokens: the most new tokens of a sequence.
        kv_heads: KV heads.
        group: query heads of a KV head.
        ctas: CTAs among which the compressed branch is split.
    """

    batch: int
    tokens: int
    kv_heads: int
    group: int
    ctas: int

    @property
    def unit_tokens(self) -> int:
        return min(self.tokens, UNIT_ROWS // self.group)

    @property
    def token_blocks(self) -> int:
        """Units of a sequence and KV head."""
        return -(-self.tokens // self.unit_tokens)

    @property
    def rows(self) -> int:
        """Query rows of a unit: row ``i * group + g`` is head ``g`` of its token ``i``."""
        return self.unit_tokens * self.group

    @property
    def row_groups(self) -> int:
        """The number of groups of 16 rows, rounded up to a power of two."""
        return 1 << max(0, (-(-self.rows // 16) - 1).bit_length())

    @property
    def sequence_units(self) -> int:
        return self.kv_heads * self.token_blocks

    @property
    def units(self) -> int:
        return self.batch * self.sequence_units

    @property
    def whole_units(self) -> int:
        """Units that CTAs of the compressed branch should not share if they can; 0 for none. A unit
        of 64 rows takes long to begin and to end."""
        return self.units if self.row_groups == 4 else 0

    @property
    def part_slots(self) -> int:
        """Parts of the compressed branch: a CTA's in a row, with one more slot for each unit."""
        return self.ctas + self.units


class Schedule(NamedTuple):
    """What :func:`nsa.fused.decode_calls.decode_append` computes on the device.

    Args:
        starts, ends: int32 ``(B,)``, tokens of each sequence without and with the new ones. New
            token ``i`` is at position ``starts + i``; it has no place in the cache, and its output
            no meaning, if that is not below ``ends``.
        tiles: int32 ``(B + 2,)``: tiles in a CTA's share, then the first tile of each sequence's
            units, counted for one unit a sequence, and the number of all. They are the tiles of the
            sequences if all new tokens have a place, so that they follow from the lengths.
    """

    starts: Tensor
    ends: Tensor
    tiles: Tensor


class Parts(NamedTuple):
    """Attention of some rows over parts of their keys.

    Args:
        out: float32 ``(slots, rows, Dv)``: values times exponentials, summed.
        reference: int32 ``(slots, rows)``: exponentials are relative to ``2^reference``.
        total: float32 ``(slots, rows)``: the sum of the exponentials.
    """

    out: Tensor
    reference: Tensor
    total: Tensor


class Records(NamedTuple):
    """What selection needs of the compressed branch.

    An entry is of one group of 16 slots, or of as many as :func:`record_groups` says. Then the rows
    of an entry lie together, so that a warp writes whole sectors of memory: L2 would fetch the
    others. The blocks of an entry are then in :func:`record_order`.

    Args:
        sums: float32 ``(units, rows, blocks)`` or ``(units, entries, rows, blocks of an entry)``:
            of each selection block, the exponentials of the slots of the block times their overlap
            with it, and what slots of the next block in the same entry add.
        carried: float32 ``(units, rows, entries)`` or ``(units, entries, rows)``: what its slots
            add to the block before them.
        reference: int32, as ``carried``: as in :class:`Parts`.
    """

    sums: Tensor
    carried: Tensor
    reference: Tensor


def most_groups(table: Tensor, slots_per_page: int) -> int:
    """Groups of slots of a sequence, in whole tiles."""
    slots = table.shape[1] * slots_per_page
    return -(-slots // TILE_KEYS) * (TILE_KEYS // SLOT_GROUP)


def record_groups(row_groups: int) -> int:
    """Groups of slots that have one record: those of a tile, where a warp has all of them."""
    return TILE_KEYS // SLOT_GROUP if row_groups >= 4 else 1


def record_shapes(
    shape: DecodeShape, rule: DecodeRule, groups: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the sums and of the other records, if a row has ``groups`` groups of slots."""
    of_record = record_groups(shape.row_groups)
    if of_record == 1:
        rows = shape.units, shape.rows
        return (*rows, groups * rule.group_blocks), (*rows, groups)
    entries = shape.units, groups // of_record, shape.rows
    return (*entries, of_record * rule.group_blocks), entries


def num_groups(records: Records, row_groups: int) -> int:
    """Groups of slots for which a row's records have room."""
    of_record = record_groups(row_groups)
    return records.reference.shape[-1 if of_record == 1 else 1] * of_record


def record_order(rule: DecodeRule) -> list[int]:
    """Which block of an entry of several groups is at each place of it.

    A thread has the same blocks of all groups, and stores them together.
    """
    groups, each = TILE_KEYS // SLOT_GROUP, rule.thread_blocks
    threads = rule.group_blocks // each
    return [
        group * rule.group_blocks + thread * each + block
        for thread in range(threads)
        for group in range(groups)
        for block in range(each)
    ]


def most_sharing(group: int) -> int:
    """Tokens that can share their window: those whose ``group`` heads fill 64 query rows."""
    return 4 >> ((-(-group // 16)) - 1).bit_length()


def tile_groups(head_dim: int, head_dim_v: int, row_groups: int) -> int:
    """Warpgroups of a CTA that take its tiles in turn, if one has room for all rows. They hide each
    other's latencies, with one copy of the queries."""
    return 3 if head_dim + head_dim_v <= 256 and row_groups == 4 else 1


def resident_ctas(head_dim: int, head_dim_v: int, row_groups: int) -> int:
    """CTAs of the attention kernels that an SM runs at a time: two hide each other's latencies."""
    return 2 if head_dim + head_dim_v <= 256 and row_groups < 4 else 1


def tile_stages(head_dim: int, head_dim_v: int, row_groups: int, beside: int) -> int:
    """Tiles of a group of warps that takes them in turn with others: those that fit shared memory
    beside the queries and as many other bytes, up to 4."""
    # The hardware uses 1 KiB for each CTA.
    room = (SHARED_BYTES + 1024) // resident_ctas(head_dim, head_dim_v, row_groups) - 1024
    groups = tile_groups(head_dim, head_dim_v, row_groups)
    # Queries; a reference and a sum of each row, for each of the warps that share the keys.
    others = 2 * 16 * row_groups * head_dim + 8 * max(64, 16 * row_groups * groups) + beside
    return min(4, (room - others) // (2 * TILE_KEYS * (head_dim + head_dim_v) * groups))


def can_unite(dims: tuple[int, int], shape: DecodeShape, select_size: int, slots: int) -> bool:
    """Whether a CTA can attend what all tokens of a unit selected, up to ``slots`` blocks each.

    ``dims`` are ``D`` and ``Dv``.
    """
    return (
        shape.row_groups == 4
        and tile_groups(*dims, shape.row_groups) > 1
        and select_size >= TILE_KEYS
        and shape.unit_tokens * slots <= MAX_UNITED
    )


def fits_shared_memory(head_dim: int, head_dim_v: int) -> bool:
    """Whether the attention kernels have the two tiles that they need, for any rows."""
    return all(tile_stages(head_dim, head_dim_v, 1 << i, 4096) >= 2 for i in range(4))
