"""What the compressed branch records for the selection: sums of exponentials of blocks."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import DecodeRule, record_groups
from nsa.fused.hardware import QUAD
from nsa.fused.kernels.decode_pages import store_kept
from nsa.fused.kernels.decode_tiles import TileAttention

# Numbers of a 16-byte store.
_FLOATS = 4


class BlockRecorder:
    """Records of the blocks of ``rule``, of the slots that the warps of ``attention`` have."""

    def __init__(self, attention: TileAttention, rule: DecodeRule):
        self.attention = attention
        self.rule = rule
        # A warp that has all slots of a tile records them together.
        self.record_groups = record_groups(attention.row_groups)
        # Blocks of which a thread has all slots, or threads that share a block.
        self.thread_blocks = rule.thread_blocks
        self.block_threads = max(1, rule.per_select // 4)

    @cute.jit
    def record(
        self, tensors, groups: Int32, accs, r: cutlass.Constexpr[int], reference: Int32,
        unit: Int32, rows: Int32, row: Int32, first_group: Int32, lane: Int32,
    ):  # fmt: skip
        """Record the exponentials of a row and the warp's slots of a tile.

        ``tensors`` has the flat records, with room for ``groups`` groups of slots in a row.
        Row ``row`` is one of the ``rows`` of a unit, or none of them.
        The first of the warp's groups of 16 slots is ``first_group``. Its others are the next ones
        where they are recorded together, else ``key_groups`` apart.
        """
        rule, together = self.rule, const_expr(self.record_groups > 1)
        t, threads = lane % QUAD, const_expr(self.block_threads)
        own, back = [], []
        for u in cutlass.range_constexpr(self.attention.units):
            own_sums, back_sums = self._weigh(accs[u], r, t)
            own.append(own_sums)
            back.append(back_sums)
        for u in cutlass.range_constexpr(self.attention.units):
            # What the first slots of the next block add: of this thread, of the next, or of the
            # next group.
            for block in cutlass.range_constexpr(self.thread_blocks - 1):
                own[u][block] = own[u][block] + back[u][block + 1]
            if const_expr(rule.carried > 0):
                after = Float32(0.0)
                if const_expr(together and u + 1 < self.attention.units):
                    after = back[u + 1][0]
                given = after if t < threads else back[u][0]
                source = (lane & ~(QUAD - 1)) | ((t + threads) % QUAD)
                own[u][-1] = own[u][-1] + cute.arch.shuffle_sync(given, source)
        if row < rows:
            if const_expr(together):
                entry = Int64(unit) * (groups // self.record_groups)
                entry = (entry + first_group // self.record_groups) * rows + row
                if const_expr(threads == 1) or t % threads == 0:
                    self._store_together(tensors.sums, own, entry, t // threads)
                if t == 0:
                    tensors.references[entry] = reference
                    if const_expr(rule.carried > 0):
                        tensors.carried[entry] = back[0][0]
            else:
                first = (Int64(unit) * rows + row) * groups
                for u in cutlass.range_constexpr(self.attention.units):
                    group = first + (first_group + u * self.attention.key_groups)
                    if const_expr(threads == 1) or t % threads == 0:
                        place = group * rule.group_blocks + t // threads * self.thread_blocks
                        for block in cutlass.range_constexpr(self.thread_blocks):
                            tensors.sums[place + block] = own[u][block]
                    if t == 0:
                        tensors.references[group] = reference
                        if const_expr(rule.carried > 0):
                            tensors.carried[group] = back[u][0]

    @cute.jit
    def _store_together(self, mSums: cute.Tensor, own, entry: Int64, thread: Int32):
        """Store a thread's sums of all groups of an entry, 16 bytes at a time.

        L2 is to keep them until they are read: they are more than it keeps else.
        """
        sums = [x for of_group in own for x in of_group]
        place = entry * (self.record_groups * self.rule.group_blocks) + thread * len(sums)
        for first in cutlass.range_constexpr(0, len(sums), _FLOATS):
            pointer = mSums.iterator + (place + first)
            store_kept(pointer, *sums[first : first + _FLOATS])

    @cute.jit
    def _weigh(self, acc: cute.Tensor, r: cutlass.Constexpr[int], t: Int32):
        """Sums of 16 exponentials of a row, for each block of which the thread has slots.

        First each times its overlap with its own block, then with the one before it, in strides.
        """
        size = const_expr(4 // self.thread_blocks)
        own, back = [], []
        for block in cutlass.range_constexpr(self.thread_blocks):
            own_sum, back_sum = Float32(0.0), Float32(0.0)
            for i in cutlass.range_constexpr(size):
                q = block * size + i
                power = acc[q % 2 + 2 * r + 4 * (q // 2)]
                if const_expr(self.block_threads == 1):
                    own_sum = own_sum + float(min(i, self.rule.carried) + 1) * power
                    if const_expr(i < self.rule.carried):
                        back_sum = back_sum + float(self.rule.carried - i) * power
                else:
                    place = t % self.block_threads * 4 + i
                    weight = Float32(cutlass.min(place, self.rule.carried) + 1)
                    own_sum = own_sum + weight * power
                    weight = Float32(cutlass.max(self.rule.carried - place, 0))
                    back_sum = back_sum + weight * power
            stride = 1
            while const_expr(stride < self.block_threads):
                own_sum = own_sum + cute.arch.shuffle_sync_bfly(own_sum, offset=stride)
                back_sum = back_sum + cute.arch.shuffle_sync_bfly(back_sum, offset=stride)
                stride *= 2
            own.append(own_sum)
            back.append(back_sum)
        return own, back
