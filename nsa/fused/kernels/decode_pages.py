"""Keys and values in pages, as the kernels of decoding take them."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op
from torch import Tensor

from nsa.fused.decode_inputs import Pool
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import VECTOR, fake_flat, is_aligned

# Keys and values that are read once leave L2 first.
_EVICT_FIRST = 0x12F0000000000000
_EVICT_LAST = 0x14F0000000000000


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


@dsl_user_op
def copy_once(target: cute.Pointer, source: cute.Pointer, valid: Boolean, *, loc=None, ip=None):
    """Start to copy 16 bytes to shared memory, zeros where not ``valid``; L2 need not keep them."""
    size = Int32(valid) * 16
    llvm.inline_asm(
        None,
        [
            target.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            source.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            size.ir_value(loc=loc, ip=ip),
            Int64(_EVICT_FIRST).ir_value(loc=loc, ip=ip),
        ],
        "cp.async.cg.shared.global.L2::cache_hint [$0], [$1], 16, $2, $3;",
        "r,l,r,l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@dsl_user_op
def prefetch(pointer: cute.Pointer, *, loc=None, ip=None):
    """Bring the 128 bytes around an address to L2. Nothing is read, so no time is too early."""
    llvm.inline_asm(
        None,
        [pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)],
        "prefetch.global.L2 [$0];",
        "l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@dsl_user_op
def discard(pointer: cute.Pointer, *, loc=None, ip=None):
    """Drop 128 bytes, which begin at such an address, from L2 without writing them to memory."""
    llvm.inline_asm(
        None,
        [pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip)],
        "discard.global.L2 [$0], 128;",
        "l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


@dsl_user_op
def store_kept(pointer: cute.Pointer, x0, x1, x2, x3, *, loc=None, ip=None):
    """Store 16 bytes that L2 is to keep."""
    llvm.inline_asm(
        None,
        [
            pointer.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
            *(x.ir_value(loc=loc, ip=ip) for x in (x0, x1, x2, x3)),
            Int64(_EVICT_LAST).ir_value(loc=loc, ip=ip),
        ],
        "st.global.L2::cache_hint.v4.f32 [$0], {$1, $2, $3, $4}, $5;",
        "l,f,f,f,f,l",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


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
