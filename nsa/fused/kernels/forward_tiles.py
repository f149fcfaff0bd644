"""What the forward kernels of token mode do with a tile of 64 rows, by one warpgroup.

Outputs leave the registers as wgmma has them, in vectors of 16 bytes: the columns of V are permuted
within groups of 32 when it enters shared memory, so that the 8 columns of a group that a thread
gets are neighbours.
"""

import functools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.utils import hopper_helpers

from nsa.fused.hardware import QUAD, WARPGROUP
from nsa.fused.kernels.hopper import fadd_reduce, fmax, fmax_reduce, store_v4
from nsa.fused.kernels.rows import TILE_ROWS, Place
from nsa.fused.kernels.vectors import VECTOR, load_vector

GROUP_COLUMNS = QUAD * VECTOR
"""A group of columns: each thread of a quad holds a vector of them."""


def make_mmas(
    dtype: type[cutlass.Numeric], keys: int, head_dim_v: int, warpgroups: int = 1
) -> tuple[cute.TiledMma, cute.TiledMma]:
    """The products for the scores of 64 rows a warpgroup and ``keys`` keys, and for the output.

    The second one takes P from registers.
    """
    make_mma = functools.partial(
        hopper_helpers.make_trivial_tiled_mma,
        dtype,
        dtype,
        OperandMajorMode.K,
        acc_dtype=Float32,
        atom_layout_mnk=(warpgroups, 1, 1),
    )
    mma_qk = make_mma(b_leading_mode=OperandMajorMode.K, tiler_mn=(TILE_ROWS, keys))
    mma_pv = make_mma(
        b_leading_mode=OperandMajorMode.MN,
        tiler_mn=(TILE_ROWS, head_dim_v),
        a_source=warpgroup.OperandSource.RMEM,
    )
    return mma_qk, mma_pv


