"""How the kernels around the gates tile tensors ``(R, H, D)``.

A CTA keeps to one head, so that what belongs to the head stays in registers. ``threads_per_row``
neighbouring threads share a row, VECTOR elements each; a CTA handles ``rows_per_step`` rows at once
and ``chunks`` CTAs of a head take the steps in turn.

A tensor may have a ``Placement`` (``kernel_inputs``): its rows then lie where an index says.
A kernel gets the flat index and the numbers of the placement, its layout, see :class:`Places`; both
are None for rows that follow each other.
"""

import functools
import math
import operator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import WARP
from nsa.fused.kernel_inputs import IN_ORDER, Placement, Placements
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import VECTOR, check_float, check_tensor, fake_flat, load_vector

MAX_HEAD_DIM = WARP * VECTOR
THREADS = 128

# Some 4 fit at a time: several rounds, so that the last one, part empty, costs little.
_CTAS_PER_SM = 32


@mlir_namedtuple
class Places(NamedTuple):
    """The placements of the compressed and the selected branch, as a kernel gets them."""

    cmp: cute.Tensor | None
    slc: cute.Tensor | None
    cmp_layout: tuple[Int32, Int32, Int32, Int32] | None
    slc_layout: tuple[Int32, Int32, Int32, Int32] | None


@mlir_namedtuple
class HeadSizes(NamedTuple):
    """Rows and heads of the tensors, and CTAs that share the rows of a head."""

    rows: Int32
    heads: Int32
    chunks: Int32


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

    @cute.jit
    def __call__(
        self, tensors: tuple, places: Places, strides: cute.Stride, sizes: HeadSizes, stream
    ):
        self.kernel(tensors, places, strides, sizes).launch(
            grid=[sizes.chunks * sizes.heads, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    def num_chunks(self, x: Tensor) -> int:
        """CTAs of a head of ``x (..., H, D)``: enough for the GPU, no more than steps of rows."""
        rows, heads = math.prod(x.shape[:-2]), x.shape[-2]
        return num_ctas(math.ceil(rows / self.rows_per_step), heads, x.device)

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

    def load_places(self, mPlaces, step: Int32, first: Int32, rows: Int32) -> list[tuple]:
        """The places of each row of a step, None for a tensor whose rows follow each other.

        Loaded together and first, because the loads of vectors wait for them.
        """

        def load(mPlace, u: int):
            if mPlace is None:
                return None
            row = step * self.rows_per_step + u * self.rows_in_parallel + first
            return mPlace[Int64(cutlass.min(row, rows - 1))]

        return [tuple(load(x, u) for x in mPlaces) for u in range(self.rows_in_flight)]

    def in_place(self, layout, head: Int32, column: Int32) -> Int32:
        """Elements from a row's place to this thread's column of its head."""
        if layout is None:
            return head * self.head_dim + column
        return vector_of(layout, head) * self.head_dim + column

    def offset(self, place, layout, row: Int64, stride: Int64, in_place: Int32) -> Int64:
        """Where this thread's vector of a row is; at place 0 where the row has none."""
        if place is None:
            return row * stride + in_place
        return Int64(cutlass.max(place, 0)) * (layout[0] * self.head_dim) + in_place

    @cute.jit
    def clear_unplaced(self, fragment: cute.Tensor, place: Int32 | None):
        """Make what was loaded for a row without a place 0.

        After the load, not instead: a load under a condition would wait. What it read may be NaN.
        """
        if const_expr(place is not None):
            words = cute.recast_tensor(fragment, Int32)
            for i in cutlass.range_constexpr(cute.size(words)):
                words[i] = words[i] if place >= 0 else Int32(0)

    @cute.jit
    def row_sum(self, value: Float32, active: Boolean) -> Float32:
        """Sum over the threads of a row, in each of them."""
        if const_expr(not self.is_even):
            value = value if active else Float32(0.0)
        return cute.arch.warp_reduction(value, operator.add, threads_in_group=self.threads_per_row)

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


def num_ctas(steps: int, heads: int, device: torch.device) -> int:
    """CTAs that share the ``steps`` of a head: enough for the GPU, no more than there are steps."""
    return min(steps, max(1, sm_count(device) * _CTAS_PER_SM // heads))


def vector_of(layout, head: Int32) -> Int32:
    """Vectors from a row's place to those of a head."""
    _, group, group_stride, head_stride = layout
    return head // group * group_stride + head % group * head_stride


@functools.lru_cache(maxsize=None)
def sm_count(device: torch.device) -> int:
    """Processors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_head_rows(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is ``(..., H, D)`` in a dtype and head dimension that the kernels have."""
    check_float(name, x)
    if x.ndim < 3 or x.shape[-1] % VECTOR or not 0 < x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (..., H, D) with D a multiple of "
            f"{VECTOR} up to {MAX_HEAD_DIM}"
        )


PLACED = ((False, False), (False, True), (True, True))
"""Which of the compressed and selected branch may have a placement."""


def fake_places(placed: tuple[bool, bool]) -> Places:
    """Stand-ins for the placements, to compile with."""
    indices = (fake_flat(Int32, alignment=4) if is_placed else None for is_placed in placed)
    return Places(*indices, *(_fake_layout() if is_placed else None for is_placed in placed))


def _fake_layout() -> tuple[Int32, ...]:
    return (Int32(1),) * (len(Placement._fields) - 1)


_NO_PLACES = Places(None, None, None, None)


def place_arguments(placements: Placements) -> Places:
    """What :func:`fake_places` stands for."""
    if placements is IN_ORDER:
        return _NO_PLACES
    indices = (None if p is None else p.place for p in placements)
    return Places(*indices, *(None if p is None else tuple(p[1:]) for p in placements))


def fake_sizes() -> HeadSizes:
    return HeadSizes(*(Int32(1) for _ in range(3)))


def are_placed(placements: Placements) -> tuple[bool, bool]:
    compressed, selected = placements
    return compressed is not None, selected is not None


def check_branch(name: str, x: Tensor, placement: Placement | None, like: Tensor) -> None:
    """Raise unless ``x`` is as ``like (..., H, D)``, or with a placement contiguous ``(..., D)``.

    Places are not looked at: they are on the GPU.
    """
    if placement is None:
        check_tensor(name, x, like.shape, like.dtype, like.device)
        return
    check_tensor(name, x, (*x.shape[:-1], like.shape[-1]), like.dtype, like.device)
    check_placement(name, x, placement, like)


def check_placement(name: str, x: Tensor, placement: Placement, like: Tensor) -> None:
    """Raise unless ``x`` is contiguous and its placement is of the rows of ``like (..., H, D)``."""
    *leading, heads, _ = like.shape
    place = placement.place
    if place is not None:
        rows = (math.prod(leading),)
        check_tensor(f"the place of {name}", place, rows, torch.int32, like.device)
    if not (x.is_contiguous() and (place is None or place.is_contiguous())):
        raise ValueError(f"{name} and its place must be contiguous; strides are {x.stride()}")
    if heads % placement.group or not x.numel():
        raise ValueError(
            f"{name} of shape {tuple(x.shape)} has groups of {placement.group} heads; it must not "
            f"be empty, and {heads} heads be so many groups"
        )
