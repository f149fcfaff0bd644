"""The product of all projections of a layer: queries and keys rotated and values copied out of it,
and its gradient.

A row of the product has the heads of queries, then of each branch those of keys and those of
values, then what is given to the gates' MLP. A thread has two vectors of channels, at ``c`` and
``c + D/2``, of up to four heads of a row.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.compressed_rows import CompressedRows
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.rotary_angles import (
    MAX_HEAD_DIM,
    ROTATED_DTYPES,
    cos_sin,
    fake_powers,
    frequency_powers,
    rotates_head_dim,
)
from nsa.fused.kernels.sequence_search import find_token
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
    store_vector,
)

_THREADS = 128


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Rows, elements of the product from row to row, heads of queries and of keys, columns of the
    gates' MLP; sequences, and tokens of an entry of a batch; compressed blocks in all, and of an
    entry."""

    rows: Int32
    stride: Int64
    heads: Int32
    kv_heads: Int32
    hidden: Int32
    sequences: Int32
    entry_tokens: Int32
    blocks: Int32
    entry_blocks: Int32


class _Heads(NamedTuple):
    """Static sizes: channels of a head in the product and outside, branches with keys of their own,
    and heads of queries and of keys that a thread has."""

    head_dim: int
    width: int
    branches: int
    at_once: tuple[int, int]


