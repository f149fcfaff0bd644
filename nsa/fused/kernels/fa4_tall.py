"""FlashAttention-4's forward with 256 queries a tile, 128 for each of two warp groups."""

from cutlass import Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from nsa.fused.kernels.hopper import FlashAttentionForwardSm90


class TallForward(FlashAttentionForwardSm90):
    """FA4 has a warp group for each 64 queries; here each has two such halves.

    So a tile of keys is read from memory half as often, and the warp groups take turns: while one
    has the tensor cores for both halves, the other computes exponentials of both.
    """

    def _get_tiled_mma(self):
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        shared, registers = warpgroup.OperandSource.SMEM, warpgroup.OperandSource.RMEM
        return tuple(
            hopper_helpers.make_trivial_tiled_mma(
                self.dtype,
                self.dtype,
                *(k_major, major, Float32),
                atom_layout_mnk=(2, 1, 1),
                tiler_mn=(64, columns),
                a_source=source,
            )
            for major, columns, source in (
                (k_major, self.tile_n, shared),
                (mn_major, self.tile_hdimv, registers),
            )
        )
