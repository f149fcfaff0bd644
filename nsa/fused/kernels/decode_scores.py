"""Decoding's scores of blocks, from what the compressed branch recorded.

A warp has some of the heads, and a lane the blocks of a group of 16 slots. A block's score adds a
warp's heads in order, then the warps, and each head's terms are scaled by powers of two and one
common factor, so equal keys score equally wherever they lie.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import NO_REFERENCE, SLOT_GROUP, DecodeRule
from nsa.fused.hardware import WARP
from nsa.fused.kernels.decode_softmax import power_of_two
from nsa.fused.kernels.hopper import mlir_namedtuple

# Numbers of a 16-byte load.
_FLOATS = 4


@mlir_namedtuple
class RecordTensors(NamedTuple):
    """Flat :class:`nsa.fused.decode_inputs.Records`."""

    sums: cute.Tensor
    carried: cute.Tensor | None
    reference: cute.Tensor


class RecordRows(NamedTuple):
    """Rows of records from ``first`` on, of the ``rows`` of a unit."""

    unit: Int32
    rows: Int32
    first: Int32


class GroupRecords(NamedTuple):
    """What a thread loads of a head and group of slots."""

    own: list[Float32]
    reference: Int32
    carried: Float32 | None
    next_reference: Int32 | None


class BlockScores:
    """Scores of the blocks of ``rule``, over ``heads`` heads, by ``warps`` warps.

    ``record_groups`` groups of slots were recorded together.
    """

    def __init__(self, rule: DecodeRule, heads: int, warps: int, record_groups: int):
        self.rule = rule
        self.heads = heads
        self.record_groups = record_groups
        # Where groups were recorded together, what is loaded as a group is a part of an entry.
        self.entry_blocks = record_groups * rule.group_blocks
        self.each = -(-heads // warps)
        self.is_uneven = self.each * warps != heads

    def load(
        self, records: RecordTensors, groups: Int32, rows: RecordRows, group: Int32, warp: Int32
    ) -> list[GroupRecords]:
        """What was recorded of a group, for the heads of a warp.

        ``groups`` have room in the records of a row. What is added up should be loaded long before.
        """
        loaded = []
        entry, part = group // self.record_groups, group % self.record_groups
        following = cutlass.min(group + 1, groups - 1) // self.record_groups
        for h in range(self.each):
            row = rows.first + cutlass.min(warp * self.each + h, self.heads - 1)
            if self.record_groups == 1:
                first = (Int64(rows.unit) * rows.rows + row) * groups
                own_place, next_place = first + entry, first + following
            else:
                first = Int64(rows.unit) * (groups // self.record_groups)
                own_place, next_place = ((first + x) * rows.rows + row for x in (entry, following))
            own = self._load_sums(records.sums, own_place * self.record_groups + part)
            carried, next_reference = None, None
            if self.rule.carried > 0:
                carried = records.carried[next_place]
                next_reference = records.reference[next_place]
            reference = records.reference[own_place]
            loaded.append(GroupRecords(own, reference, carried, next_reference))
        return loaded

    def block(self, group: Int32, b: int) -> Int32:
        """Block number ``b`` of what is loaded as a group: see ``record_order``."""
        blocks, each = self.rule.group_blocks, self.rule.thread_blocks
        if self.record_groups == 1:
            return group * blocks + b
        place = group % self.record_groups * blocks + b
        thread, within = place // each // self.record_groups, place // each % self.record_groups
        first = group // self.record_groups * self.entry_blocks
        return first + within * blocks + thread * each + b % each

    @cute.jit
    def add_up(
        self, loaded: list[GroupRecords], shared, seen: Int32, group: Int32, warp: Int32
    ) -> cute.Tensor:
        """What the heads of a warp add to the scores of the blocks of a group.

        The token sees the slots below ``seen``. ``shared`` is what :func:`sum_parts` found.
        """
        rule = self.rule
        sReference, sInverse = shared
        blocks = const_expr(rule.group_blocks)
        # Else the next group's slots are in the sums, or the token does not see them.
        carries = (group + 1) * SLOT_GROUP < seen and (group + 1) % self.record_groups == 0
        scores = cute.make_rmem_tensor(blocks, Float32)
        scores.fill(0.0)
        for h in cutlass.range_constexpr(self.each):
            own, reference, carried, next_reference = loaded[h]
            head = warp * self.each + h
            real = head < self.heads
            head = cutlass.min(head, self.heads - 1)
            largest, inverse = sReference[head], sInverse[head]
            if const_expr(self.is_uneven):
                inverse = inverse if real else Float32(0.0)
            factor = power_of_two(reference - largest)
            for b in cutlass.range_constexpr(blocks):
                # Products with powers of two are exact, so that it is all the same which comes
                # first.
                if const_expr(rule.carried > 0 and b == blocks - 1):
                    after = carried * power_of_two(next_reference - largest)
                    value = cute.math.fma(own[b], factor, after if carries else Float32(0.0))
                    scores[b] = cute.math.fma(value, inverse, scores[b])
                else:
                    scores[b] = cute.math.fma(own[b], factor * inverse, scores[b])
        # Blocks of which the token sees nothing score 0.
        for b in cutlass.range_constexpr(blocks):
            block = self.block(group, b)
            scores[b] = scores[b] if block * rule.per_select < seen else Float32(0.0)
        return scores

    def _load_sums(self, mSums: cute.Tensor, group: Int64) -> list[Float32]:
        """The sums of a group of a row; groups are counted over all rows."""
        blocks = self.rule.group_blocks
        width = min(_FLOATS, blocks)
        found = []
        for first in range(0, blocks, width):
            pointer = mSums.iterator + cute.assume(group * blocks + first, divby=width)
            rSums = cute.make_rmem_tensor(width, Float32)
            cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(width)), rSums)
            found += [rSums[i] for i in range(width)]
        return found


@cute.jit
def sum_parts(
    parts, shared, slot: Int32, count: Int32, rows: Int32, first_row: Int64,
    heads: cutlass.Constexpr[int], warps: cutlass.Constexpr[int], tidx: Int32,
):  # fmt: skip
    """Largest reference of each head, and the inverse of its sum of exponentials, to ``shared``.

    ``parts`` are flat :class:`nsa.fused.decode_inputs.Parts`; there are ``count`` from ``slot``.
    """
    _, mReference, mTotal = parts
    sReference, sInverse = shared
    warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
    number = const_expr(-(-heads // warps))
    largest = cute.make_rmem_tensor(number, Int32)
    largest.fill(NO_REFERENCE)
    total = cute.make_rmem_tensor(number, Float32)
    total.fill(0.0)
    for i in cutlass.range(lane, count, WARP, unroll=1):
        place = Int64(slot + i) * rows + first_row
        # All loads before the first use, so that they are under way together.
        loaded = []
        for h in cutlass.range_constexpr(number):
            head = cutlass.min(warp + h * warps, heads - 1)
            loaded.append((mReference[place + head], mTotal[place + head]))
        for h in cutlass.range_constexpr(number):
            reference, part = loaded[h]
            higher = cutlass.max(largest[h], reference)
            total[h] = total[h] * power_of_two(largest[h] - higher)
            total[h] = total[h] + part * power_of_two(reference - higher)
            largest[h] = higher
    # A lane has what it stores of one head.
    own, own_sum = Int32(NO_REFERENCE), Float32(0.0)
    for h in cutlass.range_constexpr(number):
        highest = cute.arch.warp_redux_sync(largest[h], "max")
        scaled = total[h] * power_of_two(largest[h] - highest)
        whole = cute.arch.warp_reduction_sum(scaled)
        own = highest if lane == h else own
        own_sum = whole if lane == h else own_sum
    head = warp + lane * warps
    if lane < number and head < heads:
        sReference[head] = own
        sInverse[head] = 1.0 / own_sum if own_sum != 0.0 else Float32(0.0)
