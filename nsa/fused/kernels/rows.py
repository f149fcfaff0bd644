"""How the attention kernels copy rows of heads from global to shared memory, 16 bytes a thread.

Rows of a tile need not be neighbours: where each is, its *place*, is a function of its number.
"""

from collections.abc import Callable

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import cpasync

from nsa.fused.hardware import WGMMA_ROWS
from nsa.fused.kernels.hopper import partition_D_position_independent
from nsa.fused.kernels.vectors import VECTOR

Place = Callable[[Int32, int], tuple[Int32, Int32]]
"""Gives the row of the tensor, and the first column there, of row ``i + more`` of a tile. ``i`` is
a thread's first row and ``more`` a constant, so that what depends on ``i`` is computed once."""

TILE_ROWS = WGMMA_ROWS
"""Query rows of a tile. Row r is query head ``r % group`` of pair ``r // group``."""

TILE_KEYS = WGMMA_ROWS
"""Keys of a tile in the backward kernels, where keys are rows of a wgmma as well."""


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
    return lambda i, more: (first + cutlass.min(i + more, keys - 1), column)


def pair_rows(
    sTokens: cute.Tensor, tile: Int32, kv_head: Int32, group: int, head_dim: int
) -> Place:
    """Rows of a tile of a work item."""

    def place(i: Int32, more: int) -> tuple[Int32, Int32]:
        pair, head = pair_and_head(tile, i, more, group)
        return sTokens[pair], (kv_head * group + head) * head_dim

    return place


def pair_and_head(tile: Int32, i: Int32, more: int, group: int) -> tuple[Int32, Int32]:
    """The pair of row ``i + more`` of a tile, and the query head within its KV head."""
    # Unsigned, because // of signed numbers takes more instructions.
    if TILE_ROWS % group == 0 and more % group == 0:
        pair = tile * (TILE_ROWS // group) + more // group + Int32(Uint32(i) // group)
        return pair, Int32(Uint32(i) % group)
    row = Uint32(tile * TILE_ROWS + i + more)
    return Int32(row // group), Int32(row % group)


@cute.jit
def load_tokens(
    mTokens: cute.Tensor,
    sTokens: cute.Tensor,
    begin: Int32,
    count: Int32,
    tidx: Int32,
    threads: cutlass.Constexpr[int],
):
    """Tokens of a work item's pairs, and the last one again for the rows past these of a tile.

    What such rows give is dropped. ``sTokens`` is :data:`TILE_ROWS` longer than the longest item.
    """
    for i in cutlass.range(tidx, count + TILE_ROWS, threads, unroll=1):
        sTokens[i] = mTokens[begin + cutlass.min(i, count - 1)]


@cute.jit
def load_rows(
    mX: cute.Tensor,
    sX: cute.Tensor,
    stride: Int32 | Int64,
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
    tXsX = partition_D_position_independent(thr_copy, sX)
    if const_expr(stage is not None):
        tXsX = tXsX[None, None, None, stage]
    # All places first: what is read from shared memory after a copy waits until that is under way.
    places = [place(tidx // lanes, m * step) for m in range(cute.size(tXsX, mode=[1]))]
    for m in cutlass.range_constexpr(cute.size(tXsX, mode=[1])):
        row, column = places[m]
        offset = Int64(row) * stride + (column + tidx % lanes * VECTOR)
        for k in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            pointer = mX.iterator + cute.assume(offset + k * lanes * VECTOR, divby=VECTOR)
            source = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
            cute.copy(thr_copy, source, tXsX[None, m, k])
