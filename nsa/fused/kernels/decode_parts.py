"""What the warps of a CTA have found, added up: in shared memory, or as a part."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.hardware import QUAD, WARP
from nsa.fused.kernels.decode_softmax import power_of_two
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention

COLUMNS = 4
"""Columns of an output that a thread takes together: 16 bytes of float32."""


class WarpOutputs:
    """Outputs ``(rows, Dv)`` of the warps of a CTA."""

    def __init__(self, attention: TileAttention):
        self.attention = attention
        self.warps = attention.warps
        self.threads = attention.threads
        self.rows = attention.rows
        self.head_dim_v = attention.head_dim_v
        self.pitch = attention.pitch

    @cute.jit
    def share_outputs(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, ring: cute.Pointer,
        warp_sums, row_groups: cutlass.Constexpr[int], tidx: Int32,
    ):  # fmt: skip
        """Write the warps' outputs to shared memory, relative to the largest reference of a row.

        Warp ``w`` has row group ``w % row_groups``. Returns outputs ``(copies, rows, Dv)``, which
        are there after a barrier, and references and sums ``(copies, rows)`` of the warps. No
        thread reads tiles any more once all threads are here.
        """
        copies, rows = const_expr(self.warps // row_groups), const_expr(MMA_ROWS * row_groups)
        layout = cute.make_layout((copies, rows), stride=(rows, 1))
        sM, sL = (cute.make_tensor(x.iterator, layout) for x in warp_sums)
        strides = rows * self.pitch, self.pitch, 1
        layout = cute.make_layout((copies, rows, self.head_dim_v), stride=strides)
        sO = cute.make_tensor(cute.recast_ptr(ring, dtype=Float32), layout)
        warp_index, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        copy = warp_index // row_groups
        row = warp_index % row_groups * MMA_ROWS + lane // QUAD
        for r in cutlass.range_constexpr(2):
            for offset in cutlass.range_constexpr(2):
                total[r] += cute.arch.shuffle_sync_bfly(total[r], offset=1 << offset)
            if lane % QUAD == 0:
                sM[copy, row + 8 * r] = reference[r]
                sL[copy, row + 8 * r] = total[r]
        cute.arch.barrier()
        for r in cutlass.range_constexpr(2):
            largest = sM[0, row + 8 * r]
            for c in cutlass.range_constexpr(1, copies):
                largest = cutlass.max(largest, sM[c, row + 8 * r])
            factor = power_of_two(reference[r] - largest)
            for i in cutlass.range_constexpr(self.head_dim_v // 8):
                rPair = cute.make_rmem_tensor(2, Float32)
                for c in cutlass.range_constexpr(2):
                    rPair[c] = acc_O[c + 2 * r + 4 * i] * factor
                place = (copy * rows + row + 8 * r) * self.pitch + (8 * i + lane % QUAD * 2)
                pointer = sO.iterator + cute.assume(place, divby=2)
                cute.autovec_copy(rPair, cute.make_tensor(pointer, cute.make_layout(2)))
        return sO, sM, sL

    @cute.jit
    def sum_warps(self, sM: cute.Tensor, sL: cute.Tensor, row: Int32) -> tuple[Int32, Float32]:
        """The largest reference of a row, of the warps that have it, and their sums together."""
        copies = const_expr(cute.size(sM, mode=[0]))
        largest, whole = sM[0, row], Float32(0.0)
        for c in cutlass.range_constexpr(1, copies):
            largest = cutlass.max(largest, sM[c, row])
        for c in cutlass.range_constexpr(copies):
            whole += sL[c, row] * power_of_two(sM[c, row] - largest)
        return largest, whole

    @cute.jit
    def store_part(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, ring: cute.Pointer,
        warp_sums, out, slot: Int64, rows: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up what the warps have and store the part. All threads have read the tiles before.

        ``out`` are flat tensors: outputs ``(slots, rows, Dv)``, references and sums
        ``(slots, rows)``.
        """
        mO, mM, mL = out
        dim, each = const_expr(self.head_dim_v), const_expr(self.head_dim_v // COLUMNS)
        sO, sM, sL = self.share_outputs(
            acc_O, reference, total, ring, warp_sums, self.attention.row_groups, tidx
        )
        cute.arch.barrier()
        for v in cutlass.range_constexpr(cute.ceil_div(self.rows * each, self.threads)):
            index = v * self.threads + tidx
            row, column = index // each, index % each * COLUMNS
            if row < rows:
                whole = self.sum_copies(sO.iterator, row, column, self.attention.row_groups)
                pointer = mO.iterator + cute.assume((slot * rows + row) * dim + column, divby=4)
                cute.autovec_copy(whole, cute.make_tensor(pointer, cute.make_layout(COLUMNS)))
        if tidx < rows:
            largest, whole_sum = self.sum_warps(sM, sL, tidx)
            mM[slot * rows + tidx] = largest
            mL[slot * rows + tidx] = whole_sum

    @cute.jit
    def sum_copies(
        self, sO: cute.Pointer, row: Int32, column: Int32, row_groups: cutlass.Constexpr[int]
    ) -> cute.Tensor:
        """A vector of the output of all warps, from shared memory of this CTA or another one."""
        copies, rows = const_expr(self.warps // row_groups), const_expr(MMA_ROWS * row_groups)
        vectors = []
        for c in cutlass.range_constexpr(copies):
            offset = cute.assume((c * rows + row) * self.pitch + column, divby=COLUMNS)
            rX = cute.make_rmem_tensor(COLUMNS, Float32)
            cute.autovec_copy(cute.make_tensor(sO + offset, cute.make_layout(COLUMNS)), rX)
            vectors.append(rX)
        for c in cutlass.range_constexpr(1, copies):
            for i in cutlass.range_constexpr(COLUMNS):
                vectors[0][i] = vectors[0][i] + vectors[c][i]
        return vectors[0]
