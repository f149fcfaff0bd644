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
from nsa.fused.kernels.decode_tiles import power_of_two
from nsa.fused.kernels.hopper import mlir_namedtuple

# The most heads whose records a thread loads together.
_HEADS = 8
# Numbers of a 16-byte load.
_FLOATS = 4


@mlir_namedtuple
class RecordTensors(NamedTuple):
    """Flat :class:`nsa.fused.decode_inputs.Records`."""

    sums: cute.Tensor
    carried: cute.Tensor | None
    reference: cute.Tensor


class BlockScores:
    """Scores of the blocks of ``rule``, over ``heads`` heads, by ``warps`` warps."""

    def __init__(self, rule: DecodeRule, heads: int, warps: int):
        self.rule = rule
        self.heads = heads
        self.each = -(-heads // warps)
        self.is_uneven = self.each * warps != heads

    @cute.jit
    def of_group(
        self, records: RecordTensors, groups: Int32, record_row: Int64, shared, seen: Int32,
        group: Int32, warp: Int32,
    ) -> cute.Tensor:  # fmt: skip
        """What the heads of a warp add to the scores of the blocks of a group.

        The token sees the slots below ``seen``. ``shared`` is what :func:`sum_parts` found;
        ``groups`` have room in the records of a row.
        """
        rule = self.rule
        sReference, sInverse = shared
        blocks = const_expr(rule.group_blocks)
        following = cutlass.min(group + 1, groups - 1)
        carries = (group + 1) * SLOT_GROUP < seen
        scores = cute.make_rmem_tensor(blocks, Float32)
        scores.fill(0.0)
        for first in cutlass.range_constexpr(0, self.each, _HEADS):
            # All loads before the first use, so that they are under way together.
            loaded = []
            for h in cutlass.range_constexpr(first, min(first + _HEADS, self.each)):
                head = warp * self.each + h
                real = head < self.heads
                head = cutlass.min(head, self.heads - 1)
                row = (record_row + head) * groups
                own = self._load_sums(records.sums, row + group)
                reference = records.reference[row + group]
                carried, next_reference = None, None
                if const_expr(rule.carried > 0):
                    carried = records.carried[row + following]
                    next_reference = records.reference[row + following]
                loaded.append((head, real, own, reference, carried, next_reference))
            for h in cutlass.range_constexpr(len(loaded)):
                head, real, own, reference, carried, next_reference = loaded[h]
                largest, inverse = sReference[head], sInverse[head]
                factor = power_of_two(reference - largest)
                for b in cutlass.range_constexpr(blocks):
                    value = own[b] * factor
                    if const_expr(rule.carried > 0 and b == blocks - 1):
                        carried = carried * power_of_two(next_reference - largest)
                        value = value + (carried if carries else Float32(0.0))
                    value = value * inverse
                    if const_expr(self.is_uneven):
                        value = value if real else Float32(0.0)
                    scores[b] = scores[b] + value
        # Blocks of which the token sees nothing score 0.
        for b in cutlass.range_constexpr(blocks):
            block = group * blocks + b
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
    for h in cutlass.range_constexpr(number):
        head = warp + h * warps
        highest = cute.arch.warp_redux_sync(largest[h], "max")
        scaled = total[h] * power_of_two(largest[h] - highest)
        whole = cute.arch.warp_reduction_sum(scaled)
        if lane == 0 and head < heads:
            sReference[head] = highest
            sInverse[head] = 1.0 / whole if whole != 0.0 else Float32(0.0)
