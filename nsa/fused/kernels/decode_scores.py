"""Decoding's scores of blocks, from what the compressed branch recorded.

A warp has some of the heads, and a lane the blocks of a group of 16 slots. A block's score adds a
warp's heads in order, then the warps, and each head's terms are scaled by powers of two and one
common factor, so equal keys score equally wherever they lie.
"""

import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import NO_REFERENCE, SLOT_GROUP, DecodeRule, record_groups
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
    """Scores of the blocks of ``rule``, over ``heads`` heads, by ``warps`` warps."""

    record_groups = 1

    def __init__(self, rule: DecodeRule, heads: int, warps: int):
        self.rule = rule
        self.heads = heads
        self.warps = warps
        self.entry_blocks = self.record_groups * rule.group_blocks
        self.each = -(-heads // warps)
        self.is_uneven = self.each * warps != heads

    def load(
        self, records: RecordTensors, groups: Int32, rows: RecordRows, group: Int32, warp: Int32
    ) -> list[GroupRecords]:
        """What was recorded of a group, for the heads of a warp.

        ``groups`` have room in the records of a row. What is added up should be loaded long before.
        """
        loaded = []
        following = cutlass.min(group + 1, groups - 1)
        for h in range(self.each):
            row = rows.first + cutlass.min(warp * self.each + h, self.heads - 1)
            first = (Int64(rows.unit) * rows.rows + row) * groups
            place = (first + group) * self.rule.group_blocks
            own = load_adjacent(records.sums, place, self.rule.group_blocks)
            carried, next_reference = None, None
            if self.rule.carried > 0:
                carried = records.carried[first + following]
                next_reference = records.reference[first + following]
            reference = records.reference[first + group]
            loaded.append(GroupRecords(own, reference, carried, next_reference))
        return loaded

    def block(self, group: Int32, b: int) -> Int32:
        """Block number ``b`` of a group."""
        return group * self.rule.group_blocks + b

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
        # Else the token does not see the next group's slots.
        carries = (group + 1) * SLOT_GROUP < seen
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
        self._clear_unseen(scores, seen, group)
        return scores

    @cute.jit
    def _clear_unseen(self, scores: cute.Tensor, seen: Int32, group: Int32):
        """Blocks of which the token sees nothing score 0."""
        for b in cutlass.range_constexpr(self.rule.group_blocks):
            is_seen = self.block(group, b) * self.rule.per_select < seen
            scores[b] = scores[b] if is_seen else Float32(0.0)


class EntryScores(BlockScores):
    """The same where the groups of an entry were recorded together, relative to one reference.

    What is loaded as a group is then a part of an entry. How an entry's sums are scaled is
    computed once, for all parts.
    """

    record_groups = record_groups(4)

    def __init__(self, rule: DecodeRule, heads: int, warps: int):
        super().__init__(rule, heads, warps)
        # Heads whose records are loaded together.
        self.adjacent = 1 if self.is_uneven else math.gcd(self.each, _FLOATS)

    def tables(self, memory: cute.Pointer, entries: int) -> tuple[cute.Tensor, cute.Tensor]:
        """Room for :meth:`tabulate`: ``2 * entries * heads`` numbers."""
        layout = cute.make_layout((entries, self.heads), stride=(self.heads, 1))
        return cute.make_tensor(memory, layout), cute.make_tensor(
            memory + entries * self.heads, layout
        )

    @cute.jit
    def tabulate(
        self, records: RecordTensors, groups: Int32, rows: RecordRows, tables, shared,
        seen: Int32, first: Int32, number: Int32, tidx: Int32,
    ):  # fmt: skip
        """For ``number`` entries from ``first`` on, and each head: the factor of its sums, and what
        the next entry adds to its last block."""
        sFactor, sAfter = tables
        sReference, _ = shared
        pieces = const_expr(self.heads // self.adjacent)
        entries = groups // self.record_groups
        for i in cutlass.range(tidx, number * pieces, self.warps * WARP, unroll=1):
            place, head = i // pieces, i % pieces * self.adjacent
            entry = first + place
            own_row, next_row = (
                (Int64(rows.unit) * entries + cutlass.min(x, entries - 1)) * rows.rows
                + (rows.first + head)
                for x in (entry, entry + 1)
            )
            own = load_adjacent(records.reference, own_row, self.adjacent)
            # Else the token does not see the next entry's slots.
            carries = (entry + 1) * (self.record_groups * SLOT_GROUP) < seen
            if const_expr(self.rule.carried > 0):
                carried = load_adjacent(records.carried, next_row, self.adjacent)
                references = load_adjacent(records.reference, next_row, self.adjacent)
                for h in cutlass.range_constexpr(self.adjacent):
                    after = carried[h] * power_of_two(references[h] - sReference[head + h])
                    sAfter[place, head + h] = after if carries else Float32(0.0)
            for h in cutlass.range_constexpr(self.adjacent):
                sFactor[place, head + h] = power_of_two(own[h] - sReference[head + h])

    def load(
        self, records: RecordTensors, groups: Int32, rows: RecordRows, group: Int32, warp: Int32
    ) -> list[list[Float32]]:
        """The sums of a part of an entry, for the heads of a warp."""
        entry, part = group // self.record_groups, group % self.record_groups
        row = (Int64(rows.unit) * (groups // self.record_groups) + entry) * rows.rows
        row += rows.first + warp * self.each
        place = row * self.entry_blocks + part * self.rule.group_blocks
        last = self.heads - 1 - warp * self.each
        return [
            load_adjacent(
                records.sums,
                place + (cutlass.min(h, last) if self.is_uneven else h) * self.entry_blocks,
                self.rule.group_blocks,
            )
            for h in range(self.each)
        ]

    def block(self, group: Int32, b: int) -> Int32:
        """Block number ``b`` of a part of an entry: see ``record_order``."""
        blocks, each = self.rule.group_blocks, self.rule.thread_blocks
        place = group % self.record_groups * blocks + b
        thread, within = place // each // self.record_groups, place // each % self.record_groups
        first = group // self.record_groups * self.entry_blocks
        return first + within * blocks + thread * each + b % each

    @cute.jit
    def add_up_tabulated(
        self, loaded: list[list[Float32]], tables, shared, seen: Int32, group: Int32,
        entry: Int32, warp: Int32,
    ) -> cute.Tensor:  # fmt: skip
        """:meth:`add_up`, of a part of entry number ``entry`` of the tables."""
        sFactor, sAfter = tables
        _, sInverse = shared
        blocks, adjacent = const_expr(self.rule.group_blocks), const_expr(self.adjacent)
        # Else the next slots are in the sums.
        is_last = (group + 1) % self.record_groups == 0
        scores = cute.make_rmem_tensor(blocks, Float32)
        scores.fill(0.0)
        for h in cutlass.range_constexpr(self.each):
            head = warp * self.each + h
            real = head < self.heads
            head = cutlass.min(head, self.heads - 1) if const_expr(self.is_uneven) else head
            inverse = sInverse[head]
            if const_expr(self.is_uneven):
                inverse = inverse if real else Float32(0.0)
            if const_expr(h % adjacent == 0):
                place = entry * self.heads + head
                factors = load_adjacent(sFactor, place, adjacent)
                if const_expr(self.rule.carried > 0):
                    afters = load_adjacent(sAfter, place, adjacent)
            factor = factors[h % adjacent]
            for b in cutlass.range_constexpr(blocks):
                # Products with powers of two are exact, so that it is all the same which comes
                # first.
                if const_expr(self.rule.carried > 0 and b == blocks - 1):
                    after = afters[h % adjacent] if is_last else Float32(0.0)
                    value = cute.math.fma(loaded[h][b], factor, after)
                    scores[b] = cute.math.fma(value, inverse, scores[b])
                else:
                    scores[b] = cute.math.fma(loaded[h][b], factor * inverse, scores[b])
        self._clear_unseen(scores, seen, group)
        return scores


def load_adjacent(mX: cute.Tensor, first: Int32 | Int64, count: int) -> list:
    """``count`` numbers from ``first`` on, which is a multiple of it, up to 4 at a time."""
    width = min(_FLOATS, count)
    found = []
    for offset in range(0, count, width):
        pointer = mX.iterator + cute.assume(first + offset, divby=width)
        rX = cute.make_rmem_tensor(width, mX.element_type)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(width)), rX)
        found += [rX[i] for i in range(width)]
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
