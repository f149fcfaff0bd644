"""How the kernels around the gates tile tensors ``(R, H, D)``.

A CTA keeps to one head, so that what belongs to the head stays in registers. ``threads_per_row``
neighbouring threads share a row, VECTOR elements each; a CTA handles ``rows_per_step`` rows at once
and ``chunks`` CTAs of a head take the steps in turn.
"""

import math

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.kernels.vectors import VECTOR, check_float, load_vector

MAX_HEAD_DIM = 32 * VECTOR
THREADS = 128

# Some 4 fit at a time: several rounds, so that the last one, part empty, costs little.
_CTAS_PER_SM = 32


class HeadRows:
    """Geometry of a kernel that issues the loads of ``rows_in_flight`` rows a thread together."""

    def __init__(self, head_dim: int, rows_in_flight: int):
        self.head_dim = head_dim
        self.rows_in_flight = rows_in_flight
        vectors = head_dim // VECTOR
        self.threads_per_row = 1 << math.ceil(math.log2(vectors))
        self.is_even = self.threads_per_row == vectors
        self.rows_in_parallel = THREADS // self.threads_per_row
        self.rows_per_step = self.rows_in_parallel * rows_in_flight

    def num_chunks(self, x: Tensor) -> int:
        """CTAs of a head of ``x (R, H, D)``: enough for the GPU, no more than steps of rows."""
        rows, heads, _ = x.shape
        sm_count = torch.cuda.get_device_properties(x.device).multi_processor_count
        steps = math.ceil(rows / self.rows_per_step)
        return min(steps, max(1, sm_count * _CTAS_PER_SM // heads))

    @cute.jit
    def place(self, heads: Int32) -> tuple[Int32, Int32, Int32, Int32, Boolean]:
        """This thread's (head, chunk, first row of a step, column, whether it has a column)."""
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        column = tidx % self.threads_per_row * VECTOR
        active = Boolean(True)
        if const_expr(not self.is_even):
            active = column < self.head_dim
            # A thread without a column reads the first one, and what it reads is left out.
            column = column if active else Int32(0)
        # Neighbouring CTAs take neighbouring heads, which are neighbours in memory.
        return bidx % heads, bidx // heads, tidx // self.threads_per_row, column, active

    @cute.jit
    def load_weight(self, mWeight: cute.Tensor | None, head: Int32, column: Int32) -> cute.Tensor:
        """The three vectors of ``weight (H, 3, D)`` at this thread's place, in float32; or 0."""
        rW = cute.make_rmem_tensor((VECTOR, 3), Float32)
        rW.fill(0.0)
        if const_expr(mWeight is not None):
            for i in cutlass.range_constexpr(3):
                offset = Int64((head * 3 + i) * self.head_dim + column)
                rW[None, i].store(load_vector(mWeight, offset).load().to(Float32))
        return rW


def check_head_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is ``(R, H, D)`` in a dtype and head dimension that the kernels have."""
    check_float(name, x)
    if x.ndim != 3 or x.shape[2] % VECTOR or not 0 < x.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (R, H, D) with D a multiple of "
            f"{VECTOR} up to {MAX_HEAD_DIM}"
        )
