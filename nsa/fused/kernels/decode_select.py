"""Decoding's selection: the best blocks of each new token, from the compressed branch's records.

A CTA selects for one token and KV head. It first adds up the sums of its heads over all parts. Then
it scores blocks and finds the best (:mod:`nsa.fused.kernels.decode_best`). A block's score adds the
heads in order, and each head's terms are scaled by powers of two and one common factor, so equal
keys score equally wherever they lie.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.decode_inputs import (
    NO_REFERENCE,
    SLOT_GROUP,
    DecodeRule,
    DecodeShape,
    Parts,
    Records,
    Schedule,
)
from nsa.fused.hardware import WARP
from nsa.fused.kernel_inputs import MAX_GROUP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_best import THREADS, WARPS, BestOfCta
from nsa.fused.kernels.decode_tiles import (
    PDL,
    power_of_two,
    unit_parts,
    wait_for_previous,
)
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import fake_flat

# The most heads whose records a thread loads together.
_HEADS = 8


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Parts and records of the compressed branch, and the lists."""

    cu_seqlens: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    tiles: cute.Tensor
    reference: cute.Tensor
    total: cute.Tensor
    sums: cute.Tensor
    carried: cute.Tensor | None
    references: cute.Tensor
    out: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call, and the forced blocks."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    group: Int32
    unit_tokens: Int32
    token_blocks: Int32
    groups: Int32
    num_initial: Int32
    num_local: Int32


