"""How the attention kernels copy rows of heads from global to shared memory, 16 bytes a thread.

Rows of a tile need not be neighbours: where each is, its *place*, is a function of its number.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from quack import copy_utils

from nsa.fused.kernels.vectors import VECTOR

Place = Callable[[Int32], tuple[Int32, Int32]]
"""Of a row of a tile: the row of the tensor, and the first column there."""


def row_lanes(head_dim: int) -> int:
    """Neighbouring threads that load a row together, 16 bytes each."""
    return 8 if head_dim % 64 == 0 else 4


def row_copy(dtype: type[cutlass.Numeric], lanes: int, threads: int, operation) -> cute.TiledCopy:
    """``threads / lanes`` rows at a time, ``lanes`` threads a row."""
    return cute.make_tiled_copy_tv(
        cute.make_copy_atom(operation, dtype, num_bits_per_copy=VECTOR * dtype.width),
        cute.make_ordered_layout((threads // lanes, lanes), order=(1, 0)),
        cute.make_layout((1, VECTOR)),
    )


def block_rows(first: Int32, keys: Int32, column: Int32) -> Place:
    """Rows of a block; past its keys its last one again: they are masked, but must be finite."""
    return lambda i: (first + cutlass.min(i, keys - 1), column)


def pair_rows(
    sTokens: cute.Tensor, tile: Int32, kv_head: Int32, group: int, count: Int32, head_dim: int
) -> Place:
    """Rows of a tile of a work item, 64 of them."""

    def place(i: Int32) -> tuple[Int32, Int32]:
        token, head = token_and_head(sTokens, tile * 64 + i, kv_head, group, count)
        return token, head * head_dim

    return place


def token_and_head(
    sTokens: cute.Tensor, row: Int32, kv_head: Int32, group: int, count: Int32
) -> tuple[Int32, Int32]:
    """Of a row of a work item: query head ``row % group`` of the KV head, of pair ``row // group``.

    Rows past the item's pairs repeat heads of its last one; what they give is dropped.
    """
    return sTokens[cutlass.min(row // group, count - 1)], kv_head * group + row % group


@cute.jit
def load_rows(
    mX: cute.Tensor,
    sX: cute.Tensor,
    stride: Int64,
    place: Place,
    tidx: Int32,
    threads: cutlass.Constexpr[int],
    stage: Int32 | None = None,
):
    """Start to copy the rows of ``sX (rows, head_dim[, stages])``, by all threads of a CTA.

    Through L2 only: no CTA reads a row twice.
    """
    lanes = const_expr(row_lanes(cute.size(sX, mode=[1])))
    rows, step = cute.size(sX, mode=[0]), const_expr(threads // lanes)
    if const_expr(rows % step):
        # The last threads would write past the tile.
        raise ValueError(f"a tile has {rows} rows; it must have a multiple of {step}")
    operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    thr_copy = row_copy(sX.element_type, lanes, threads, operation).get_slice(tidx)
    tXsX = copy_utils.partition_D_position_independent(thr_copy, sX)
    if const_expr(stage is not None):
        tXsX = tXsX[None, None, None, stage]
    for m in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        row, column = place(tidx // lanes + m * (threads // lanes))
        offset = Int64(row) * stride + column + tidx % lanes * VECTOR
        for k in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            pointer = mX.iterator + cute.assume(offset + k * lanes * VECTOR, divby=VECTOR)
            source = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
            cute.copy(thr_copy, source, tXsX[None, m, k])
