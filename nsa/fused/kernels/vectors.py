"""What the memory-bound kernels share: 16-byte loads and stores, and how tensors reach them.

A kernel gets each tensor as one flat dimension. Row-major offsets are then computed in 64 bits in
the kernel, and no stride of a dimension of size 1, which PyTorch leaves free, can mislead it. Where
rows may lie apart, as in a slice of heads, the elements from row to row are an argument.
"""

import math

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from torch import Tensor

# Elements that a thread handles at once: one 16-byte access of a 16-bit dtype, two of float32.
VECTOR = 8
_ALIGNMENT = 16

CUTE_DTYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.int32: cutlass.Int32,
}
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cute.jit
def load_vector(mX: cute.Tensor, offset: Int64) -> cute.Tensor:
    """Elements ``offset .. offset + VECTOR - 1`` in registers; ``offset`` a multiple of VECTOR."""
    rX = cute.make_rmem_tensor(VECTOR, mX.element_type)
    cute.autovec_copy(_vector_view(mX, offset), rX)
    return rX


@cute.jit
def store_vector(value: cute.TensorSSA, mX: cute.Tensor, offset: Int64):
    """Round ``value`` to the dtype of ``mX`` and store it at ``offset``."""
    rX = cute.make_rmem_tensor(VECTOR, mX.element_type)
    rX.store(value.to(mX.element_type))
    cute.autovec_copy(rX, _vector_view(mX, offset))


@cute.jit
def copy_vector(mX: cute.Tensor, offset: Int64, sVector: cute.Tensor, wanted: Boolean):
    """Start to copy a vector to shared memory, past L1, or zeros; part of a cp.async group."""
    operation = cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL)
    bits = VECTOR * mX.element_type.width
    atom = cute.make_copy_atom(operation, mX.element_type, num_bits_per_copy=bits)
    pointer = mX.iterator + cute.assume(offset, divby=VECTOR)
    vector = cute.make_tensor(pointer, cute.make_layout(((VECTOR, 1),)))
    predicate = cute.make_rmem_tensor(1, Boolean)
    predicate[0] = wanted
    cute.copy(atom, vector, sVector, pred=predicate)


@cute.jit
def load_shared(sVector: cute.Tensor) -> cute.TensorSSA:
    """What :func:`copy_vector` copied, in float32."""
    vector = cute.make_rmem_tensor(VECTOR, sVector.element_type)
    cute.autovec_copy(cute.group_modes(sVector, 0, 1), vector)
    return vector.load().to(Float32)


@cute.jit
def _vector_view(mX: cute.Tensor, offset: Int64) -> cute.Tensor:
    # Without the assumption the pointer's alignment is lost and the access is element by element.
    pointer = mX.iterator + cute.assume(offset, divby=VECTOR)
    return cute.make_tensor(pointer, cute.make_layout(VECTOR))


@cute.jit
def exchange_in_quad(words: cute.Tensor, lane: Int32) -> cute.Tensor:
    """Word ``w`` of thread ``t`` of a quad becomes word ``t`` of thread ``w``.

    A thread has 2 of each 8 columns; then it has 8 neighbours, or the other way round.
    """
    for bit in cutlass.range_constexpr(2):
        step = const_expr(1 << bit)
        low = lane & step == 0
        for i in (0, 3 - step):
            here, there = words[i], words[i + step]
            got = cute.arch.shuffle_sync_bfly(there if low else here, step)
            words[i] = here if low else got
            words[i + step] = got if low else there
    return words


def load_peer(sX: cute.Tensor, place: Int32, peer: int, cluster: int) -> cute.Numeric:
    """Element ``place`` of what CTA ``peer`` of the cluster has where this one has ``sX``."""
    pointer = of_peer(sX.iterator, peer, cluster) + place
    rX = cute.make_rmem_tensor(1, sX.element_type)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(1)), rX)
    return rX[0]


def of_peer(pointer: cute.Pointer, peer: int, cluster: int) -> cute.Pointer:
    """Where CTA ``peer`` of the cluster has what ``pointer`` points to."""
    return cute.arch.map_dsmem_ptr(pointer, Int32(peer)) if cluster > 1 else pointer


