"""Sums of columns over rows, alone or of the gradient of an activation that is computed there.

A cluster of CTAs has a tile of columns, and each CTA a part of the rows. The threads of a CTA add
up rows in registers, then across the CTA; one CTA adds up those of its cluster. The order follows
from the shape alone, so results are the same each time, and no memory must be zeroed before.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_tensor,
    fake_flat,
    flat,
    is_aligned,
    load_peer,
)

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("sigmoid", "silu")
_THREADS = 512
_WARPS = _THREADS // WARP
_CLUSTER = 8  # the most CTAs that every GPU takes
# Columns of a tile. Those of the narrowest are a sector of the L2 cache.
_WIDTHS = (64, 32, 16)
_FEWEST_CTAS = 128  # about one for each SM
# Vectors of VECTOR that a thread has under way, and the most rows that are: two CTAs fit an SM.
_LOADS = 4
_MOST_ROWS = 8


@mlir_namedtuple
class _Task(NamedTuple):
    """A tensor ``(parts, rows, columns)`` and its sums ``(parts, columns)``.

    For the gradient of an activation there are also that of its output, in whose place it is
    written, and for silu the output.
    """

    x: cute.Tensor
    dy: cute.Tensor | None
    active: cute.Tensor | None
    sums: cute.Tensor
    parts: Int32
    rows: Int32
    columns: Int32


class ColumnSums:
    """Of one task or two. ``kind`` is an activation, or None for sums of ``x`` itself.

    Threads have ``vector`` columns each, and tiles ``width``.
    """

    def __init__(self, kind: str | None, vector: int, width: int):
        self.kind = kind
        self.vector = vector
        self.width = width
        self.lanes = width // vector
        self.rows_at_once = _THREADS // self.lanes
        loads = _LOADS * VECTOR // vector // (1 if kind is None else 2)
        self.rows_in_flight = min(loads, _MOST_ROWS)

    @cute.jit
    def __call__(self, first: _Task, second: _Task | None, stream):
        tiles = self._tiles(first)
        if const_expr(second is not None):
            tiles += self._tiles(second)
        self.kernel(first, second).launch(
            grid=[tiles * _CLUSTER, 1, 1],
            block=[_THREADS, 1, 1],
            cluster=[_CLUSTER, 1, 1],
            stream=stream,
        )

    @cute.jit
    def _tiles(self, task: _Task) -> Int32:
        return task.parts * cute.ceil_div(task.columns, self.width)

    @cute.kernel
    def kernel(self, first: _Task, second: _Task | None):
        bidx, _, _ = cute.arch.block_idx()
        rank, tile = bidx % _CLUSTER, bidx // _CLUSTER
        smem = cutlass.memory.SmemAllocator()
        sWarps = smem.allocate_tensor(Float32, cute.make_layout(_WARPS * self.width), 16)
        sSums = smem.allocate_tensor(Float32, cute.make_layout(self.width), 16)
        if const_expr(second is None):
            self._sum_tile(first, tile, rank, sWarps, sSums)
        else:
            tiles = self._tiles(first)
            if tile < tiles:
                self._sum_tile(first, tile, rank, sWarps, sSums)
            else:
                self._sum_tile(second, tile - tiles, rank, sWarps, sSums)

    @cute.jit
    def _sum_tile(
        self, task: _Task, tile: Int32, rank: Int32, sWarps: cute.Tensor, sSums: cute.Tensor
    ):
        tidx, _, _ = cute.arch.thread_idx()
        across = cute.ceil_div(task.columns, self.width)
        part, first_column = tile // across, tile % across * self.width
        total = self._sum_rows(task, part, first_column, rank, tidx)
        warp, lane = tidx // WARP, tidx % WARP
        for i in cutlass.range_constexpr(self.vector):
            for bit in cutlass.range_constexpr(int(math.log2(WARP // self.lanes))):
                total[i] += cute.arch.shuffle_sync_bfly(total[i], offset=self.lanes << bit)
        if lane < self.lanes:
            for i in cutlass.range_constexpr(self.vector):
                sWarps[warp * self.width + lane * self.vector + i] = total[i]
        cute.arch.barrier()
        if tidx < self.width:
            whole = Float32(0.0)
            for w in cutlass.range_constexpr(_WARPS):
                whole += sWarps[w * self.width + tidx]
            sSums[tidx] = whole
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        column = first_column + tidx
        if rank == 0 and tidx < self.width and column < task.columns:
            whole = Float32(0.0)
            for peer in cutlass.range_constexpr(_CLUSTER):
                whole += load_peer(sSums, tidx, peer, _CLUSTER)
            task.sums[part * task.columns + column] = whole.to(task.sums.element_type)
        # A CTA's shared memory must be there until its sums are read.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def _sum_rows(
        self, task: _Task, part: Int32, first_column: Int32, rank: Int32, tidx: Int32
    ) -> cute.Tensor:
        """The sums of a thread's columns over its rows of the CTA's."""
        column = first_column + tidx % self.lanes * self.vector
        is_real = column < task.columns
        # Past the end, the last columns and rows are read again: a load under a condition would
        # wait. What they give is dropped.
        column = cutlass.min(column, task.columns - self.vector)
        share = cute.ceil_div(task.rows, _CLUSTER)
        stop = cutlass.min((rank + 1) * share, task.rows)
        total = cute.make_rmem_tensor(self.vector, Float32)
        total.fill(0.0)
        step = const_expr(self.rows_in_flight * self.rows_at_once)
        for begin in cutlass.range(rank * share, stop, step, unroll=1):
            loaded = []
            for u in cutlass.range_constexpr(self.rows_in_flight):
                row = begin + (u * self.rows_at_once + tidx // self.lanes)
                place = Int64(part) * task.rows + cutlass.min(row, stop - 1)
                offset = place * task.columns + column
                dy = None
                if const_expr(self.kind is not None):
                    dy = self._load(task.dy, offset)
                loaded.append((offset, row < stop, self._load(task.x, offset), dy))
            for u in cutlass.range_constexpr(self.rows_in_flight):
                offset, is_row, x, dy = loaded[u]
                if is_row:
                    found, active = self._find(x, dy)
                    for i in cutlass.range_constexpr(self.vector):
                        total[i] += found[i]
                    if is_real:
                        if const_expr(self.kind is not None):
                            self._store(found, task.dy, offset)
                        if const_expr(self.kind == "silu"):
                            self._store(active, task.active, offset)
        return total

    @cute.jit
    def _find(
        self, x: cute.Tensor, dy: cute.Tensor | None
    ) -> tuple[cute.Tensor, cute.Tensor | None]:
        """What is added up, in float32, and for silu what it gives."""
        found = cute.make_rmem_tensor(self.vector, Float32)
        active = None
        if const_expr(self.kind == "silu"):
            active = cute.make_rmem_tensor(self.vector, Float32)
        for i in cutlass.range_constexpr(self.vector):
            value = x[i].to(Float32)
            if const_expr(self.kind is None):
                found[i] = value
            elif const_expr(self.kind == "sigmoid"):
                found[i] = dy[i].to(Float32) * (value * (1.0 - value))
            else:
                # exp2 overflows to infinity where the sigmoid is 0, and its reciprocal is 0.
                power = cute.math.exp2(value * -LOG2_E, fastmath=True)
                share = cute.arch.rcp_approx(1.0 + power)
                active[i] = value * share
                found[i] = dy[i].to(Float32) * (share + active[i] * (1.0 - share))
        return found, active

    @cute.jit
    def _load(self, mX: cute.Tensor, offset: Int64) -> cute.Tensor:
        rX = cute.make_rmem_tensor(self.vector, mX.element_type)
        cute.autovec_copy(self._view(mX, offset), rX)
        return rX

    @cute.jit
    def _store(self, value: cute.Tensor, mX: cute.Tensor, offset: Int64):
        rX = cute.make_rmem_tensor(self.vector, mX.element_type)
        rX.store(value.load().to(mX.element_type))
        cute.autovec_copy(rX, self._view(mX, offset))

    def _view(self, mX: cute.Tensor, offset: Int64) -> cute.Tensor:
        pointer = mX.iterator + cute.assume(offset, divby=self.vector)
        return cute.make_tensor(pointer, cute.make_layout(self.vector))


class Form(NamedTuple):
    """What a kernel is compiled for; see :class:`ColumnSums`. ``tasks`` are 1 or 2."""

    kind: str | None
    dtype: torch.dtype
    vector: int
    width: int
    tasks: int


@kept
def compile_sums(form: Form) -> Callable:
    """The compiled kernel of a form."""
    element = CUTE_DTYPES[form.dtype]

    def task() -> _Task:
        of_gradient = None if form.kind is None else element
        of_silu = element if form.kind == "silu" else None
        return _Task(
            fake_flat(element),
            fake_flat(of_gradient),
            fake_flat(of_silu),
            fake_flat(element, alignment=element.width // 8),
            *(Int32(1),) * 3,
        )

    kernel = ColumnSums(form.kind, form.vector, form.width)
    return compile_kernel(kernel, task(), task() if form.tasks == 2 else None)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    shapes = [(VECTOR, width) for width in _WIDTHS]
    shapes += [(vector, _WIDTHS[-1]) for vector in (4, 2, 1)]
    for dtype in DTYPES:
        for kind, tasks in (*((kind, 1) for kind in KINDS), (None, 1), (None, 2)):
            for shape in shapes:
                form = Form(kind, dtype, *shape, tasks)
                name = f"{kind or 'sums'}-{str(dtype).removeprefix('torch.')}-{shape}-{tasks}"
                yield f"column-sums-{name}", functools.partial(compile_sums, form)


def activation_gradient(kind: str, dy: Tensor, x: Tensor, sums: Tensor) -> Tensor | None:
    """See :func:`nsa.fused.kernel_calls.activation_gradient`."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {KINDS}")
    _check("x", x, sums)
    check_tensor("dy", dy, x.shape, x.dtype, x.device)
    if not (dy.is_contiguous() and is_aligned(dy)):
        raise ValueError(
            f"dy has strides {dy.stride()} and address {dy.data_ptr()}; it is written in place: it "
            "must be contiguous, and the address a multiple of 16 bytes"
        )
    active = x.new_empty(x.shape) if kind == "silu" else None
    if x.numel():
        task = _Task(flat(x), dy.view(-1), flat(active), sums.view(-1), *_sizes(x))
        compile_sums(_form(kind, [x]))(task, None)
    else:
        sums.zero_()
    return active


