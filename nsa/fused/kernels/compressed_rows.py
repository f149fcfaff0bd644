"""Where the rows of compressed blocks lie, and the sum of a token's rows over its blocks."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.kernels.vectors import load_vector


class CompressedRows:
    """Rows ``(P, M, H / P, l, D)`` of M blocks of ``l`` tokens, for P parts of H heads.

    A sequence has a block every ``stride`` tokens, of which ``l`` is a multiple.
    """

    def __init__(self, block_size: int, stride: int, head_dim: int):
        self.block_size = block_size
        self.stride = stride
        self.head_dim = head_dim

    @cute.jit
    def row(self, blocks: Int32, part_heads: Int32, block: Int32, head: Int32) -> Int64:
        """The row of a block and head: there are ``M`` blocks, and ``H / P`` heads of a part."""
        part = head // part_heads
        return (Int64(part) * blocks + block) * part_heads + head % part_heads

    @cute.jit
    def of_sequence(
        self, mBounds: cute.Tensor | None, sequence: Int32, entry_blocks: Int32
    ) -> tuple[Int32, Int32]:
        """The first block of a sequence, and their number. ``mBounds`` are those of blocks.

        Without it a sequence is an entry of a batch, which has ``entry_blocks``.
        """
        first, count = sequence * entry_blocks, entry_blocks
        if const_expr(mBounds is not None):
            first = mBounds[sequence]
            count = mBounds[sequence + 1] - first
        return first, count

    @cute.jit
    def add(
        self,
        mRows: cute.Tensor,
        sizes: tuple[Int32, Int32],
        index: Int32,
        of_sequence: tuple[Int32, Int32],
        head: Int32,
        columns: tuple,
        totals: list,
    ):
        """Add a token's rows, of all its blocks, to ``totals`` in float32.

        ``sizes`` are those of :meth:`row`; ``index`` is the token's in its sequence. ``totals`` has
        for each of some heads, from ``head`` on, a vector at each of the ``columns``.
        """
        first, count = of_sequence
        for part in cutlass.range_constexpr(self.block_size // self.stride):
            block = index // self.stride - part
            if block >= 0 and block < count:
                in_block = index % self.stride + part * self.stride
                self._add_block(mRows, sizes, first + block, in_block, head, columns, totals)

    @cute.jit
    def _add_block(
        self,
        mRows: cute.Tensor,
        sizes: tuple[Int32, Int32],
        block: Int32,
        in_block: Int32,
        head: Int32,
        columns: tuple,
        totals: list,
    ):
        loaded = []
        for h in cutlass.range_constexpr(len(totals)):
            row = self.row(sizes[0], sizes[1], block, head + h)
            start = (row * self.block_size + in_block) * self.head_dim
            loaded.append([load_vector(mRows, start + column) for column in columns])
        for h in cutlass.range_constexpr(len(totals)):
            for i in cutlass.range_constexpr(len(columns)):
                total = totals[h][i]
                total.store(total.load() + loaded[h][i].load().to(Float32))