class _Product:
    """The threads, and which of them has what.

    Of a row's parts, each of ``vectors`` threads, the first are of queries, then of each branch
    those of keys and those of values; the last are of the gates' MLP.
    """

    def __init__(self, heads: _Heads, vectors: int):
        self.head_dim, self.width, branches, self.at_once = heads
        self.half = self.head_dim // 2
        self.tensors = 1 + 2 * branches
        self.vectors = vectors

    @cute.jit
    def num_blocks(self, sizes: _Sizes) -> Int32:
        """CTAs."""
        threads = Int64(sizes.rows) * self._num_parts(sizes) * self.vectors
        return Int32((threads + (_THREADS - 1)) // _THREADS)

    @cute.jit
    def _num_parts(self, sizes: _Sizes) -> Int32:
        of_heads = self.num_of(0, sizes) + (self.tensors - 1) * self.num_of(1, sizes)
        return of_heads + (sizes.hidden + (self.head_dim - 1)) // self.head_dim

    @cute.jit
    def num_of(self, which: cutlass.Constexpr, sizes: _Sizes) -> Int32:
        """Parts of a row of queries, or else of the keys or the values of one branch."""
        return sizes.kv_heads // self.at_once[1] if which else sizes.heads // self.at_once[0]

    @cute.jit
    def place(self, sizes: _Sizes) -> tuple[Int32, Int32, Int32, Int32]:
        """This thread's row, vector, which of the tensors its heads are of, and part of that.

        After the last tensor comes the gates' MLP.
        """
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        thread = Int64(bidx) * _THREADS + tidx
        item, vector = thread // self.vectors, Int32(thread % self.vectors)
        parts = self._num_parts(sizes)
        row, part = Int32(item // parts), Int32(item % parts)
        which = Int32(0)
        if part >= self.num_of(0, sizes):
            part -= self.num_of(0, sizes)
            which = cutlass.min(1 + part // self.num_of(1, sizes), self.tensors)
            part -= (which - 1) * self.num_of(1, sizes)
        return row, vector, which, part

    @cute.jit
    def columns_before(self, which: cutlass.Constexpr, sizes: _Sizes) -> Int32:
        """Columns of the product before those of a tensor."""
        if const_expr(which == 0):
            return Int32(0)
        return (sizes.heads + (which - 1) * sizes.kv_heads) * self.head_dim


def _is_rotated(which: int) -> bool:
    """Whether a tensor has queries or keys."""
    return which == 0 or which % 2 == 1


class SplitProduct(_Product):
    """A thread of channels that the product does not have writes zeros."""

    def __init__(self, heads: _Heads):
        super().__init__(heads, heads.width // (2 * VECTOR))

    @cute.jit
    def __call__(
        self,
        mProduct: cute.Tensor,
        results: tuple,
        mBounds: cute.Tensor | None,
        sizes: _Sizes,
        powers: tuple,
        stream,
    ):
        self.kernel(mProduct, results, mBounds, sizes, powers).launch(
            grid=[self.num_blocks(sizes), 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        mProduct: cute.Tensor,
        results: tuple,
        mBounds: cute.Tensor | None,
        sizes: _Sizes,
        powers: tuple,
    ):
        row, vector, which, part = self.place(sizes)
        if row < sizes.rows:
            for i in cutlass.range_constexpr(self.tensors):
                if which == i:
                    at_once = const_expr(self.at_once[min(i, 1)])
                    heads = sizes.kv_heads if const_expr(i > 0) else sizes.heads
                    first = part * at_once
                    source = Int64(row) * sizes.stride + self.columns_before(i, sizes)
                    source += first * self.head_dim + vector * VECTOR
                    target = (Int64(row) * heads + first) * self.width
                    if const_expr(self.width == self.head_dim):
                        self._write(
                            i, mProduct, source, results[i], target, mBounds, row, vector, sizes,
                            powers,
                        )  # fmt: skip
                    else:
                        if vector < self.half // VECTOR:
                            self._write(
                                i, mProduct, source, results[i], target, mBounds, row, vector,
                                sizes, powers,
                            )  # fmt: skip
                        else:
                            self._write_zeros(i, results[i], target + vector * (2 * VECTOR))

    @cute.jit
    def _write(
        self,
        which: cutlass.Constexpr,
        mProduct: cute.Tensor,
        source: Int64,
        mOut: cute.Tensor,
        target: Int64,
        mBounds: cute.Tensor | None,
        row: Int32,
        vector: Int32,
        sizes: _Sizes,
        powers: tuple,
    ):
        at_once, loaded = self.at_once[min(which, 1)], []
        for h in cutlass.range_constexpr(at_once):
            start = source + h * self.head_dim
            loaded.append([load_vector(mProduct, start + i * self.half) for i in range(2)])
        target += vector * VECTOR
        if const_expr(_is_rotated(which)):
            # While the loads are under way.
            _, index = find_token(mBounds, row, sizes.sequences, sizes.entry_tokens)
            cos, sin = cos_sin(Int64(2) * index, vector, powers)
            for h in cutlass.range_constexpr(at_once):
                a, b = (x.load().to(Float32) for x in loaded[h])
                start = target + h * self.width
                store_vector(a * cos - b * sin, mOut, start)
                store_vector(b * cos + a * sin, mOut, start + self.half)
        else:
            for h in cutlass.range_constexpr(at_once):
                for i in cutlass.range_constexpr(2):
                    start = target + (h * self.width + i * self.half)
                    store_vector(loaded[h][i].load(), mOut, start)

    @cute.jit
    def _write_zeros(self, which: cutlass.Constexpr, mOut: cute.Tensor, target: Int64):
        zeros = cute.full(VECTOR, 0.0, Float32)
        for h in cutlass.range_constexpr(self.at_once[min(which, 1)]):
            for i in cutlass.range_constexpr(2):
                store_vector(zeros, mOut, target + (h * self.width + i * VECTOR))


@mlir_namedtuple
class _Others(NamedTuple):
    """Gradients of what the gates' MLP gets and of rows of compressed blocks; boundaries of the
    tokens and of the blocks of packed sequences."""

    hidden: cute.Tensor | None
    rows: cute.Tensor | None
    bounds: cute.Tensor | None
    block_bounds: cute.Tensor | None


class ProductGradient(_Product):
    """``blocks`` are the sizes of compressed blocks, if any: tokens, and from block to block.

    ``strides`` are the elements of each gradient from row to row.
    """

    def __init__(self, heads: _Heads, blocks: tuple[int, int] | None):
        super().__init__(heads, heads.head_dim // (2 * VECTOR))
        self.blocks = None if blocks is None else CompressedRows(*blocks, heads.head_dim)

    @cute.jit
    def __call__(
        self,
        gradients: tuple,
        others: _Others,
        mProduct: cute.Tensor,
        strides: tuple,
        sizes: _Sizes,
        powers: tuple,
        stream,
    ):
        self.kernel(gradients, others, mProduct, strides, sizes, powers).launch(
            grid=[self.num_blocks(sizes), 1, 1], block=[_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        gradients: tuple,
        others: _Others,
        mProduct: cute.Tensor,
        strides: tuple,
        sizes: _Sizes,
        powers: tuple,
    ):
        row, vector, which, part = self.place(sizes)
        if row < sizes.rows:
            target = Int64(row) * sizes.stride + vector * VECTOR
            for i in cutlass.range_constexpr(self.tensors):
                if which == i:
                    self._write(
                        i, gradients[i], Int64(row) * strides[i], part, others, mProduct,
                        target + self.columns_before(i, sizes), row, vector, sizes, powers,
                    )  # fmt: skip
            if const_expr(others.hidden is not None):
                self._copy_hidden(which, others.hidden, part, mProduct, row, vector, sizes)

    @cute.jit
    def _copy_hidden(
        self,
        which: Int32,
        mHidden: cute.Tensor,
        part: Int32,
        mProduct: cute.Tensor,
        row: Int32,
        vector: Int32,
        sizes: _Sizes,
    ):
        if which == self.tensors:
            target = Int64(row) * sizes.stride + self.columns_before(self.tensors, sizes)
            for i in cutlass.range_constexpr(2):
                column = part * self.head_dim + (vector * VECTOR + i * self.half)
                if column < sizes.hidden:
                    value = load_vector(mHidden, Int64(row) * sizes.hidden + column).load()
                    store_vector(value, mProduct, target + column)

    @cute.jit
    def _write(
        self,
        which: cutlass.Constexpr,
        mX: cute.Tensor,
        source: Int64,
        part: Int32,
        others: _Others,
        mProduct: cute.Tensor,
        target: Int64,
        row: Int32,
        vector: Int32,
        sizes: _Sizes,
        powers: tuple,
    ):
        at_once, loaded, totals = self.at_once[min(which, 1)], [], []
        column = vector * VECTOR
        first = part * at_once
        for h in cutlass.range_constexpr(at_once):
            start = source + ((first + h) * self.width + column)
            loaded.append([load_vector(mX, start + i * self.half) for i in range(2)])
            totals.append([cute.make_rmem_tensor(VECTOR, Float32) for _ in range(2)])
        if const_expr(_is_rotated(which)):
            # While the loads are under way.
            _, index = find_token(others.bounds, row, sizes.sequences, sizes.entry_tokens)
            cos, sin = cos_sin(Int64(2) * index, vector, powers)
            for h in cutlass.range_constexpr(at_once):
                a, b = (x.load().to(Float32) for x in loaded[h])
                totals[h][0].store(a * cos + b * sin)
                totals[h][1].store(b * cos - a * sin)
        else:
            for h in cutlass.range_constexpr(at_once):
                for i in cutlass.range_constexpr(2):
                    totals[h][i].store(loaded[h][i].load().to(Float32))
        if const_expr(others.rows is not None and which in (1, 2)):
            self._add_blocks(which, others, first, column, row, sizes, totals)
        for h in cutlass.range_constexpr(at_once):
            for i in cutlass.range_constexpr(2):
                start = target + ((first + h) * self.head_dim + i * self.half)
                store_vector(totals[h][i].load(), mProduct, start)

    @cute.jit
    def _add_blocks(
        self,
        which: cutlass.Constexpr,
        others: _Others,
        first: Int32,
        column: Int32,
        row: Int32,
        sizes: _Sizes,
        totals: list,
    ):
        """Add the gradients that compressed keys, or values, have left to the first branch's."""
        sequence, index = find_token(others.bounds, row, sizes.sequences, sizes.entry_tokens)
        of_sequence = self.blocks.of_sequence(others.block_bounds, sequence, sizes.entry_blocks)
        head = (which - 1) * sizes.kv_heads + first
        counts, columns = (sizes.blocks, sizes.kv_heads), (column, column + self.half)
        self.blocks.add(others.rows, counts, index, of_sequence, head, columns, totals)


def _fake_arguments(dtype: torch.dtype, heads: _Heads) -> tuple:
    """Stand-ins for the tensors of heads, the product, and the sizes."""
    tensors = tuple(fake_flat(CUTE_DTYPES[dtype]) for _ in range(1 + 2 * heads.branches))
    sizes = {name: Int32(1) for name in _Sizes._fields} | {"stride": Int64(1)}
    return tensors, fake_flat(CUTE_DTYPES[dtype]), _Sizes(**sizes)


@kept
def compile_split(dtype: torch.dtype, heads: _Heads, packed: bool) -> Callable:
    """The compiled forward, for batched or packed rows."""
    results, product, sizes = _fake_arguments(dtype, heads)
    bounds = fake_flat(Int32 if packed else None, alignment=4)
    return compile_kernel(SplitProduct(heads), product, results, bounds, sizes, fake_powers())


@kept
def compile_gradient(
    dtype: torch.dtype, heads: _Heads, packed: bool, blocks: tuple[int, int] | None, hidden: bool
) -> Callable:
    """The compiled backward, with compressed blocks of these sizes and with a gates' MLP or not."""
    gradients, product, sizes = _fake_arguments(dtype, heads)
    element, bounds = CUTE_DTYPES[dtype], Int32 if packed else None
    others = _Others(
        hidden=fake_flat(element if hidden else None),
        rows=fake_flat(element if blocks else None),
        bounds=fake_flat(bounds, alignment=4),
        block_bounds=fake_flat(bounds if blocks else None, alignment=4),
    )
    strides = (Int64(1),) * len(gradients)
    return compile_kernel(
        ProductGradient(heads, blocks), gradients, others, product, strides, sizes, fake_powers()
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed.

    Options meet in part, because each form takes a second.
    """
    for dtype in ROTATED_DTYPES:
        for head_dim, width, branches, heads, packed, blocks, hidden in (
            (64, 64, 1, (4, 4), False, (32, 16), True),
            (64, 64, 3, (1, 1), True, None, False),
            (16, 64, 1, (2, 2), True, (32, 16), True),
            (80, 96, 3, (4, 1), False, (64, 64), True),
            (96, 96, 1, (1, 1), True, (64, 64), False),
            (128, 128, 1, (4, 4), False, (64, 64), True),
            (128, 128, 1, (4, 4), True, (32, 16), True),
            (128, 128, 3, (4, 2), False, (32, 16), False),
            (192, 256, 3, (4, 4), True, (32, 16), True),
            (256, 256, 1, (4, 1), False, None, True),
        ):
            form = "packed" if packed else "batched"
            name = f"{str(dtype).removeprefix('torch.')}-{head_dim}-{branches}-{heads}-{form}"
            of_heads = _heads_of_split(head_dim, width, branches, *heads)
            yield f"split-{name}", functools.partial(compile_split, dtype, of_heads, packed)
            of_heads = _heads_of_gradient(head_dim, width, branches, *heads)
            gradient = functools.partial(compile_gradient, dtype, of_heads, packed, blocks, hidden)
            yield f"product-gradient-{name}", gradient


def split_product(
    product: Tensor,
    heads: int,
    kv_heads: int,
    branches: int,
    head_dim: int,
    width: int,
    bounds: Tensor | None,
    theta: float,
) -> tuple[Tensor, ...]:
    """See :func:`nsa.fused.kernel_calls.split_product`."""
    _check("product", product, head_dim, width, bounds, theta)
    *leading, length, columns = product.shape
    used = (heads + 2 * branches * kv_heads) * head_dim
    if columns < used:
        raise ValueError(f"product has {columns} columns; heads have {used}")
    counts = [heads, *[kv_heads] * (2 * branches)]
    results = tuple(product.new_empty(*leading, length, n, width) for n in counts)
    if product.numel() == 0:
        return results
    if columns % VECTOR:
        product = product[..., :used]
    memory = flat(product)
    of_heads = _heads_of_split(head_dim, width, branches, heads, kv_heads)
    kernel = compile_split(product.dtype, of_heads, bounds is not None)
    sizes = _Sizes(
        rows=math.prod(leading) * length,
        stride=product.shape[-1],
        heads=heads,
        kv_heads=kv_heads,
        hidden=0,
        sequences=_num_sequences(bounds),
        entry_tokens=length,
        blocks=0,
        entry_blocks=0,
    )
    flat_results = tuple(x.view(-1) for x in results)
    kernel(memory, flat_results, bounds, sizes, frequency_powers(theta, head_dim))
    return results


def product_gradient(
    gradients: Sequence[Tensor],
    dhidden: Tensor | None,
    drows: Tensor | None,
    places: BlockPlaces | None,
    head_dim: int,
    bounds: Tensor | None,
    theta: float,
) -> Tensor:
    """See :func:`nsa.fused.kernel_calls.product_gradient`."""
    _check_gradients(gradients, dhidden, drows, places, head_dim, bounds, theta)
    *leading, length, heads, width = gradients[0].shape
    kv_heads, branches = gradients[1].shape[-2], len(gradients) // 2
    rows, used = math.prod(leading) * length, (heads + 2 * branches * kv_heads) * head_dim
    hidden = 0 if dhidden is None else dhidden.shape[-1]
    # Rows are aligned also where the last columns do not fill a vector.
    stride = -(-(used + hidden) // VECTOR) * VECTOR
    memory = gradients[0].new_empty(*leading, length, stride)
    product = memory if stride == used + hidden else memory[..., : used + hidden]
    if rows == 0:
        return product
    if dhidden is not None and hidden % VECTOR:
        product[..., used:].copy_(dhidden.reshape(*leading, length, hidden))
        dhidden, hidden = None, 0
    blocks = None
    if drows is not None and places is not None and drows.numel():
        blocks = places.block_size, places.stride
    else:
        drows, places = None, None
    of_heads = _heads_of_gradient(head_dim, width, branches, heads, kv_heads)
    kernel = compile_gradient(
        memory.dtype, of_heads, bounds is not None, blocks, dhidden is not None
    )
    tensors, strides = zip(*map(flat_rows, gradients), strict=True)
    block_bounds = None if places is None else places.block_bounds
    others = _Others(flat(dhidden), flat(drows), bounds, block_bounds)
    sizes = _Sizes(
        rows=rows,
        stride=stride,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        sequences=_num_sequences(bounds),
        entry_tokens=length,
        blocks=0 if places is None else places.blocks,
        entry_blocks=0 if places is None else places.entry_blocks,
    )
    powers = frequency_powers(theta, head_dim)
    kernel(tensors, others, memory.view(-1), strides, sizes, powers)
    return product


def _heads_of_split(head_dim: int, width: int, branches: int, heads: int, kv_heads: int) -> _Heads:
    return _Heads(head_dim, width, branches, (math.gcd(heads, 4), math.gcd(kv_heads, 4)))


def _heads_of_gradient(
    head_dim: int, width: int, branches: int, heads: int, kv_heads: int
) -> _Heads:
    # With 4 heads of keys, sums of the rows of blocks would take 121 registers instead of 80.
    return _Heads(head_dim, width, branches, (math.gcd(heads, 4), math.gcd(kv_heads, 2)))


def _num_sequences(bounds: Tensor | None) -> int:
    return 0 if bounds is None else bounds.shape[0] - 1


def _check(
    name: str, x: Tensor, head_dim: int, width: int, bounds: Tensor | None, theta: float
) -> None:
    """Raise on what the kernels cannot take."""
    if x.dtype not in ROTATED_DTYPES or not x.is_cuda:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}; it must be one of {ROTATED_DTYPES} on a GPU"
        )
    if not (rotates_head_dim(head_dim) and rotates_head_dim(width)) or width < head_dim:
        raise ValueError(
            f"head_dim is {head_dim} and width {width}; they must be multiples of {2 * VECTOR} up "
            f"to {MAX_HEAD_DIM}, and width at least head_dim"
        )
    if theta < 1:
        raise ValueError(f"theta is {theta}; it must be at least 1")
    if bounds is not None:
        check_tensor("bounds", bounds, bounds.shape, torch.int32, x.device)


def _check_gradients(gradients, dhidden, drows, places, head_dim, bounds, theta) -> None:
    """The same of the backward."""
    q, k = gradients[:2]
    _check("gradients[0]", q, head_dim, q.shape[-1], bounds, theta)
    rows, kv_heads = q.shape[:-2], k.shape[-2]
    for i, x in enumerate(gradients[1:]):
        wanted = (*rows, kv_heads, q.shape[-1])
        check_tensor(f"gradients[{i + 1}]", x, wanted, q.dtype, q.device)
    if dhidden is not None:
        leading = rows if dhidden.ndim == q.ndim - 1 else (rows.numel(),)
        wanted = (*leading, dhidden.shape[-1])
        check_tensor("dhidden", dhidden, wanted, q.dtype, q.device)
    if (drows is None) != (places is None):
        missing = "drows" if drows is None else "places"
        raise ValueError(f"{missing} is None; drows and places must both be given or neither")
    if drows is not None:
        wanted = (2, places.blocks, kv_heads, places.block_size, head_dim)
        check_tensor("drows", drows, wanted, q.dtype, q.device)
        if (places.block_bounds is None) != (bounds is None):
            raise ValueError("places are batched and bounds packed, or the reverse")
