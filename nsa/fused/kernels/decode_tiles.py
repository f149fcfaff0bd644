"""Attention of a few query rows to many keys in pages: what the kernels of decoding share.

A CTA attends tiles of 64 keys, which cp.async copies some tiles ahead. 16 query rows are the rows
of an mma.sync, so that each warp holds its scores, its softmax and its output in registers. With
few rows the warps share the keys of a tile among them, 16 or 32 each, and add up their outputs at
the end; no warp waits for another within a tile.

*Integer references.* The exponentials of a row are relative to ``2^m`` with an integer ``m``. With
``y = scale * log2(e) * score`` and ``n = round(y)``, a key's exponential is ``2^(y - n)`` times
``2^(n - m)``. The first factor depends on the score alone, and a product with a power of two is
exact. So equal keys get equal results wherever they lie and however the keys are split.

*Order of keys.* Within each 16 keys, key ``4 t + 2 j + c`` is in row ``8 j + 2 t + c`` of the tile.
The scores that mma.sync gives thread ``t`` of a quad are then those of 4 neighbouring keys.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.utils import LayoutEnum
from torch import Tensor

from nsa.fused.decode_inputs import (
    NO_REFERENCE,
    TILE_KEYS,
    Pool,
    resident_ctas,
    tile_stages,
)
from nsa.fused.hardware import QUAD, WARP
from nsa.fused.kernels.hopper import (
    make_smem_layout,
    mlir_namedtuple,
    partition_D_position_independent,
    reshape_acc_to_frgA,
    transpose_view,
)
from nsa.fused.kernels.rows import row_copy
from nsa.fused.kernels.vectors import CUTE_DTYPES, VECTOR, fake_flat, is_aligned

MMA_ROWS = 16
"""Query rows of an mma.sync, and keys that a warp takes together."""

PDL = True
"""Whether a kernel of a step may start before the one before it has ended, to hide the launch."""

# 1.5 * 2^23: a float32 of moderate size added to it is rounded to an integer.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000


@mlir_namedtuple
class PagedTensors(NamedTuple):
    """Keys and values in pages: flat memory, and elements from page to page, row to row, head to
    head. ``table`` has ``max_pages`` pages for each sequence, of ``page_rows`` rows each."""

    k: cute.Tensor
    v: cute.Tensor
    table: cute.Tensor
    k_page: Int64
    k_row: Int64
    k_head: Int64
    v_page: Int64
    v_row: Int64
    v_head: Int64
    page_rows: Int32
    max_pages: Int32


class TileAttention:
    """Up to ``16 * row_groups`` query rows of one KV head; ``row_groups`` is 1, 2, 4 or 8.

    Tiles leave ``beside`` bytes of shared memory for the kernel.
    """

    def __init__(
        self, dtype: type[cutlass.Numeric], head_dim: int, head_dim_v: int, row_groups: int,
        beside: int,
    ):  # fmt: skip
        self.dtype = dtype
        self.head_dim = head_dim
        self.head_dim_v = head_dim_v
        self.row_groups = row_groups
        self.rows = MMA_ROWS * row_groups
        self.key_groups = max(1, 4 // row_groups)
        self.warps = row_groups * self.key_groups
        self.threads = WARP * self.warps
        # Times that a warp takes 16 keys of a tile.
        self.units = TILE_KEYS // MMA_ROWS // self.key_groups
        self.lanes = 8 if head_dim % 64 == 0 and head_dim_v % 64 == 0 else 4
        self.rows_per_thread = TILE_KEYS * self.lanes // self.threads
        self.ctas = resident_ctas(head_dim, head_dim_v, row_groups)
        self.stages = tile_stages(head_dim, head_dim_v, row_groups, beside)
        # The outputs of the warps are added up where the tiles were.
        merged = 4 * self.key_groups * self.rows * head_dim_v if self.key_groups > 1 else 0
        if self.stages < 2 or merged > 2 * self.stages * TILE_KEYS * (head_dim + head_dim_v):
            raise ValueError(f"tiles of D={head_dim}, Dv={head_dim_v} do not fit shared memory")

    def layouts(self) -> tuple[cute.ComposedLayout, ...]:
        """Layouts of queries, keys and values in shared memory."""
        make_layout = functools.partial(make_smem_layout, self.dtype, LayoutEnum.ROW_MAJOR)
        return (
            make_layout((self.rows, self.head_dim)),
            make_layout((TILE_KEYS, self.head_dim), stage=self.stages),
            make_layout((TILE_KEYS, self.head_dim_v), stage=self.stages),
        )

    def make_mma(self) -> cute.TiledMma:
        """The mma of one warp."""
        return cute.make_tiled_mma(
            warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)),
            (1, 1, 1),
            permutation_mnk=(MMA_ROWS, 16, 16),
        )

    def allocate(self, smem, layouts) -> tuple[cute.Tensor, ...]:
        """(sQ, sK, sV, merged outputs, references, sums) in shared memory."""
        q_smem, k_smem, v_smem = layouts
        sQ = smem.allocate_tensor(self.dtype, q_smem.outer, 1024, swizzle=q_smem.inner)
        # One piece of memory: keys, values, and later the outputs.
        k_bytes = const_expr(2 * cute.cosize(k_smem.outer))
        v_bytes = const_expr(2 * cute.cosize(v_smem.outer))
        memory = smem.allocate(k_bytes + v_bytes, 1024)
        sK = cute.make_tensor(cute.recast_ptr(memory, k_smem.inner, dtype=self.dtype), k_smem.outer)
        sV = cute.make_tensor(
            cute.recast_ptr(memory + k_bytes, v_smem.inner, dtype=self.dtype), v_smem.outer
        )
        shape = (self.key_groups, self.rows, self.head_dim_v)
        sO = cute.make_tensor(
            cute.recast_ptr(memory, dtype=Float32), cute.make_ordered_layout(shape, order=(2, 1, 0))
        )
        layout = cute.make_ordered_layout((self.key_groups, self.rows), order=(1, 0))
        sM = smem.allocate_tensor(Int32, layout, 16)
        sL = smem.allocate_tensor(Float32, layout, 16)
        return sQ, sK, sV, sO, sM, sL

    @cute.jit
    def load_queries(self, mQ: cute.Tensor, sQ: cute.Tensor, offset, valid, tidx: Int32):
        """Start to copy the queries; ``offset(row)`` is where a row is, zeros where not ``valid``.

        ``offset`` and ``valid`` are functions of the row.
        """
        vectors = const_expr(self.head_dim // VECTOR)
        total = const_expr(self.rows * vectors)
        sVectors = cute.flat_divide(sQ, (1, VECTOR))
        atom = cute.make_copy_atom(
            cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
            self.dtype,
            num_bits_per_copy=128,
        )
        for i in cutlass.range_constexpr(cute.ceil_div(total, self.threads)):
            index = i * self.threads + tidx
            if total % self.threads == 0 or index < total:
                row, channel = index // vectors, index % vectors
                predicate = cute.make_rmem_tensor(1, Boolean)
                predicate[0] = valid(row)
                place = offset(row) if predicate[0] else Int64(0)
                place = cute.assume(place + channel * VECTOR, divby=VECTOR)
                source = cute.make_tensor(mQ.iterator + place, cute.make_layout(((VECTOR, 1),)))
                target = cute.make_tensor(
                    sVectors[0, None, row, channel].iterator, cute.make_layout(((VECTOR, 1),))
                )
                cute.copy(atom, source, target, pred=predicate)

    def key_of_row(self, row: Int32) -> Int32:
        """Which key of a tile is in a row of it."""
        low = (row & 1) | ((row & 6) << 1) | ((row & 8) >> 2)
        return (row & ~15) | low

    @cute.jit
    def load_tile(
        self, pages: PagedTensors, sK: cute.Tensor, sV: cute.Tensor, place, kv_head: Int32,
        tidx: Int32, stage: Int32,
    ):  # fmt: skip
        """Start to copy a tile; ``place(key)`` gives (page, row, whether there is such a key)."""
        operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
        thr_copy = row_copy(self.dtype, self.lanes, self.threads, operation).get_slice(tidx)
        tKsK = partition_D_position_independent(thr_copy, sK)[None, None, None, stage]
        tVsV = partition_D_position_independent(thr_copy, sV)[None, None, None, stage]
        step = const_expr(self.threads // self.lanes)
        column = kv_head, tidx % self.lanes * VECTOR
        places = []
        for m in cutlass.range_constexpr(self.rows_per_thread):
            places.append(place(self.key_of_row(tidx // self.lanes + m * step)))
        for m in cutlass.range_constexpr(self.rows_per_thread):
            page, row, valid = places[m]
            predicate = cute.make_rmem_tensor(1, Boolean)
            predicate[0] = valid
            k = Int64(page) * pages.k_page + Int64(row) * pages.k_row + kv_head * pages.k_head
            v = Int64(page) * pages.v_page + Int64(row) * pages.v_row + kv_head * pages.v_head
            self._copy_row(thr_copy, pages.k, tKsK, k + column[1], m, predicate)
            self._copy_row(thr_copy, pages.v, tVsV, v + column[1], m, predicate)

    @cute.jit
    def _copy_row(
        self, thr_copy, mX: cute.Tensor, tXsX: cute.Tensor, offset: Int64,
        m: cutlass.Constexpr[int], predicate: cute.Tensor,
    ):  # fmt: skip
        for k in cutlass.range_constexpr(cute.size(tXsX, mode=[2])):
            pointer = mX.iterator + cute.assume(offset + k * self.lanes * VECTOR, divby=VECTOR)
            source = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
            cute.copy(thr_copy, source, tXsX[None, m, k], pred=predicate)

    @cute.jit
    def compute_scores(
        self, mma: cute.TiledMma, sQ: cute.Tensor, sK: cute.Tensor, row_group: Int32,
        key_group: Int32, lane: Int32,
    ):  # fmt: skip
        """Products of the warp's rows with its keys of ``sK (64, D)``: a ``(4, 1, 2)`` tensor for
        each 16 keys."""
        thr_mma = mma.get_slice(lane)
        atom = cute.make_copy_atom(
            warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4), self.dtype
        )
        copy_q = cute.make_tiled_copy_A(atom, mma).get_slice(lane)
        copy_k = cute.make_tiled_copy_B(atom, mma).get_slice(lane)
        sQw = cute.local_tile(sQ, (MMA_ROWS, self.head_dim), (row_group, 0))
        tSsQ = copy_q.partition_S(sQw)
        rQ = thr_mma.make_fragment_A(thr_mma.partition_A(sQw))
        rQ_view = copy_q.retile(rQ)
        accs, rKs, views, sources = [], [], [], []
        for u in cutlass.range_constexpr(self.units):
            sKw = cute.local_tile(sK, (16, self.head_dim), (key_group + u * self.key_groups, 0))
            rK = thr_mma.make_fragment_B(thr_mma.partition_B(sKw))
            acc = cute.make_rmem_tensor(thr_mma.partition_shape_C((MMA_ROWS, 16)), Float32)
            acc.fill(0.0)
            accs.append(acc)
            rKs.append(rK)
            views.append(copy_k.retile(rK))
            sources.append(copy_k.partition_S(sKw))
        for k in cutlass.range_constexpr(self.head_dim // 16):
            cute.copy(copy_q, tSsQ[None, None, k], rQ_view[None, None, k])
            for u in cutlass.range_constexpr(self.units):
                cute.copy(copy_k, sources[u][None, None, k], views[u][None, None, k])
                cute.gemm(mma, accs[u], rQ[None, None, k], rKs[u][None, None, k], accs[u])
        return accs

    @cute.jit
    def add_values(
        self, mma: cute.TiledMma, acc_O: cute.Tensor, accs, sV: cute.Tensor, key_group: Int32,
        lane: Int32,
    ):  # fmt: skip
        """Add the values of the warp's keys of ``sV (64, Dv)``, weighted with ``accs``."""
        thr_mma = mma.get_slice(lane)
        atom = cute.make_copy_atom(
            warp.LdMatrix8x8x16bOp(transpose=True, num_matrices=4), self.dtype
        )
        copy_v = cute.make_tiled_copy_B(atom, mma).get_slice(lane)
        sVt = transpose_view(sV)
        for u in cutlass.range_constexpr(self.units):
            rP = cute.make_fragment_like(accs[u], self.dtype)
            rP.store(accs[u].load().to(self.dtype))
            rP = reshape_acc_to_frgA(rP)
            sVw = cute.local_tile(sVt, (self.head_dim_v, 16), (0, key_group + u * self.key_groups))
            rV = thr_mma.make_fragment_B(thr_mma.partition_B(sVw))
            cute.copy(copy_v, copy_v.partition_S(sVw), copy_v.retile(rV))
            cute.gemm(mma, acc_O, rP[None, None, 0], rV[None, None, 0], acc_O)

    def make_output(self, mma: cute.TiledMma, lane: Int32) -> cute.Tensor:
        shape = mma.get_slice(lane).partition_shape_C((MMA_ROWS, self.head_dim_v))
        return cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def softmax(
        self, accs, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, low, high,
        lane: Int32, scale_log2: Float32,
    ):  # fmt: skip
        """Turn products into exponentials relative to ``reference``, which rises with them.

        ``accs[u]`` is for 16 keys, of which row ``r`` of the thread's two sees those from
        ``low[u]`` up to but without ``high[r][u]``. ``total`` has this thread's sums.
        """
        first = lane % QUAD * 4
        exponents = [[None] * self.units for _ in range(2)]
        for r in cutlass.range_constexpr(2):
            largest = Int32(NO_REFERENCE)
            for u in cutlass.range_constexpr(self.units):
                rN = cute.make_rmem_tensor(4, Int32)
                for q in cutlass.range_constexpr(4):
                    y = accs[u][q % 2 + 2 * r + 4 * (q // 2)] * scale_log2
                    rounded = y + Float32(_ROUNDER)
                    n = rounded.bitcast(Int32) - Int32(_ROUNDER_BITS)
                    seen = first + q >= low[u] and first + q < high[r][u]
                    n = n if seen else Int32(NO_REFERENCE)
                    power = cute.math.exp2(y - (rounded - Float32(_ROUNDER)), fastmath=True)
                    accs[u][q % 2 + 2 * r + 4 * (q // 2)] = power
                    rN[q] = n
                    largest = cutlass.max(largest, n)
                exponents[r][u] = rN
            for offset in cutlass.range_constexpr(2):
                other = cute.arch.shuffle_sync_bfly(largest, offset=1 << offset)
                largest = cutlass.max(largest, other)
            largest = cutlass.max(largest, reference[r])
            factor = power_of_two(reference[r] - largest)
            changed = cute.arch.vote_any_sync(reference[r] != largest)
            reference[r] = largest
            if changed:
                total[r] = total[r] * factor
                for i in cutlass.range_constexpr(cute.size(acc_O) // 4):
                    for c in cutlass.range_constexpr(2):
                        acc_O[c + 2 * r + 4 * i] = acc_O[c + 2 * r + 4 * i] * factor
            for u in cutlass.range_constexpr(self.units):
                rN = exponents[r][u]
                for q in cutlass.range_constexpr(4):
                    place = q % 2 + 2 * r + 4 * (q // 2)
                    power = accs[u][place] * power_of_two(rN[q] - largest)
                    # What lies past the keys may be NaN.
                    power = power if rN[q] != NO_REFERENCE else Float32(0.0)
                    accs[u][place] = power
                    total[r] = total[r] + power

    @cute.jit
    def store_part(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, sO: cute.Tensor,
        sM: cute.Tensor, sL: cute.Tensor, out, slot: Int64, rows: Int32, row_group: Int32,
        key_group: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up what the warps have and store the part. All threads have read the tiles before.

        ``out`` are flat tensors: outputs ``(slots, rows, Dv)``, references and sums
        ``(slots, rows)``.
        """
        mO, mM, mL = out
        lane = tidx % WARP
        dim = const_expr(self.head_dim_v)
        row = row_group * MMA_ROWS + lane // QUAD
        for r in cutlass.range_constexpr(2):
            for offset in cutlass.range_constexpr(2):
                total[r] += cute.arch.shuffle_sync_bfly(total[r], offset=1 << offset)
        if const_expr(self.key_groups == 1):
            for r in cutlass.range_constexpr(2):
                if row + 8 * r < rows:
                    place = slot * rows + row + 8 * r
                    if lane % QUAD == 0:
                        mM[place] = reference[r]
                        mL[place] = total[r]
                    for i in cutlass.range_constexpr(dim // 8):
                        for c in cutlass.range_constexpr(2):
                            column = 8 * i + lane % QUAD * 2 + c
                            mO[place * dim + column] = acc_O[c + 2 * r + 4 * i]
        else:
            cute.arch.barrier()
            if lane % QUAD == 0:
                for r in cutlass.range_constexpr(2):
                    sM[key_group, row + 8 * r] = reference[r]
                    sL[key_group, row + 8 * r] = total[r]
            cute.arch.barrier()
            for r in cutlass.range_constexpr(2):
                largest = sM[0, row + 8 * r]
                for g in cutlass.range_constexpr(1, self.key_groups):
                    largest = cutlass.max(largest, sM[g, row + 8 * r])
                factor = power_of_two(reference[r] - largest)
                for i in cutlass.range_constexpr(dim // 8):
                    for c in cutlass.range_constexpr(2):
                        column = 8 * i + lane % QUAD * 2 + c
                        sO[key_group, row + 8 * r, column] = acc_O[c + 2 * r + 4 * i] * factor
            cute.arch.barrier()
            for index in cutlass.range(tidx, rows * dim, self.threads, unroll=1):
                value = Float32(0.0)
                for g in cutlass.range_constexpr(self.key_groups):
                    value += sO[g, index // dim, index % dim]
                mO[slot * rows * dim + index] = value
            for i in cutlass.range(tidx, rows, self.threads, unroll=1):
                largest = sM[0, i]
                for g in cutlass.range_constexpr(1, self.key_groups):
                    largest = cutlass.max(largest, sM[g, i])
                value = Float32(0.0)
                for g in cutlass.range_constexpr(self.key_groups):
                    value += sL[g, i] * power_of_two(sM[g, i] - largest)
                mM[slot * rows + i] = largest
                mL[slot * rows + i] = value
            cute.arch.barrier()


@functools.cache
def make_attention(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, row_groups: int, beside: int = 0
) -> TileAttention:
    return TileAttention(CUTE_DTYPES[dtype], head_dim, head_dim_v, row_groups, beside)


@cute.jit
def wait_for_previous():
    """Wait until the kernel before this one has ended, then let the next one start.

    A kernel that runs was let start by all CTAs of the one before it, which had waited by then. So
    what the kernels before that one wrote is there without waiting, and may be read. Nothing is
    written without waiting.
    """
    if const_expr(PDL):
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()


@cute.jit
def power_of_two(exponent: Int32) -> Float32:
    """``2^exponent`` for an exponent that is not positive, 0 where it is below -126."""
    bits = (exponent + 127) << 23
    bits = bits if exponent > -127 else Int32(0)
    return bits.bitcast(Float32)


@cute.jit
def unit_parts(
    mTiles: cute.Tensor, sequence: Int32, unit: Int32, sequence_units: Int32
) -> tuple[Int32, Int32]:
    """The slot of the first part of a unit of the sequence, and how many parts it has."""
    share = mTiles[0]
    start = mTiles[sequence + 1]
    tiles = mTiles[sequence + 2] - start
    first = start * sequence_units + unit * tiles
    cta = first // share
    count = (first + tiles - 1) // share - cta + 1 if tiles > 0 else Int32(0)
    return cta + sequence * sequence_units + unit, count


def fake_pages(dtype: type[cutlass.Numeric]) -> PagedTensors:
    """Stand-in for pages, to compile with."""
    return PagedTensors(
        *(fake_flat(dtype) for _ in range(2)),
        fake_flat(Int32, alignment=4),
        *(Int64(8) for _ in range(6)),
        *(Int32(1) for _ in range(2)),
    )


def page_arguments(pool: Pool, table: Tensor) -> PagedTensors:
    """``pool`` and its table as a kernel takes them; strides are kept, nothing is copied."""
    k, v = (flat_pool(name, x) for name, x in (("k pages", pool.k), ("v pages", pool.v)))
    return PagedTensors(
        k, v, table.view(-1), *pool.k.stride()[:3], *pool.v.stride()[:3],
        pool.k.shape[1], table.shape[1],
    )  # fmt: skip


def flat_pool(name: str, x: Tensor) -> Tensor:
    """The memory of ``x (pages, rows, H_kv, D)`` as one dimension."""
    if x.stride(3) != 1 or any(s % VECTOR for s in x.stride()[:3]) or not is_aligned(x):
        raise ValueError(
            f"{name} has strides {x.stride()} and address {x.data_ptr()}; channels must be "
            f"adjacent, other strides multiples of {VECTOR}, and the address of 16 bytes"
        )
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((span,), (1,))
