"""Tiles of the rows of a work item's pairs in shared memory: q, dO, and their statistics.

A pair's rows of q, those of the query heads of a KV head, are neighbours in memory. Where they are
whole groups of 8, TMA copies them: one copy of q and one of dO for each pair, which arrive at a
barrier in shared memory and cost the warps few instructions. Else all threads copy 16 bytes at a
time. Ordinary copies are followed by a fence for the tensor cores, which waits for all that a
thread has under way.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers

from nsa.fused.hardware import WARP
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.rows import TILE_ROWS, load_rows, pair_and_head, pair_rows
from nsa.fused.kernels.vectors import VECTOR

# Rows and columns of a swizzle atom of 16-bit elements.
_ATOM_ROWS, _ATOM_COLUMNS = 8, 64


@mlir_namedtuple
class QueryRows(NamedTuple):
    """q and dO, and the elements from token to token; ``lse * log2(e)`` and delta ``(T, H)``."""

    q: cute.Tensor
    dout: cute.Tensor
    lse_log2: cute.Tensor
    delta: cute.Tensor
    q_stride: Int32
    do_stride: Int32


@mlir_namedtuple
class SharedRows(NamedTuple):
    """``q`` and ``dout (rows, channels, stages)``, ``statistics (rows, 2, stages)``: the
    log-sum-exp, then delta; ``tokens`` of the pairs; a barrier for each stage."""

    q: cute.Tensor
    dout: cute.Tensor
    statistics: cute.Tensor
    tokens: cute.Tensor
    filled: cute.Pointer


class QueryTiles:
    """The tiles of a CTA of ``threads``, for ``dims`` channels of q and of dO.

    A warpgroup multiplies ``widths`` neighbouring channels of them at a time.
    """

    def __init__(
        self,
        dtype: type[cutlass.Numeric],
        group: int,
        dims: tuple[int, int],
        widths: tuple[int, int],
        threads: int,
    ):
        self.dtype = dtype
        self.group = group
        self.dims = dims
        self.widths = widths
        self.threads = threads
        # Whether TMA copies them: whole atoms.
        self.bulk = group % _ATOM_ROWS == 0 and TILE_ROWS % group == 0
        self.bulk = self.bulk and not any(width % _ATOM_COLUMNS for width in widths)
        self.pairs = TILE_ROWS // group
        # Those that have pairs to copy.
        self.warps = min(self.pairs, threads // WARP)

    def layouts(self, rows: int, stages: int) -> list[cute.ComposedLayout]:
        """Of q and dO in shared memory. All columns of 8 rows lie together, so that a pair does."""
        layouts = []
        for dim, width in zip(self.dims, self.widths, strict=True):
            kind = hopper_helpers.get_smem_layout_atom(LayoutEnum.ROW_MAJOR, self.dtype, width)
            atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
            layouts.append(cute.tile_to_shape(atom, (rows, dim, stages), (1, 0, 2)))
        return layouts

    def copies(self, rows: QueryRows, kv_heads: Int32, tokens: Int32) -> tuple | None:
        """TMA copies of a pair's q and dO, each with the tensor that it copies."""
        if not self.bulk:
            return None
        copies = []
        tensors = ((rows.q, rows.q_stride), (rows.dout, rows.do_stride))
        for (mX, stride), dim, layout in zip(
            tensors, self.dims, self.layouts(self.group, 1), strict=True
        ):
            shape = (
                (_ATOM_ROWS, self.group // _ATOM_ROWS * kv_heads),
                (_ATOM_COLUMNS, dim // _ATOM_COLUMNS),
                tokens,
            )
            token = cute.assume(Int64(stride), divby=VECTOR)
            strides = ((dim, _ATOM_ROWS * dim), (1, _ATOM_COLUMNS), token)
            copies.append(
                cpasync.make_tiled_tma_atom(
                    cpasync.CopyBulkTensorTileG2SOp(),
                    cute.make_tensor(mX.iterator, cute.make_layout(shape, stride=strides)),
                    cute.select(layout, mode=[0, 1]),
                    (self.group, dim),
                )
            )
        return tuple(copies)

    @cute.jit
    def init_barriers(self, filled: cute.Pointer, stages: cutlass.Constexpr[int], tidx: Int32):
        """A barrier of the CTA must follow."""
        if const_expr(self.bulk):  # noqa: SIM102 (one is decided at compile time)
            if tidx == 0:
                for i in cutlass.range_constexpr(stages):
                    cute.arch.mbarrier_init(filled + i, self.warps)
                cute.arch.mbarrier_init_fence()

    @cute.jit
    def wait_for_own_copies(self):
        """Wait for what all threads copied; the tensor cores may read it then."""
        # A copy that is in no group would not be waited for.
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier()

    @cute.jit
    def wait(self, filled: cute.Pointer, tile: Int32, stages: cutlass.Constexpr[int]):
        """Wait for a tile's rows."""
        if const_expr(self.bulk):
            cute.arch.mbarrier_wait(filled + tile % stages, tile // stages % 2)
        else:
            self.wait_for_own_copies()

    @cute.jit
    def load(
        self,
        rows: QueryRows,
        shared: SharedRows,
        copies: tuple | None,
        kv_heads: Int32,
        kv_head: Int32,
        tidx: Int32,
        tile: Int32,
        stage: Int32,
    ):
        """Start to load the rows of a tile, and their statistics, by all threads."""
        if const_expr(self.bulk):
            warp = cute.arch.make_warp_uniform(tidx // WARP)
            self._copy_pairs(rows, shared, copies, kv_heads, kv_head, warp, tile, stage)
        else:
            for mX, sX, stride, dim in (
                (rows.q, shared.q, rows.q_stride, self.dims[0]),
                (rows.dout, shared.dout, rows.do_stride, self.dims[1]),
            ):
                place = pair_rows(shared.tokens, tile, kv_head, self.group, dim)
                load_rows(mX, sX, stride, place, tidx, self.threads, stage)
            self._load_statistics(rows, shared, kv_heads, kv_head, tidx, tile, stage)

    @cute.jit
    def _copy_pairs(
        self,
        rows: QueryRows,
        shared: SharedRows,
        copies: tuple,
        kv_heads: Int32,
        kv_head: Int32,
        warp: Int32,
        tile: Int32,
        stage: Int32,
    ):
        """The same by a thread of each warp, which has one pair, or several."""
        filled = shared.filled + stage
        own_pairs = const_expr(self.pairs // self.warps)
        # 16-bit rows and two float32 statistics.
        row_bytes = const_expr(2 * sum(self.dims) + 8)
        copy_statistics = functools.partial(
            cute.copy, cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32), mbar_ptr=filled
        )
        heads = cute.make_layout(self.group)
        if warp < self.warps:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(filled, own_pairs * self.group * row_bytes)
            for i in cutlass.range_constexpr(own_pairs):
                pair = warp + i * self.warps
                token = shared.tokens[tile * self.pairs + pair]
                for (atom, mX), sX, dim in zip(
                    copies, (shared.q, shared.dout), self.dims, strict=True
                ):
                    box = (self.group, dim)
                    source = cute.local_tile(mX[None, None, token], box, (kv_head, 0))
                    target = cute.local_tile(sX[None, None, stage], box, (pair, 0))
                    target, source = cpasync.tma_partition(
                        *(atom, 0, cute.make_layout(1)),
                        *(cute.group_modes(x, 0, 2) for x in (target, source)),
                    )
                    cute.copy(atom, source, target, tma_bar_ptr=filled)
                offset = (Int64(token) * kv_heads + kv_head) * self.group
                for j, mX in enumerate((rows.lse_log2, rows.delta)):
                    place = shared.statistics.layout((pair * self.group, j, stage))
                    source = mX.iterator + cute.assume(offset, divby=self.group)
                    target = shared.statistics.iterator + cute.assume(place, divby=self.group)
                    with cute.arch.elect_one():
                        copy_statistics(
                            cute.make_tensor(source, heads), cute.make_tensor(target, heads)
                        )

    @cute.jit
    def _load_statistics(
        self,
        rows: QueryRows,
        shared: SharedRows,
        kv_heads: Int32,
        kv_head: Int32,
        tidx: Int32,
        tile: Int32,
        stage: Int32,
    ):
        """The first 64 threads load the log-sum-exp of a row each, the next 64 its delta."""
        row = tidx % TILE_ROWS
        pair, head = pair_and_head(tile, row, 0, self.group)
        offset = (Int64(shared.tokens[pair]) * kv_heads + kv_head) * self.group + head
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        for i, mX in ((0, rows.lse_log2), (1, rows.delta)):
            if tidx // TILE_ROWS == i:
                source = cute.make_tensor(mX.iterator + offset, cute.make_layout(1))
                target = shared.statistics.iterator + shared.statistics.layout((row, i, stage))
                cute.copy(atom, source, cute.make_tensor(target, cute.make_layout(1)))
