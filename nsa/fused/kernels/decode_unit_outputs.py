"""The output of a unit's tokens: of the window, the compressed branch's parts, and the lists."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import NO_REFERENCE
from nsa.fused.hardware import QUAD
from nsa.fused.kernels.decode_parts import COLUMNS, WarpOutputs
from nsa.fused.kernels.decode_schedule import unit_parts
from nsa.fused.kernels.decode_softmax import power_of_two
from nsa.fused.kernels.decode_tiles import TileAttention


class UnitOutputs(WarpOutputs):
    """Outputs ``(rows, Dv)`` of ``group`` heads and some tokens, of the warpgroups of a CTA.

    The first warpgroup has the window, the others the selected blocks. ``tensors``, ``sizes`` and
    ``unit`` are those of :class:`nsa.fused.kernels.decode_units.DecodeUnits`.
    """

    def __init__(self, attention: TileAttention, group: int):
        super().__init__(attention)
        self.group = group

    @cute.jit
    def add_parts(
        self, tensors, sizes, sGates: cute.Tensor, unit,
        acc_O: cute.Tensor, total: cute.Tensor, first_row: Int32, lane: Int32,
    ):  # fmt: skip
        """Multiply the window's output with its gate, and add the compressed branch's parts."""
        dim, rows = const_expr(self.attention.head_dim_v), sizes.unit_tokens * self.group
        slot, count = unit_parts(tensors.tiles, unit.sequence, unit.unit, unit.units)
        for r in cutlass.range_constexpr(2):
            row = cutlass.min(first_row + 8 * r, rows - 1)
            # A branch without keys adds nothing.
            share = sGates[row * 3 + 2] / total[r] if total[r] != 0.0 else Float32(0.0)
            for i in cutlass.range_constexpr(dim // 8):
                for c in cutlass.range_constexpr(2):
                    acc_O[c + 2 * r + 4 * i] = acc_O[c + 2 * r + 4 * i] * share
            largest, whole = Int32(NO_REFERENCE), Float32(0.0)
            for part in cutlass.range(count, unroll=1):
                place = Int64(slot + part) * rows + row
                reference, sum_of_part = tensors.cmp_reference[place], tensors.cmp_total[place]
                higher = cutlass.max(largest, reference)
                whole = whole * power_of_two(largest - higher)
                whole = whole + sum_of_part * power_of_two(reference - higher)
                largest = higher
            share = sGates[row * 3] / whole if whole != 0.0 else Float32(0.0)
            for part in cutlass.range(count, unroll=1):
                place = Int64(slot + part) * rows + row
                factor = power_of_two(tensors.cmp_reference[place] - largest) * share
                pairs = []
                for i in cutlass.range_constexpr(dim // 8):
                    offset = cute.assume(place * dim + (8 * i + lane % QUAD * 2), divby=2)
                    rPair = cute.make_rmem_tensor(2, Float32)
                    source = cute.make_tensor(
                        tensors.cmp_out.iterator + offset, cute.make_layout(2)
                    )
                    cute.autovec_copy(source, rPair)
                    pairs.append(rPair)
                for i in cutlass.range_constexpr(dim // 8):
                    for c in cutlass.range_constexpr(2):
                        x = 4 * i + 2 * r + c
                        acc_O[x] = acc_O[x] + pairs[i][c] * factor

    @cute.jit
    def store(
        self, tensors, sizes, sGates: cute.Tensor, unit,
        ring: cute.Pointer, warp_sums, acc_O: cute.Tensor, reference: cute.Tensor,
        total: cute.Tensor, tile_group: Int32, first_row: Int32, lane: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up the warpgroups' outputs, of which the first one's has its gates, and store."""
        dim, pitch = const_expr(self.head_dim_v), const_expr(self.pitch)
        layout = cute.make_layout(
            (self.attention.tile_groups, self.attention.rows), stride=(self.attention.rows, 1)
        )
        sM, sL = (cute.make_tensor(x.iterator, layout) for x in warp_sums)
        sO = cute.recast_ptr(ring, dtype=Float32)
        for r in cutlass.range_constexpr(2):
            if lane % QUAD == 0:
                sM[tile_group, first_row + 8 * r] = reference[r]
                sL[tile_group, first_row + 8 * r] = total[r]
        # No thread reads tiles any more.
        cute.arch.barrier()
        for r in cutlass.range_constexpr(2):
            row, factor = first_row + 8 * r, Float32(1.0)
            if tile_group > 0:
                largest, whole = sM[1, row], Float32(0.0)
                for g in cutlass.range_constexpr(2, self.attention.tile_groups):
                    largest = cutlass.max(largest, sM[g, row])
                for g in cutlass.range_constexpr(1, self.attention.tile_groups):
                    whole += sL[g, row] * power_of_two(sM[g, row] - largest)
                gate = sGates[cutlass.min(row, sizes.unit_tokens * self.group - 1) * 3 + 1]
                share = gate / whole if whole != 0.0 else Float32(0.0)
                factor = share * power_of_two(reference[r] - largest)
            for i in cutlass.range_constexpr(dim // 8):
                rPair = cute.make_rmem_tensor(2, Float32)
                for c in cutlass.range_constexpr(2):
                    rPair[c] = acc_O[c + 2 * r + 4 * i] * factor
                place = (tile_group * self.attention.rows + row) * pitch + (8 * i + lane % QUAD * 2)
                pointer = sO + cute.assume(place, divby=2)
                cute.autovec_copy(rPair, cute.make_tensor(pointer, cute.make_layout(2)))
        cute.arch.barrier()
        each = const_expr(dim // COLUMNS)
        tokens, heads = unit.last_token + 1 - unit.token0, sizes.kv_heads * self.group
        for v in cutlass.range_constexpr(
            cute.ceil_div(self.attention.rows * each, self.attention.threads)
        ):
            index = v * self.attention.threads + tidx
            row, column = index // each, index % each * COLUMNS
            token, head = row // self.group, row % self.group
            if token < tokens and row < self.attention.rows:
                whole = self.sum_copies(sO, row, column, self.attention.row_groups)
                rounded = cute.make_rmem_tensor(COLUMNS, tensors.out.element_type)
                rounded.store(whole.load().to(tensors.out.element_type))
                out_row = Int64(unit.row0 + unit.token0 + token) * heads
                offset = (out_row + unit.kv_head * self.group + head) * dim + column
                target = tensors.out.iterator + cute.assume(offset, divby=COLUMNS)
                cute.autovec_copy(rounded, cute.make_tensor(target, cute.make_layout(COLUMNS)))
