"""Decoding's selection by itself: a CTA of its own scores the blocks of each list.

The step's last kernel selects what it attends, where each list has CTAs of its own there
(:mod:`nsa.fused.kernels.decode_finish`). Where a CTA attends the lists of several tokens together,
this is the kernel before it: more CTAs run at a time than with tiles in shared memory.
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
    MAX_LISTED,
    DecodeRule,
    DecodeShape,
    Parts,
    Records,
    Schedule,
    num_groups,
    record_groups,
)
from nsa.fused.hardware import WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_lists import ClusterLists
from nsa.fused.kernels.decode_pages import discard
from nsa.fused.kernels.decode_schedule import PDL, divide, unit_parts, wait_for_previous
from nsa.fused.kernels.decode_scores import RecordRows, RecordTensors, sum_parts
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import fake_flat

_WARPS = 4
# CTAs of an SM, so that the loads of one hide the sorting of others.
_CTAS = 4
# Records of heads that a thread loads at a time, for which it has registers.
_LOADS = 12
# Times as many ranks that a thread brings together, so that blocks of 96K tokens are sorted once.
_TIMES = 3
# Bytes of a line of L2.
_LINE = 128


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Parts of the compressed branch, and lists."""

    cu_seqlens: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    tiles: cute.Tensor
    cmp_out: cute.Tensor
    cmp_reference: cute.Tensor
    cmp_total: cute.Tensor
    blocks: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call; ``groups`` of 16 slots have room in the records of a row."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    unit_tokens: Int32
    token_blocks: Int32
    groups: Int32
    num_initial: Int32
    num_local: Int32


class DecodeSelect:
    """``count`` best blocks of each token and KV head, for ``group`` query heads."""

    def __init__(self, group: int, rule: DecodeRule, count: int, record_groups: int):
        self.group = group
        self.lists = ClusterLists(rule, group, count, 1, _WARPS, record_groups, _LOADS, _TIMES)

    @cute.jit
    def __call__(self, tensors: _Tensors, records: RecordTensors, sizes: _Sizes, stream):
        self.kernel(tensors, records, sizes).launch(
            grid=[sizes.batch * sizes.tokens * sizes.kv_heads, 1, 1],
            block=[_WARPS * WARP, 1, 1],
            stream=stream,
            use_pdl=PDL,
            min_blocks_per_mp=_CTAS,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(self, tensors: _Tensors, records: RecordTensors, sizes: _Sizes):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        # Tokens of a KV head one after another.
        unit, token = divide(bidx, sizes.tokens)
        sequence, kv_head = divide(unit, sizes.kv_heads)
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0
        start, end = tensors.starts[sequence], tensors.ends[sequence]
        # Units, parts and rows of the compressed branch.
        block, in_block = divide(token, sizes.unit_tokens)
        units = sizes.kv_heads * sizes.token_blocks
        unit = kv_head * sizes.token_blocks + block
        slot, count = unit_parts(tensors.tiles, sequence, unit, units)
        unit_rows, unit_row = sizes.unit_tokens * self.group, in_block * self.group

        smem = cutlass.memory.SmemAllocator()
        lists = self.lists
        words = const_expr(
            _WARPS * lists.pass_blocks // 2 + lists.best.words + lists.pass_entries * self.group
        )
        memory = smem.allocate_tensor(Int64, cute.make_layout(words), 16)
        listed = smem.allocate_tensor(Int32, cute.make_layout(MAX_LISTED), 16)
        sBest = smem.allocate_tensor(Int64, cute.make_layout(MAX_LISTED), 16)
        compressed = tuple(
            smem.allocate_tensor(dtype, cute.make_layout(self.group), 16)
            for dtype in (Int32, Float32)
        )
        # Also where there is no token: the next kernel reads what earlier ones wrote.
        wait_for_previous()
        if token < new:
            sum_up = functools.partial(
                sum_parts, (tensors.cmp_out, tensors.cmp_reference, tensors.cmp_total), compressed,
                slot, count, unit_rows, Int64(unit_row), self.group, _WARPS, tidx,
            )  # fmt: skip
            position = cutlass.min(start + token, end - 1)
            rows = RecordRows(sequence * units + unit, unit_rows, unit_row)
            self.lists.select(
                records, sizes.groups, (sizes.num_initial, sizes.num_local), memory.iterator, None,
                sBest, compressed, sum_up, None, position, rows, Int32(0), tidx,
            )  # fmt: skip
            self._discard(records.sums, sizes.groups, rows, position, tidx)
            list_row = Int64(row0 + token) * sizes.kv_heads + kv_head
            self.lists.list_best(tensors.blocks, listed, sBest, list_row, Int32(0))

    @cute.jit
    def _discard(
        self, mSums: cute.Tensor, groups: Int32, rows: RecordRows, position: Int32, tidx: Int32
    ):
        """Drop the sums, which have been read, from L2, so that they need not go to memory."""
        scores = self.lists.scores
        lines = const_expr(self.group * scores.entry_blocks * 4 // _LINE)
        # Else other tokens have parts of the lines.
        if const_expr(self.group * scores.entry_blocks * 4 % _LINE == 0):
            entries = position // self.lists.rule.select_size // scores.entry_blocks + 1
            for i in cutlass.range(tidx, entries * lines, _WARPS * WARP, unroll=1):
                row = Int64(rows.unit) * (groups // scores.record_groups) + i // lines
                row = row * rows.rows + rows.first
                place = row * scores.entry_blocks + i % lines * (_LINE // 4)
                discard(mSums.iterator + place)


@kept
def compile_decode_select(
    group: int, rule: DecodeRule, count: int, packed: bool, record_groups: int
) -> Callable:
    """The compiled kernel of these forms."""

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def floats(used: bool = True):
        return fake_flat(Float32 if used else None)

    return compile_kernel(
        DecodeSelect(group, rule, count, record_groups),
        _Tensors(
            *(integers(packed), integers(), integers(), integers()),
            *(floats(), integers(), floats(), integers()),
        ),
        RecordTensors(floats(), floats(rule.carried > 0), fake_flat(Int32)),
        _Sizes(*(Int32(1) for _ in range(8))),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    forms = [
        (16, DecodeRule.of(NSAConfig.paper()), 16, False, 4),
        (8, DecodeRule(16, 16, 64), 32, True, 4),
    ]
    for form in forms:
        name = "-".join(map(str, form))
        yield f"decode-select-{name}", functools.partial(compile_decode_select, *form)


def decode_select(
    parts: Parts,
    records: Records,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor,
    num_initial: int,
    num_local: int,
) -> None:
    """See :func:`nsa.fused.decode_calls.decode_select`."""
    together = record_groups(shape.row_groups)
    compile_decode_select(
        shape.group, rule, lists.shape[-1], cu_seqlens is not None, together
    )(
        _Tensors(cu_seqlens, *schedule, *(x.view(-1) for x in parts), lists.view(-1)),
        RecordTensors(*(None if x is None else x.view(-1) for x in records)),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.unit_tokens, shape.token_blocks),
            *(num_groups(records, shape.row_groups), num_initial, num_local),
        ),
    )  # fmt: skip
