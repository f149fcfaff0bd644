"""Statistics with which the window's backward attends near blocks for the selected branch too.

With one ``dout``, what two branches have of a pair adds up to what one softmax has:
``exp2(s - a) + exp2(s - b) = exp2(s - c)``. The sum of both dS is that times ``dP - delta``, where
delta is the mean of both, weighted by ``exp2(-a)`` and ``exp2(-b)``.

A thread has a token and KV head: it looks at the list of blocks once, for all heads of the group.
Neighbouring threads have neighbouring tokens, as the window's statistics lie.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from torch import Tensor

from nsa.fused.fa4_call import LARGEST_TILE, rounded_up
from nsa.fused.kernel_inputs import KINDS_OF_KEYS, LEFT_OUT, RowStatistics
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.inverted_index import (
    IndexStrides,
    load_indices,
    slots_of,
    strided_indices,
)
from nsa.fused.kernels.vectors import fake_flat

_THREADS = 128


@mlir_namedtuple
class _Tensors(NamedTuple):
    """What :func:`join_near_blocks` takes and returns, each in one dimension."""

    window_lse: cute.Tensor
    window_delta: cute.Tensor
    selected_lse: cute.Tensor
    selected_delta: cute.Tensor
    indices: cute.Tensor
    lse: cute.Tensor
    delta: cute.Tensor
    others: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Of the batch, and the position of an entry's first query."""

    batch: Int32
    length: Int32
    rows: Int32
    kv_heads: Int32
    first: Int32
    block_size: Int32


class JoinNearBlocks:
    """``group`` query heads a KV head, lists of ``slots`` blocks, ``adjacent`` as in
    :class:`nsa.fused.kernels.inverted_index.InvertIndex`."""

    def __init__(self, group: int, slots: int, adjacent: bool):
        self.group = group
        self.slots = slots
        self.adjacent = adjacent

    @cute.jit
    def __call__(self, tensors: _Tensors, strides: IndexStrides, sizes: _Sizes, stream):
        self.kernel(tensors, strides, sizes).launch(
            grid=[cute.ceil_div(sizes.rows, _THREADS), sizes.kv_heads, sizes.batch],
            block=[_THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, strides: IndexStrides, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        tile, kv_head, entry = cute.arch.block_idx()
        row = tile * _THREADS + tidx
        if row < sizes.rows:
            heads, tokens = sizes.kv_heads * self.group, Int64(sizes.batch) * sizes.length
            real, token = row < sizes.length, Int64(entry) * sizes.length + row
            has_own = has_before = Int32(0)
            if real:
                pair = token * sizes.kv_heads + kv_head
                selected = load_indices(
                    *(tensors.indices, strides, pair, sizes.kv_heads, self.slots, self.adjacent)
                )
                own = (sizes.first + row) // sizes.block_size
                for i in cutlass.range_constexpr(self.slots):
                    block = selected[i]
                    if block >= 0:
                        has_own = 1 if block == own else has_own
                        has_before = 1 if block == own - 1 else has_before
                        is_near = block == own or block == own - 1
                        selected[i] = LEFT_OUT if is_near else block
                cute.autovec_copy(selected, slots_of(tensors.others, pair, self.slots))
            for g in cutlass.range(self.group, unroll=4):
                head = kv_head * self.group + g
                lse, delta = Float32.inf, Float32(0.0)
                joint_lse, joint_delta = lse, delta
                if real:
                    source = head * tokens + token
                    lse, delta = tensors.window_lse[source], tensors.window_delta[source]
                    source = token * heads + head
                    joint_lse, joint_delta = self._joint(
                        *(lse, delta, tensors.selected_lse[source], tensors.selected_delta[source])
                    )
                place = (Int64(entry) * heads + head) * (KINDS_OF_KEYS * sizes.rows) + row
                tensors.lse[place] = joint_lse if has_own == 1 else lse
                tensors.delta[place] = joint_delta if has_own == 1 else delta
                place += sizes.rows
                tensors.lse[place] = joint_lse if has_before == 1 else lse
                tensors.delta[place] = joint_delta if has_before == 1 else delta
                place += sizes.rows
                tensors.lse[place] = lse
                tensors.delta[place] = delta

    @cute.jit
    def _joint(
        self, lse: Float32, delta: Float32, other_lse: Float32, other_delta: Float32
    ) -> tuple[Float32, Float32]:
        """The statistics of both; P is 0 where both are infinite."""
        least = cutlass.min(lse, other_lse)
        both_lse, both_delta = least, Float32(0.0)
        if least < Float32.inf:
            own = cute.math.exp2(least - lse, fastmath=True)
            other = cute.math.exp2(least - other_lse, fastmath=True)
            total = own + other
            both_lse = least - cute.math.log2(total, fastmath=True)
            both_delta = (own * delta + other * other_delta) / total
        return both_lse, both_delta


@kept
def compile_join(group: int, slots: int, adjacent: bool) -> Callable:
    return compile_kernel(
        JoinNearBlocks(group, slots, adjacent),
        _Tensors(
            *(fake_flat(Float32, alignment=4) for _ in range(4)),
            fake_flat(Int32, alignment=16 if adjacent else 4),
            *(fake_flat(Float32, alignment=4) for _ in range(2)),
            fake_flat(Int32),
        ),
        IndexStrides(*(Int64(1) for _ in range(3))),
        _Sizes(*(Int32(1) for _ in range(6))),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    for group, slots, adjacent in ((16, 16, True), (3, 5, True), (1, 16, False)):
        name = f"near-blocks-{group}-{slots}{'' if adjacent else '-strided'}"
        yield name, functools.partial(compile_join, group, slots, adjacent)


def join_near_blocks(
    window: RowStatistics,
    selected: RowStatistics,
    block_indices: Tensor,
    batch: int,
    first: int,
    block_size: int,
) -> tuple[RowStatistics, Tensor]:
    """See :func:`nsa.fused.kernel_calls.join_near_blocks`."""
    tokens, kv_heads, slots = block_indices.shape
    heads, length = window.delta.shape[0], tokens // batch
    rows = rounded_up(length, LARGEST_TILE)
    shape = (2, batch, heads, KINDS_OF_KEYS, rows)
    joint = RowStatistics(*torch.empty(shape, dtype=torch.float32, device=block_indices.device))
    others = torch.empty(block_indices.shape, dtype=torch.int32, device=block_indices.device)
    indices, strides, adjacent = strided_indices(block_indices)
    compile_join(heads // kv_heads, slots, adjacent)(
        _Tensors(
            *(x.view(-1) for x in (*window, *selected)),
            indices,
            *(x.view(-1) for x in (*joint, others)),
        ),
        strides,
        _Sizes(batch, length, rows, kv_heads, first, block_size),
    )
    return joint, others
