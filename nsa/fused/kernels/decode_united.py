"""The lists of a unit's tokens as one: each block that any of them selected, and by which."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from nsa.fused.decode_inputs import MAX_UNITED
from nsa.fused.kernels.decode_pages import PagedTensors
from nsa.fused.kernels.decode_schedule import divide

# Behind all blocks, of which the last one comes first.
_NO_BLOCK = -1


class UnitedLists:
    """Lists of blocks of ``select_size`` keys, united by ``threads`` threads, which meet at the
    named barrier ``barrier``."""

    def __init__(self, select_size: int, threads: int, barrier: int):
        self.select_size = select_size
        self.threads = threads
        self.barrier = barrier

    def allocate(self, smem) -> tuple[cute.Tensor, ...]:
        """(Blocks, their tokens, a bit each, their pages, their rows there) in shared memory, and
        room to find them: :data:`MAX_UNITED` numbers each, six in all."""
        layout = cute.make_layout(MAX_UNITED)
        return tuple(smem.allocate_tensor(Int32, layout, 16) for _ in range(6))

    @cute.jit
    def unite(
        self, mBlocks: cute.Tensor, sizes, shared, pages: PagedTensors, unit, position,
        tidx: Int32,
    ) -> Int32:  # fmt: skip
        """Write the blocks, the last one first; returns how many there are.

        ``unit`` names tokens, whose ``position(token)`` no block of their list is past.
        """
        sBlock, sSelectors, sPage, sRow, sEntry, sFirst = shared
        tokens = unit.last_token + 1 - unit.token0
        entries = tokens * sizes.slots
        token, slot = divide(tidx, sizes.slots)
        block = Int32(_NO_BLOCK)
        if tidx < entries:
            row = Int64(unit.row0 + unit.token0 + token) * sizes.kv_heads + unit.kv_head
            found = mBlocks[row * sizes.slots + slot]
            # A list may name a block that starts past the token. It has no page perhaps.
            if found >= 0 and found * self.select_size <= position(unit.token0 + token):
                block = found
            sEntry[tidx] = block
        self._meet()
        # Tokens that have the block, and whether no entry before this one has it.
        selectors, is_first = Int32(0), block != Int32(_NO_BLOCK)
        for other in cutlass.range(tokens, unroll=1):
            for s in cutlass.range(sizes.slots, unroll=8):
                entry = other * sizes.slots + s
                same = sEntry[entry] == block
                selectors = selectors | ((Int32(1) << other) if same else Int32(0))
                is_first = is_first and not (same and entry < tidx)
        if tidx < entries:
            sFirst[tidx] = block if is_first else Int32(_NO_BLOCK)
        self._meet()
        place, count = Int32(0), Int32(0)
        for entry in cutlass.range(entries, unroll=8):
            other = sFirst[entry]
            place += Int32(1) if other > block else Int32(0)
            count += Int32(1) if other != Int32(_NO_BLOCK) else Int32(0)
        if is_first and tidx < entries:
            index, row = divide(block * self.select_size, pages.page_rows)
            sBlock[place] = block
            sSelectors[place] = selectors
            sPage[place] = pages.table[Int64(unit.sequence) * pages.max_pages + index]
            sRow[place] = row
        self._meet()
        return count

    def _meet(self):
        cute.arch.barrier(barrier_id=self.barrier, number_of_threads=const_expr(self.threads))
