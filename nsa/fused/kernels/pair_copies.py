"""Query rows of a work item's pairs, copied to shared memory by TMA.

A pair's rows, those of the query heads of a KV head, are neighbours in memory. Where they are whole
swizzle atoms, one TMA copy brings a pair's. It arrives at a barrier in shared memory, costs the
warps few instructions, and needs no fence before the tensor cores read the rows.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from nsa.fused.hardware import WARP
from nsa.fused.kernels.rows import TILE_ROWS
from nsa.fused.kernels.vectors import VECTOR

# Rows and columns of a swizzle atom of 16-bit elements.
_ATOM_ROWS, _ATOM_COLUMNS = 8, 64


class PairCopies:
    """Copies of tiles of rows of ``dim`` channels, by a CTA of ``threads``."""

    def __init__(self, dtype: type[cutlass.Numeric], group: int, dim: int, threads: int):
        self.dtype = dtype
        self.group = group
        self.dim = dim
        self.pairs = TILE_ROWS // group
        # Warps that have pairs to copy.
        self.warps = min(self.pairs, threads // WARP)

    @staticmethod
    def fit(group: int, dim: int) -> bool:
        """Whether a pair's rows are whole atoms, and a tile's are whole pairs."""
        return group % _ATOM_ROWS == 0 and TILE_ROWS % group == 0 and dim % _ATOM_COLUMNS == 0

    def layout(self, rows: int, stages: int) -> cute.ComposedLayout:
        """In shared memory. All columns of 8 rows lie together, so that a pair does."""
        kind = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, self.dim)
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        return cute.tile_to_shape(atom, (rows, self.dim, stages), (1, 0, 2))

    def make(
        self, mX: cute.Tensor, stride: Int64, kv_heads: Int32, tokens: Int32
    ) -> tuple[cute.CopyAtom, cute.Tensor]:
        """The copy, and the tensor that it copies; ``stride`` elements are from token to token."""
        shape = (
            (_ATOM_ROWS, self.group // _ATOM_ROWS * kv_heads),
            (_ATOM_COLUMNS, self.dim // _ATOM_COLUMNS),
            tokens,
        )
        token = cute.assume(Int64(stride), divby=VECTOR)
        strides = ((self.dim, _ATOM_ROWS * self.dim), (1, _ATOM_COLUMNS), token)
        atom, tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(mX.iterator, cute.make_layout(shape, stride=strides)),
            cute.select(self.layout(self.group, 1), mode=[0, 1]),
            (self.group, self.dim),
        )
        return atom, tensor

    @cute.jit
    def init_barriers(self, filled: cute.Pointer, stages: cutlass.Constexpr[int], tidx: Int32):
        """A barrier of the CTA must follow."""
        if tidx == 0:
            for i in cutlass.range_constexpr(stages):
                cute.arch.mbarrier_init(filled + i, self.warps)
            cute.arch.mbarrier_init_fence()

    @cute.jit
    def load(
        self,
        copy: tuple,
        sX: cute.Tensor,
        filled: cute.Pointer,
        token_of: Callable,
        kv_head: Int32,
        tidx: Int32,
        stage: Int32,
    ):
        """Start to load a tile to a stage of ``sX (rows, dim, stages)``, by all threads.

        ``token_of(i)`` is the token of the tile's pair ``i``.
        """
        (atom, mX), box = copy, (self.group, self.dim)
        warp = cute.arch.make_warp_uniform(tidx // WARP)
        own_pairs = const_expr(self.pairs // self.warps)
        row_bytes = const_expr(self.dim * self.dtype.width // 8)
        if warp < self.warps:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(filled, own_pairs * self.group * row_bytes)
            for i in cutlass.range_constexpr(own_pairs):
                pair = warp + i * self.warps
                source = cute.local_tile(mX[None, None, token_of(pair)], box, (kv_head, 0))
                target = cute.local_tile(sX[None, None, stage], box, (pair, 0))
                target, source = cpasync.tma_partition(
                    *(atom, 0, cute.make_layout(1)),
                    *(cute.group_modes(x, 0, 2) for x in (target, source)),
                )
                cute.copy(atom, source, target, tma_bar_ptr=filled)
