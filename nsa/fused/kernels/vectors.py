"""What the memory-bound kernels share: 16-byte loads and stores, and how tensors reach them.

A kernel gets each tensor as one flat dimension. Row-major offsets are then computed in 64 bits in
the kernel, and no stride of a dimension of size 1, which PyTorch leaves free, can mislead it.
"""

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64
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
def _vector_view(mX: cute.Tensor, offset: Int64) -> cute.Tensor:
    # Without the assumption the pointer's alignment is lost and the access is element by element.
    pointer = mX.iterator + cute.assume(offset, divby=VECTOR)
    return cute.make_tensor(pointer, cute.make_layout(VECTOR))


@cute.jit
def dot(a: cute.TensorSSA, b: cute.TensorSSA) -> Float32:
    """Sum of products of two float32 vectors."""
    return (a * b).reduce(cute.ReductionOp.ADD, init_val=Float32(0.0), reduction_profile=0)


def fake_flat(dtype: type[cutlass.Numeric] | None, alignment: int = _ALIGNMENT):
    """Stand-in for a flat tensor of any length, to compile with; None for no tensor."""
    if dtype is None:
        return None
    shape = (cute.sym_int64(),)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=(1,), assumed_align=alignment)


def compile_kernel(kernel, *arguments):
    """Compile ``kernel(*arguments, stream)``; the stream is the current one of PyTorch."""
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments, stream, options="--enable-tvm-ffi")


def flat(x: Tensor | None) -> Tensor | None:
    """``x`` as one dimension, copied only where it is not contiguous or not 16-byte aligned."""
    if x is None:
        return None
    x = x.contiguous()
    return (x if is_aligned(x) else x.clone()).view(-1)


def is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % _ALIGNMENT == 0


def check_tensor(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless ``x`` has this shape, dtype and device."""
    seen, wanted = (tuple(x.shape), x.dtype, x.device), (tuple(shape), dtype, device)
    if seen != wanted:
        raise ValueError(f"{name} is (shape, dtype, device) {seen}; it must be {wanted}")


def check_float(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is on a GPU in a dtype that the kernels are written for."""
    if x.dtype not in FLOAT_DTYPES or not x.is_cuda:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}; it must be one of {FLOAT_DTYPES} on a GPU"
        )