class DecodeSelect:
    """``count`` best blocks of each token and KV head."""

    def __init__(self, rule: DecodeRule, count: int, heads: int):
        self.rule = rule
        self.heads = heads
        self.best = BestOfCta(count)

    @cute.jit
    def __call__(self, tensors: _Tensors, sizes: _Sizes, stream):
        self.kernel(tensors, sizes).launch(
            grid=[sizes.batch * sizes.tokens * sizes.kv_heads, 1, 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=PDL,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        kv_head, token = bidx % sizes.kv_heads, bidx // sizes.kv_heads
        sequence, token = token // sizes.tokens, token % sizes.tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.utils.SmemAllocator()
        sReference = smem.allocate_tensor(Int32, cute.make_layout(MAX_GROUP), 16)
        sInverse = smem.allocate_tensor(Float32, cute.make_layout(MAX_GROUP), 16)
        shared = self.best.allocate(smem)
        if token < new:
            position = tensors.starts[sequence] + token
            position = cutlass.min(position, tensors.ends[sequence] - 1)
            unit = kv_head * sizes.token_blocks + token // sizes.unit_tokens
            sequence_units = sizes.kv_heads * sizes.token_blocks
            rows = sizes.unit_tokens * sizes.group
            first_row = token % sizes.unit_tokens * sizes.group
            parts = unit_parts(tensors.tiles, sequence, unit, sequence_units)
            wait_for_previous()
            self._sum_parts(
                tensors, sizes, sReference, sInverse,
                parts,
                rows, first_row, warp, lane,
            )  # fmt: skip
            cute.arch.barrier()
            record_row = Int64(sequence * sequence_units + unit) * rows + first_row
            score_of = functools.partial(
                self._score, tensors, sizes, sReference, sInverse, record_row,
                (position + 1) // self.rule.stride,
            )  # fmt: skip
            own = position // self.rule.select_size
            rBest = self.best.find(
                shared, score_of, own, sizes.num_initial, sizes.num_local, own + 1
            )
            if warp == 0:
                out_row = Int64(row0 + token) * sizes.kv_heads + kv_head
                self.best.write(rBest, tensors.out, out_row * self.best.count, lane)

    @cute.jit
    def _sum_parts(
        self, tensors: _Tensors, sizes: _Sizes, sReference: cute.Tensor, sInverse: cute.Tensor,
        parts, rows: Int32, first_row: Int32, warp: Int32, lane: Int32,
    ):  # fmt: skip
        """Largest reference of each head, and the inverse of its sum of exponentials."""
        slot, count = parts
        for head in cutlass.range(warp, sizes.group, WARPS, unroll=1):
            place = Int64(slot) * rows + first_row + head
            largest, total = Int32(NO_REFERENCE), Float32(0.0)
            for i in cutlass.range(lane, count, WARP, unroll=2):
                reference = tensors.reference[place + Int64(i) * rows]
                part = tensors.total[place + Int64(i) * rows]
                higher = cutlass.max(largest, reference)
                total = total * power_of_two(largest - higher)
                total += part * power_of_two(reference - higher)
                largest = higher
            highest = cute.arch.warp_redux_sync(largest, "max")
            total = cute.arch.warp_reduction_sum(total * power_of_two(largest - highest))
            if lane == 0:
                sReference[head] = highest
                sInverse[head] = 1.0 / total if total != 0.0 else Float32(0.0)

    @cute.jit
    def _score(
        self, tensors: _Tensors, sizes: _Sizes, sReference: cute.Tensor, sInverse: cute.Tensor,
        record_row: Int64, seen: Int32, block: Int32,
    ) -> Float32:  # fmt: skip
        """The score of a block, of which the token sees the slots below ``seen``."""
        rule = self.rule
        per_group = const_expr(rule.group_blocks)
        blocks = sizes.groups * per_group
        group = block // per_group
        following = cutlass.min(group + 1, sizes.groups - 1)
        scored = block * rule.per_select < seen
        carries = block % per_group == per_group - 1 and (group + 1) * SLOT_GROUP < seen
        score = Float32(0.0)
        for first in cutlass.range(0, sizes.group, self.heads, unroll=1):
            # All loads before the first use, so that they are under way together.
            loaded = []
            for h in cutlass.range_constexpr(self.heads):
                row = record_row + cutlass.min(first + h, sizes.group - 1)
                own = tensors.sums[row * blocks + block]
                reference = tensors.references[row * sizes.groups + group]
                carried, next_reference = None, None
                if const_expr(rule.carried > 0):
                    carried = tensors.carried[row * sizes.groups + following]
                    next_reference = tensors.references[row * sizes.groups + following]
                loaded.append((own, reference, carried, next_reference))
            for h in cutlass.range_constexpr(self.heads):
                own, reference, carried, next_reference = loaded[h]
                head = cutlass.min(first + h, sizes.group - 1)
                largest = sReference[head]
                value = own * power_of_two(reference - largest)
                if const_expr(rule.carried > 0):
                    carried = carried * power_of_two(next_reference - largest)
                    value = value + (carried if carries else Float32(0.0))
                value = value * sInverse[head]
                score = score + (value if first + h < sizes.group else Float32(0.0))
        return score if scored else Float32(0.0)


@kept
def compile_decode_select(rule: DecodeRule, count: int, heads: int, packed: bool) -> Callable:
    """The compiled kernel of a rule, a number of blocks, and of heads that are loaded together."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def floats(used: bool = True):
        return fake_flat(Float32 if used else None, alignment=4)

    return compile_kernel(
        DecodeSelect(rule, count, heads),
        _Tensors(
            *(integers(packed), integers(), integers(), integers()),
            *(integers(), floats(), floats(), floats(rule.carried > 0), integers(), integers()),
        ),
        _Sizes(*(Int32(1) for _ in range(9))),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    paper = DecodeRule.of(NSAConfig.paper())
    for rule in (paper, DecodeRule(16, 16, 32), DecodeRule(32, 32, 32), DecodeRule(64, 4, 64)):
        for count in (1, 16, 64):
            name = "-".join(map(str, (*rule, count)))
            yield (
                f"decode-select-{name}",
                functools.partial(
                    compile_decode_select, rule, count, _HEADS if count == 16 else 1, count == 16
                ),
            )


def decode_select(
    parts: Parts,
    records: Records,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    out: Tensor,
    num_initial: int,
    num_local: int,
) -> None:
    """See :func:`nsa.fused.decode_calls.decode_select`."""
    heads = min(_HEADS, 1 << (shape.group - 1).bit_length())
    compile_decode_select(rule, out.shape[-1], heads, cu_seqlens is not None)(
        _Tensors(
            *(cu_seqlens, *schedule),
            *(parts.reference.view(-1), parts.total.view(-1)),
            *(None if x is None else x.view(-1) for x in records),
            out.view(-1),
        ),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.group),
            *(shape.unit_tokens, shape.token_blocks, records.reference.shape[-1]),
            *(num_initial, num_local),
        ),
    )