@cute.jit
def dot(a: cute.TensorSSA, b: cute.TensorSSA) -> Float32:
    """Sum of products of two float32 vectors."""
    total = (a * b).reduce(cute.ReductionOp.ADD, init_val=Float32(0.0), reduction_profile=0)
    return Float32(total)


def fake_flat(dtype: type[cutlass.Numeric] | None, alignment: int = _ALIGNMENT):
    """Stand-in for a flat tensor of any length, to compile with; None for no tensor.

    Tensors of different lengths need one each: where it is used twice, lengths must agree.
    """
    if dtype is None:
        return None
    shape = (cute.sym_int64(),)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=(1,), assumed_align=alignment)


def flat(x: Tensor | None) -> Tensor | None:
    """``x`` as one dimension, copied only where it is not contiguous or not 16-byte aligned."""
    if x is None:
        return None
    x = x.contiguous()
    if not is_aligned(x):
        x = x.clone()
    return x if x.ndim == 1 else x.view(-1)


def flat_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """The memory of ``x (..., H, D)`` as one dimension, and the elements from row to row.

    ``x`` is not empty. It is copied only where the elements of a row are not adjacent or not
    16-byte aligned; a slice of heads is not copied. None gives (None, 0).
    """
    if x is None:
        return None, 0
    heads, head_dim = x.shape[-2:]
    width = heads * head_dim
    if x.is_contiguous() and is_aligned(x):
        return x.view(-1), width
    x = _rows(x)
    if not _has_flat_rows(x):
        x = x.clone(memory_format=torch.contiguous_format)
    rows = x.shape[0]
    stride = x.stride(0) if rows > 1 else width
    return x.as_strided(((rows - 1) * stride + width,), (1,)), stride


def _rows(x: Tensor) -> Tensor:
    """``(..., H, D)`` as ``(R, H, D)``, copied where that is no view."""
    return x if x.ndim == 3 else x.flatten(0, -3)


def _has_flat_rows(x: Tensor) -> bool:
    rows, heads, head_dim = x.shape
    adjacent = x.stride(2) == 1 and (heads == 1 or x.stride(1) == head_dim)
    return adjacent and (rows == 1 or x.stride(0) % VECTOR == 0) and is_aligned(x)


def check_output(name: str, x: Tensor) -> None:
    """Raise unless a kernel can write ``x (..., H, D)`` where it is: rows as in ``flat_rows``."""
    if x.numel() == 0 or (x.is_contiguous() and is_aligned(x)):
        return
    rows = _rows(x)
    copied = rows.data_ptr() != x.data_ptr()
    apart = rows.shape[0] <= 1 or rows.stride(0) >= math.prod(rows.shape[1:])
    if copied or not (_has_flat_rows(rows) and apart):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, strides {x.stride()} and address {x.data_ptr()}; "
            "it is written in place: heads and channels must be contiguous, rows must not overlap "
            f"and start at multiples of {VECTOR} elements, and the address of {_ALIGNMENT} bytes"
        )


def check_added(name: str, x: Tensor, out: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise unless ``x (..., R, H, D)`` has at most as many rows as ``out``, and one of
    ``dtypes``."""
    *leading, rows, heads, dim = out.shape
    fits = x.shape[:-3] == out.shape[:-3] and x.shape[-2:] == out.shape[-2:]
    if not fits or x.ndim != out.ndim or x.shape[-3] > rows or x.dtype not in dtypes:
        raise ValueError(
            f"{name} is {tuple(x.shape)} of {x.dtype}; it must be "
            f"{(*leading, f'at most {rows}', heads, dim)} of one of {dtypes}"
        )


def is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % _ALIGNMENT == 0


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``x`` has this shape, dtype and device."""
    if x.shape != shape or x.dtype != dtype or x.device != device:
        seen, wanted = (tuple(x.shape), x.dtype, x.device), (tuple(shape), dtype, device)
        raise ValueError(f"{name} is (shape, dtype, device) {seen}; it must be {wanted}")


def check_float(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is on a GPU in a dtype that the kernels are written for."""
    if x.dtype not in FLOAT_DTYPES or not x.is_cuda:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}; it must be one of {FLOAT_DTYPES} on a GPU"
        )