@cute.jit
def load_values(
    mV: cute.Tensor, sV: cute.Tensor, stride: Int64, place: Place, tidx: Int32
) -> cute.Tensor:
    """This thread's part of what is to fill ``sV``: (words, vectors, groups of columns)."""
    groups = const_expr(cute.size(sV) // GROUP_COLUMNS)
    values = cute.make_rmem_tensor((QUAD, QUAD, cute.ceil_div(groups, WARPGROUP)), Int32)
    for i in cutlass.range_constexpr(cute.size(values, mode=[2])):
        if groups % WARPGROUP == 0 or i * WARPGROUP + tidx < groups:
            key, group = _row_and_group(sV, i * WARPGROUP + tidx)
            row, column = place(key, 0)
            offset = Int64(row) * stride + (column + group * GROUP_COLUMNS)
            for v in cutlass.range_constexpr(QUAD):
                vector = load_vector(mV, offset + v * VECTOR)
                values[None, v, i].store(cute.recast_tensor(vector, Int32).load())
    return values


@cute.jit
def store_values(values: cute.Tensor, sV: cute.Tensor, tidx: Int32):
    """In each group, word ``w`` of vector ``v`` (two columns) becomes word ``v`` of vector ``w``.

    In a row of the output, the words that wgmma gives one thread are then a vector.
    """
    groups = const_expr(cute.size(sV) // GROUP_COLUMNS)
    for i in cutlass.range_constexpr(cute.size(values, mode=[2])):
        if groups % WARPGROUP == 0 or i * WARPGROUP + tidx < groups:
            key, group = _row_and_group(sV, i * WARPGROUP + tidx)
            for w in cutlass.range_constexpr(QUAD):
                vector = cute.make_rmem_tensor(VECTOR, sV.element_type)
                cute.recast_tensor(vector, Int32).store(values[w, None, i].load())
                target = cute.local_tile(sV, (1, VECTOR), (key, group * QUAD + w))
                cute.autovec_copy(vector, cute.group_modes(target, 0, 2))


def _row_and_group(sV: cute.Tensor, index: Int32) -> tuple[Int32, Int32]:
    """Row and group of columns of a thread's ``index``: neighbours use different banks."""
    keys, head_dim = (cute.size(sV, mode=[mode]) for mode in range(2))
    side = 2 if head_dim % (2 * GROUP_COLUMNS) == 0 else 1
    return index // side % keys, index // (side * keys) * side + index % side


def row_words(r: int, group: int) -> list[int]:
    """Which words (two columns each) of an output in registers are a row and group's vector."""
    return [2 * (group * QUAD + w) + r for w in range(QUAD)]


@cute.jit
def store_row(rO: cute.Tensor, r: cutlass.Constexpr[int], mOut: cute.Tensor, offset: Int64):
    """Store row ``r`` of the thread's two, whose words alternate in registers, at ``offset``.

    The stores are marked to leave L2 first: partial results are larger than L2.
    """
    words = cute.recast_tensor(cute.make_tensor(rO.iterator, cute.size(rO)), Int32)
    tidx, _, _ = cute.arch.thread_idx()
    offset += tidx % QUAD * VECTOR
    for group in cutlass.range_constexpr(cute.size(words) // (2 * QUAD)):
        vector = [words[word] for word in row_words(r, group)]
        pointer = mOut.iterator + (offset + group * GROUP_COLUMNS)
        store_v4(pointer, *vector, cop="cs")


@cute.jit
def softmax(
    row: cute.Tensor, scale_log2: Float32, empty: cutlass.Constexpr[bool] = False
) -> tuple[Float32, Float32]:
    """Turn ``row`` into ``exp2(scale_log2 * (row - its largest))``; return 1 / sum and log2(sum).

    With ``empty`` all of a row may be -inf, which gives 0 and -inf.
    """
    scores = row.load()
    largest = cute.arch.warp_reduction_max(fmax_reduce(scores), threads_in_group=QUAD)
    offset = largest * scale_log2
    if const_expr(empty):
        offset = Float32(0.0) if largest == -Float32.inf else offset
    scores = cute.math.exp2(scores * scale_log2 - offset, fastmath=True)
    row.store(scores)
    total = cute.arch.warp_reduction_sum(fadd_reduce(scores), threads_in_group=QUAD)
    inverse = cute.arch.rcp_approx(total)
    if const_expr(empty):
        inverse = Float32(0.0) if total == 0.0 else inverse
    return inverse, offset + cute.math.log2(total, fastmath=True)


@cute.jit
def weigh(
    lse: cute.Tensor, threads: cutlass.Constexpr[int] = 1, other: Float32 | None = None
) -> tuple[Float32, Float32, Float32]:
    """Turn log2 of the sums of a row's results into weights, relative to the largest.

    Args:
        lse: log2 of the sums of this thread's results, -inf for none; overwritten.
        threads: how many neighbouring threads have the row's results.
        other: log2 of the sum of one more result, which all of these threads have.

    Returns:
        log2 of what the weights are relative to; the sum of the weights, 0 for a row with no
        result; the weight of ``other``.
    """
    largest = -Float32.inf if const_expr(other is None) else other
    for i in cutlass.range_constexpr(cute.size(lse)):
        largest = fmax(largest, lse[i])
    if const_expr(threads > 1):
        largest = cute.arch.warp_reduction_max(largest, threads_in_group=threads)
    # A row with no result then has weights of 0.
    reference = Float32(0.0) if largest == -Float32.inf else largest
    total = Float32(0.0)
    for i in cutlass.range_constexpr(cute.size(lse)):
        lse[i] = cute.math.exp2(lse[i] - reference, fastmath=True)
        total += lse[i]
    weight = Float32(0.0)
    if const_expr(other is not None):
        weight = cute.math.exp2(other - reference, fastmath=True)
    if const_expr(threads > 1):
        total = cute.arch.warp_reduction_sum(total, threads_in_group=threads)
    if const_expr(other is not None):
        total = total + weight
    return reference, total, weight
