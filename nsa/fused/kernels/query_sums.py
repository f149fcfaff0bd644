"""Gradient of the queries from float32 sums of FlashAttention-4's backwards, in one pass.

``dq = scale * sums + dq_slc + sum_i dlogits[i] * weight[h, i]`` per row and head, rounded once, as
:mod:`nsa.fused.kernels.query_gradient` has it from gradients that are rounded already.

The sums lie in the order in which threads have them after a wgmma, see
:class:`nsa.fused.fa4_variants.SumsOrder`. A warp takes 16 rows and 32 columns: it loads 512
neighbouring bytes of sums at once, and brings vectors of ``dq_slc`` into their order, and results
out of it, by exchanges in quads. A CTA keeps to one head, so that weights stay in registers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.fa4_variants import sums_order
from nsa.fused.hardware import QUAD, WARP, WARP_ROWS, WGMMA_ROWS
from nsa.fused.kernel_inputs import OtherGradients
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.head_rows import check_head_rows, num_ctas
from nsa.fused.kernels.hopper import cvt_f16, mlir_namedtuple, store_v4
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_output,
    check_tensor,
    exchange_in_quad,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
)

_COLUMNS = QUAD * VECTOR
_MOST_WARPS = 16
# Blocks of 16 rows whose loads a thread issues together.
_IN_FLIGHT = 2


@mlir_namedtuple
class OtherTensors(NamedTuple):
    """What the gradient has beside that of the selected branch: sums, and those of the gates."""

    sums: cute.Tensor
    dlogits: cute.Tensor | None
    weight: cute.Tensor | None


def fake_others(element: type[cutlass.Numeric], *, with_weight: bool) -> OtherTensors:
    """Stand-ins, to compile with."""
    weight = (fake_flat(Float32), fake_flat(element)) if with_weight else (None, None)
    return OtherTensors(fake_flat(Float32), *weight)


@cute.jit
def load_sums(others: OtherTensors, place: Int64, lane: Int32) -> cute.Tensor:
    """A thread's sums of a row and 32 columns, which begin at ``place``: Float32 ``(8,)``, two
    columns of each of four vectors."""
    sums = cute.make_rmem_tensor(VECTOR, Float32)
    for j in cutlass.range_constexpr(QUAD):
        offset = place + (j * WGMMA_ROWS * VECTOR + lane % QUAD * 4)
        pair = _load_pair(others.sums, offset)
        for e in cutlass.range_constexpr(2):
            sums[2 * j + e] = pair[e]
    return sums


def load_dlogits(others: OtherTensors, row_head: Int64) -> list[Float32]:
    """Those of a row, if gates depend on queries."""
    if others.weight is None:
        return []
    return [others.dlogits[row_head * 3 + i] for i in range(3)]


@cute.jit
def gate_terms(
    others: OtherTensors,
    dlogits: list[Float32],
    head_dim: cutlass.Constexpr[int],
    head: Int32,
    group: Int32,
    lane: Int32,
) -> cute.TensorSSA:
    """What the gates add to the gradient of 32 columns, as :func:`load_sums` has them."""
    value = cute.full(VECTOR, 0.0, Float32)
    for i in cutlass.range_constexpr(len(dlogits)):
        weight = cute.make_rmem_tensor(VECTOR, Float32)
        first = (head * 3 + i) * head_dim + group * _COLUMNS + lane % QUAD * 2
        for j in cutlass.range_constexpr(QUAD):
            pair = _load_pair(others.weight, Int64(first + j * VECTOR))
            for e in cutlass.range_constexpr(2):
                weight[2 * j + e] = Float32(pair[e])
        value = value + weight.load() * dlogits[i]
    return value


@cute.jit
def _load_pair(mX: cute.Tensor, offset: Int64) -> cute.Tensor:
    rX = cute.make_rmem_tensor(2, mX.element_type)
    pointer = mX.iterator + cute.assume(offset, divby=2)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(2)), rX)
    return rX


def sums_place(head_dim: int, head: Int32, row: Int32, group: Int32, blocks: Int32) -> Int64:
    """Where the sums of a row and 32 columns begin; ``head`` has ``blocks`` of 16 rows."""
    order = sums_order(head_dim)
    tile, in_tile = row // order.rows, row % order.rows
    part_groups = order.columns // _COLUMNS
    part = in_tile // WGMMA_ROWS + group // part_groups
    rows = Int64(head) * (blocks * WARP_ROWS) + tile * order.rows
    within = part * (WGMMA_ROWS * order.columns)
    within += group % part_groups * (QUAD * WGMMA_ROWS * VECTOR)
    in_part = in_tile % WGMMA_ROWS
    within += in_part // WARP_ROWS * (WARP * 4) + in_part % (WARP_ROWS // 2) * (QUAD * 4)
    return rows * head_dim + within + in_part // (WARP_ROWS // 2) % 2 * 2


@mlir_namedtuple
class _Tensors(NamedTuple):
    sums: cute.Tensor
    dq_slc: cute.Tensor
    dlogits: cute.Tensor | None
    weight: cute.Tensor | None
    dq: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """``blocks`` of 16 rows have an entry's ``length`` rows, in whole tiles; ``chunks`` CTAs share
    the rows of a head."""

    batch: Int32
    length: Int32
    heads: Int32
    blocks: Int32
    chunks: Int32


class GradientOfSums:
    """``strides`` are the elements from row to row of ``dq_slc`` and ``dq``, which may be one: a
    thread reads its elements before it writes them."""

    def __init__(self, dtype: type[cutlass.Numeric], head_dim: int):
        self.dtype = dtype
        self.head_dim = head_dim
        self.groups = head_dim // _COLUMNS
        # Whole tiles, so that CTAs read long pieces of sums.
        self.blocks_in_parallel = min(_MOST_WARPS // self.groups, WGMMA_ROWS // WARP_ROWS)
        self.threads = WARP * self.groups * self.blocks_in_parallel
        self.blocks_per_step = self.blocks_in_parallel * _IN_FLIGHT

    @cute.jit
    def __call__(
        self, tensors: _Tensors, strides: cute.Stride, sizes: _Sizes, scale: Float32, stream
    ):
        self.kernel(tensors, strides, sizes, scale).launch(
            grid=[sizes.chunks * sizes.heads, 1, 1], block=[self.threads, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, strides: cute.Stride, sizes: _Sizes, scale: Float32):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        head, chunk = bidx % sizes.heads, bidx // sizes.heads
        warp, lane = tidx // WARP, tidx % WARP
        group, parallel = warp % self.groups, warp // self.groups
        # This thread's vector in memory; its columns in the order of the sums.
        in_row = head * self.head_dim + group * _COLUMNS + lane % QUAD * VECTOR
        rW = self._load_weight(tensors.weight, head, group, lane)
        total = sizes.batch * sizes.blocks
        for step in cutlass.range(chunk, cute.ceil_div(total, self.blocks_per_step), sizes.chunks):
            loaded = []
            for u in cutlass.range_constexpr(_IN_FLIGHT):
                block = (step * _IN_FLIGHT + u) * self.blocks_in_parallel + parallel
                # Past the end, the last one is read again: a load under a condition would wait.
                known = cutlass.min(block, total - 1)
                entry = known // sizes.blocks
                in_entry = known - entry * sizes.blocks
                place = sums_place(
                    *(self.head_dim, entry * sizes.heads + head),
                    *(in_entry * WARP_ROWS, group, sizes.blocks),
                )
                sums = [
                    _load_sums(tensors.sums, place + j * (WGMMA_ROWS * VECTOR) + lane * 4)
                    for j in range(QUAD)
                ]
                rows = []
                for half in cutlass.range_constexpr(2):
                    row = in_entry * WARP_ROWS + half * (WARP_ROWS // 2) + lane // QUAD
                    source = Int64(entry) * sizes.length + cutlass.min(row, sizes.length - 1)
                    dlogits = ()
                    if const_expr(tensors.weight is not None):
                        first = (source * sizes.heads + head) * 3
                        dlogits = tuple(tensors.dlogits[first + i] for i in range(3))
                    slc = load_vector(tensors.dq_slc, source * strides[0] + in_row)
                    wanted = block < total and row < sizes.length
                    rows.append((source, wanted, dlogits, slc))
                loaded.append((sums, rows))
            for u in cutlass.range_constexpr(_IN_FLIGHT):
                sums, rows = loaded[u]
                for half in cutlass.range_constexpr(2):
                    source, wanted, dlogits, slc = rows[half]
                    words = exchange_in_quad(cute.recast_tensor(slc, Int32), lane)
                    branch = cute.recast_tensor(words, self.dtype).load().to(Float32)
                    dq = cute.make_rmem_tensor(VECTOR, Float32)
                    for j in cutlass.range_constexpr(QUAD):
                        for e in cutlass.range_constexpr(2):
                            dq[2 * j + e] = sums[j][2 * half + e] * scale
                    value = dq.load() + branch
                    if const_expr(tensors.weight is not None):
                        for i in cutlass.range_constexpr(3):
                            value = value + rW[None, i].load() * dlogits[i]
                    dq.store(value)
                    rounded = cute.recast_tensor(cvt_f16(dq, self.dtype), Int32)
                    words = exchange_in_quad(rounded, lane)
                    if wanted:
                        target = cute.assume(source * strides[1] + in_row, divby=VECTOR)
                        pointer = tensors.dq.iterator + target
                        store_v4(pointer, *(words[w] for w in range(QUAD)))

    @cute.jit
    def _load_weight(
        self, mWeight: cute.Tensor | None, head: Int32, group: Int32, lane: Int32
    ) -> cute.Tensor:
        """The three weights at this thread's columns of the sums, in float32; or 0."""
        rW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rW.fill(0.0)
        if const_expr(mWeight is not None):
            for i in cutlass.range_constexpr(3):
                first = (head * 3 + i) * self.head_dim + group * _COLUMNS + lane % QUAD * 2
                for j in cutlass.range_constexpr(QUAD):
                    for e in cutlass.range_constexpr(2):
                        rW[2 * j + e, i] = Float32(mWeight[first + j * VECTOR + e])
        return rW