def column_sums(x: Tensor, sums: Tensor, other: Tensor | None, other_sums: Tensor | None) -> None:
    """See :func:`nsa.fused.kernel_calls.column_sums`."""
    given = [("x", x, sums)]
    if other is not None:
        check_tensor("other", other, other.shape, x.dtype, x.device)
        given.append(("other", other, other_sums))
    for name, each, its_sums in given:
        _check(name, each, its_sums)
        if not each.numel():
            its_sums.zero_()
    given = [(each, its_sums) for _, each, its_sums in given if each.numel()]
    if not given:
        return
    tasks = [
        _Task(flat(each), None, None, its_sums.view(-1), *_sizes(each)) for each, its_sums in given
    ]
    kernel = compile_sums(_form(None, [each for each, _ in given]))
    kernel(tasks[0], tasks[1] if len(tasks) == 2 else None)


def _form(kind: str | None, tensors: list[Tensor]) -> Form:
    """The widest tiles of which there are enough."""
    sizes = [_sizes(x) for x in tensors]
    vector, width = math.gcd(VECTOR, *(columns for _, _, columns in sizes)), _WIDTHS[-1]
    if vector == VECTOR:
        for wide in _WIDTHS:
            tiles = sum(parts * -(-columns // wide) for parts, _, columns in sizes)
            if tiles * _CLUSTER >= _FEWEST_CTAS:
                width = wide
                break
    return Form(kind, tensors[0].dtype, vector, width, len(tensors))


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Parts, rows and columns."""
    return (1, *x.shape) if x.ndim == 2 else x.shape


def _check(name: str, x: Tensor, sums: Tensor) -> None:
    """Raise unless the kernel can read ``x`` and write ``sums``."""
    if x.dtype not in DTYPES or not x.is_cuda or x.ndim not in (2, 3):
        raise ValueError(
            f"{name} is {tuple(x.shape)} of {x.dtype} on {x.device}; it must be "
            f"([parts,] rows, columns) of one of {DTYPES} on a GPU"
        )
    check_tensor(f"sums of {name}", sums, (*x.shape[:-2], x.shape[-1]), x.dtype, x.device)
    if not sums.is_contiguous():
        raise ValueError(f"sums of {name} have strides {sums.stride()}; they must be contiguous")