@cute.jit
def _load_sums(mSums: cute.Tensor, offset: Int64) -> cute.Tensor:
    """Two neighbours of a row, then two of the 8th row after it."""
    rSums = cute.make_rmem_tensor(4, Float32)
    pointer = mSums.iterator + cute.assume(offset, divby=4)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(4)), rSums)
    return rSums


@kept
def compile_gradient(dtype: torch.dtype, head_dim: int, with_weight: bool) -> Callable:
    """The compiled kernel of a dtype and head dimension, with or without gates from a weight."""
    element = CUTE_DTYPES[dtype]
    return compile_kernel(
        GradientOfSums(element, head_dim),
        _Tensors(
            fake_flat(Float32),
            fake_flat(element),
            fake_flat(Float32 if with_weight else None),
            fake_flat(element if with_weight else None),
            fake_flat(element),
        ),
        (Int64(1),) * 2,
        _Sizes(*(Int32(1) for _ in range(5))),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 96, 128, 256):
            for with_weight in (False, True):
                name = f"{str(dtype).removeprefix('torch.')}-{head_dim}"
                compiled = functools.partial(compile_gradient, dtype, head_dim, with_weight)
                yield f"gradient-of-sums-{name}{'-weight' if with_weight else ''}", compiled


def gradient_of_sums(
    sums: Tensor,
    dq_slc: Tensor,
    dlogits: Tensor | None,
    weight: Tensor | None,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.gradient_of_sums`."""
    _check(sums, dq_slc, dlogits, weight, out)
    if out is None:
        out = torch.empty(dq_slc.shape, dtype=dq_slc.dtype, device=dq_slc.device)
    if out.numel() == 0:
        return out
    batch, length, heads, head_dim = dq_slc.shape
    (flat_slc, slc_stride), (dq, stride) = flat_rows(dq_slc), flat_rows(out)
    kernel = compile_gradient(dq_slc.dtype, head_dim, weight is not None)
    blocks = sums.shape[-1] // head_dim // WARP_ROWS
    geometry = GradientOfSums(CUTE_DTYPES[dq_slc.dtype], head_dim)
    steps = -(-batch * blocks // geometry.blocks_per_step)
    # A CTA has as many warps as several of those that this counts.
    chunks = max(1, num_ctas(steps, heads, dq_slc.device) // geometry.blocks_in_parallel)
    sizes = _Sizes(batch, length, heads, blocks, chunks)
    tensors = _Tensors(flat(sums), flat_slc, flat(dlogits), flat(weight), dq)
    kernel(tensors, (slc_stride, stride), sizes, scale)
    return out


def other_arguments(
    others: OtherGradients | None, tokens: int, head_dim: int
) -> tuple[OtherTensors | None, int, int]:
    """Tensors for a kernel, the tokens of an entry and its blocks of 16 rows."""
    if others is None:
        return None, tokens, 0
    sums, dlogits, weight, _ = others
    tensors = OtherTensors(flat(sums), flat(dlogits), flat(weight))
    return tensors, tokens // sums.shape[0], sums.shape[-1] // head_dim // WARP_ROWS


def check_others(others: OtherGradients, q: Tensor) -> None:
    """Raise unless these are of ``q (T, H, D)``, the tokens of all entries."""
    batch = others.sums.shape[0]
    _check(others.sums, q.detach().unflatten(0, (batch, -1)), *others[1:])


def _check(sums, dq_slc, dlogits, weight, out) -> None:
    """Raise on what the kernel cannot take."""
    check_head_rows("dq_slc", dq_slc)
    batch, length, heads, head_dim = dq_slc.shape
    rows = sums_order(head_dim).rows
    wanted = (batch, heads, -(-length // rows) * rows * head_dim)
    check_tensor("sums", sums, wanted, torch.float32, dq_slc.device)
    if (dlogits is None) != (weight is None):
        missing = "dlogits" if dlogits is None else "weight"
        raise ValueError(f"{missing} is None; dlogits and weight must both be given or neither")
    like = (dq_slc.dtype, dq_slc.device)
    if weight is not None:
        check_tensor("dlogits", dlogits, (batch, length, heads, 3), torch.float32, dq_slc.device)
        check_tensor("weight", weight, (heads, 3, head_dim), *like)
    if out is not None:
        check_tensor("out", out, dq_slc.shape, *like)
        check_output("out", out)
