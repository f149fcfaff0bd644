"""Decoding's compressed branch: attention split over compressed keys, and records for selection.

A fixed number of CTAs share the tiles of all units equally (see
:mod:`nsa.fused.decode_inputs`), so one launch serves any lengths. Compressed keys and values are
read once. For the selection each warp records sums of exponentials of the blocks of its slots, with
the integer reference of the moment; the selection scales them when the sum over all keys is known.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.decode_inputs import (
    NO_REFERENCE,
    SLOT_GROUP,
    TILE_KEYS,
    DecodeRule,
    DecodeShape,
    Parts,
    Pool,
    Records,
    Schedule,
    most_groups,
    record_shapes,
)
from nsa.fused.hardware import LOG2_E, QUAD, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments
from nsa.fused.kernels.decode_parts import WarpOutputs
from nsa.fused.kernels.decode_records import BlockRecorder
from nsa.fused.kernels.decode_schedule import PDL, TileSchedule, divide, wait_for_previous
from nsa.fused.kernels.decode_softmax import softmax
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention, make_attention
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat_rows


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs, parts and records."""

    q: cute.Tensor
    cu_seqlens: cute.Tensor | None
    lengths: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    tiles: cute.Tensor
    out: cute.Tensor
    reference: cute.Tensor
    total: cute.Tensor
    sums: cute.Tensor | None
    carried: cute.Tensor | None
    references: cute.Tensor | None


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call; sequences have up to ``limit`` tokens.

    ``groups`` of 16 slots have room in the records of a row.
    """

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    group: Int32
    unit_tokens: Int32
    token_blocks: Int32
    ctas: Int32
    whole_units: Int32
    limit: Int32
    groups: Int32
    q_stride: Int64


class DecodeCompressed:
    """Parts of the compressed branch; with ``records`` also those.

    ``whole`` says that a tile lies in one page.
    """

    def __init__(self, attention: TileAttention, rule: DecodeRule, records: bool, whole: bool):
        self.attention = attention
        self.outputs = WarpOutputs(attention)
        self.rule = rule
        self.records = records
        self.schedule = TileSchedule(rule)
        self.recorder = BlockRecorder(attention, rule)
        self.whole = whole

    @cute.jit
    def __call__(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale_log2: Float32, stream
    ):
        attention = self.attention
        layouts, mmas = attention.layouts(), attention.make_mmas()
        self.kernel(tensors, pages, sizes, scale_log2, mmas, layouts).launch(
            grid=[sizes.ctas, 1, 1],
            block=[attention.threads, 1, 1],
            stream=stream,
            use_pdl=PDL,
            min_blocks_per_mp=attention.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        pages: PagedTensors,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        attention = self.attention
        bidx, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        memory = attention.allocate(smem, layouts)
        sequence_units = sizes.kv_heads * sizes.token_blocks
        share, total, extents = self.schedule.find_all(tensors, sizes, sequence_units)
        first = bidx * share
        last = cutlass.min(first + share, total * sequence_units)
        while first < last:
            sequence, start, tile0, tiles = self.schedule.find(
                tensors, sizes, sequence_units, first, extents
            )
            within = first - tile0 * sequence_units
            unit, tile = divide(within, tiles)
            count = cutlass.min(tiles - tile, last - first)
            self._attend(
                tensors, pages, sizes, scale_log2, mmas, memory,
                sequence, start, unit, tile, count,
            )  # fmt: skip
            first += count
        if const_expr(tensors.lengths is not None):
            # The next kernel may start when all CTAs have waited, or ended.
            wait_for_previous()

    @cute.jit
    def _attend(
        self,
        tensors: _Tensors,
        pages: PagedTensors,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        memory,
        sequence: Int32,
        start: Int32,
        unit: Int32,
        first_tile: Int32,
        count: Int32,
    ):
        """A part: tiles ``first_tile`` to ``first_tile + count - 1`` of a unit of the sequence."""
        sQ, sK, sV, ring, *warp_sums = memory
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        # Warpgroups have other tiles, or warps other keys of a tile.
        tile_group, key_group = Int32(0), warp // self.attention.row_groups
        row_group, local = warp % self.attention.row_groups, tidx
        if const_expr(self.attention.tile_groups > 1):
            tile_group, key_group = key_group, Int32(0)
            local = tidx % self.attention.tile_threads
        stage0 = tile_group * self.attention.stages
        kv_head, token_block = divide(unit, sizes.token_blocks)
        token0 = token_block * sizes.unit_tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0
        rows = sizes.unit_tokens * sizes.group
        # Slots that were there before the step, and all of them where the tiles have new ones.
        end_slot = start // self.rule.stride
        full_slot = cutlass.min(start + new, sizes.limit) // self.rule.stride
        if full_slot > end_slot and (first_tile + count) * TILE_KEYS > end_slot:
            if const_expr(tensors.lengths is not None):
                wait_for_previous()
            end_slot = tensors.ends[sequence] // self.rule.stride
        # The tiles of this thread's warpgroup, and where the next two are.
        step = const_expr(self.attention.tile_groups)
        last_tile = first_tile + count - 1
        first_tile += tile_group
        count = (count - tile_group + (step - 1)) // step
        ahead = [cute.make_rmem_tensor(2, Int32) for _ in range(2)]
        find = functools.partial(self._find_tile, pages, sequence, first_tile, last_tile)
        if const_expr(self.whole):
            for i in cutlass.range_constexpr(2):
                ahead[0][i], ahead[1][i] = find(Int32(i))
        load_tile = functools.partial(
            self._load_tile, pages, sK, sV, sequence, kv_head, end_slot, first_tile, find, ahead,
            local, stage0,
        )  # fmt: skip

        # All warps are done with what the unit before left in shared memory.
        cute.arch.barrier()
        self.attention.load_queries(
            tensors.q,
            sQ,
            functools.partial(self._query_offset, sizes, row0 + token0, kv_head),
            functools.partial(self._has_query, sizes, rows, new - token0),
            tidx,
        )
        # The queries alone, which registers get.
        cute.arch.cp_async_commit_group()
        self.attention.start_tiles(load_tile, count)
        if const_expr(tensors.lengths is not None):
            # Before anything is written.
            wait_for_previous()
        queries = sQ
        if const_expr(self.attention.warpgroups == 0 or self.attention.tile_groups > 1):
            self.attention.wait_for_queries()
        if const_expr(self.attention.warpgroups == 0):
            queries = self.attention.make_rows(sQ, mmas[0], lane)
            self.attention.read_rows(queries, sQ, mmas[0], row_group, lane)

        acc_O = self.attention.make_output(mmas, lane)
        acc_O.fill(0.0)
        reference = cute.make_rmem_tensor(2, Int32)
        reference.fill(NO_REFERENCE)
        total = cute.make_rmem_tensor(2, Float32)
        total.fill(0.0)
        # Slots that this thread's rows see.
        limits = cute.make_rmem_tensor(2, Int32)
        row = row_group * MMA_ROWS + lane // QUAD
        for r in cutlass.range_constexpr(2):
            token, _ = self._split_row(sizes, row + 8 * r)
            position = start + token0 + token
            limits[r] = cutlass.min((position + 1) // self.rule.stride, end_slot)
        # The unit among those of all sequences.
        index = sequence * (sizes.kv_heads * sizes.token_blocks) + unit

        for i in cutlass.range(count, unroll=1):
            self.attention.wait_for_tile(tile_group)
            stage = stage0 + i % self.attention.stages
            if const_expr(self.attention.warpgroups == 0):
                self.attention.load_ahead(load_tile, i, count)
            accs = self.attention.compute_scores(
                mmas, queries, sK[None, None, stage], key_group, warp, lane
            )
            if const_expr(self.attention.warpgroups > 0):
                # While wgmma computes.
                self.attention.load_ahead(load_tile, i, count)
                warpgroup.wait_group(0)
            first_group = (first_tile + i * step) * (TILE_KEYS // SLOT_GROUP) + key_group
            low, high = [], [[], []]
            for u in cutlass.range_constexpr(self.attention.units):
                slot = (first_group + u * self.attention.key_groups) * SLOT_GROUP
                low.append(self.rule.carried - slot)
                for r in cutlass.range_constexpr(2):
                    high[r].append(limits[r] - slot)
            softmax(accs, acc_O, reference, total, [low, low], high, lane, scale_log2)
            self.attention.add_values(
                mmas, acc_O, accs, sV[None, None, stage], key_group, warp, lane
            )
            if const_expr(self.records):
                for r in cutlass.range_constexpr(2):
                    self.recorder.record(
                        tensors, sizes.groups, accs, r, reference[r], index, rows, row + 8 * r,
                        first_group, lane,
                    )  # fmt: skip
            if const_expr(self.attention.warpgroups > 0):
                warpgroup.wait_group(0)
        cute.arch.cp_async_wait_group(0)
        self.outputs.store_part(
            acc_O, reference, total, ring, warp_sums,
            (tensors.out, tensors.reference, tensors.total),
            Int64(bidx + index), rows, tidx,
        )  # fmt: skip

    def _query_offset(self, sizes, row0, kv_head, row) -> Int64:
        token, head = self._split_row(sizes, row)
        head += kv_head * sizes.group
        return Int64(row0 + token) * sizes.q_stride + head * self.attention.head_dim

    @cute.jit
    def _has_query(self, sizes, rows, new, row) -> Boolean:
        token, _ = self._split_row(sizes, row)
        return row < rows and token < new

    @cute.jit
    def _split_row(self, sizes: _Sizes, row: Int32) -> tuple[Int32, Int32]:
        """Token and head of a row of a unit."""
        token, head = Int32(0), row
        if sizes.unit_tokens > 1:
            token, head = divide(row, sizes.group)
        return token, head

    @cute.jit
    def _find_tile(
        self, pages: PagedTensors, sequence: Int32, first_tile: Int32, last_tile: Int32, i: Int32
    ) -> tuple[Int32, Int32]:
        """Page and first row of a warpgroup's tile number ``i``, or of the unit's last one."""
        tile = cutlass.min(first_tile + i * self.attention.tile_groups, last_tile)
        return self._page_and_row(pages, sequence, tile * TILE_KEYS)

    @cute.jit
    def _load_tile(
        self, pages: PagedTensors, sK: cute.Tensor, sV: cute.Tensor, sequence: Int32,
        kv_head: Int32, end_slot: Int32, first_tile: Int32, find, ahead, tidx: Int32, stage0: Int32,
        i: Int32, stage: Int32,
    ):  # fmt: skip
        slot = (first_tile + i * self.attention.tile_groups) * TILE_KEYS
        place = functools.partial(self._place, pages, sequence, end_slot, slot)
        if const_expr(self.whole):
            place = functools.partial(self._place_after, end_slot, slot, ahead[0][0], ahead[1][0])
        self.attention.load_tile(
            pages, sK, sV, place, kv_head, self.whole, True, tidx, stage0 + stage
        )
        if const_expr(self.whole):
            # So early that no load waits for the page table.
            for x in cutlass.range_constexpr(2):
                ahead[x][0] = ahead[x][1]
            ahead[0][1], ahead[1][1] = find(i + 2)

    def _place_after(self, end_slot: Int32, slot0: Int32, page: Int32, row: Int32, key: Int32):
        """The place of a key of a tile whose first is at ``slot0``, in a row of a page."""
        slot = slot0 + key
        return page, row + key, (slot >= self.rule.carried) & (slot < end_slot)

    @cute.jit
    def _place(
        self, pages: PagedTensors, sequence: Int32, end_slot: Int32, slot0: Int32, key: Int32
    ):
        slot = slot0 + key
        page, row = self._page_and_row(pages, sequence, cutlass.min(slot, end_slot - 1))
        return page, row, slot >= self.rule.carried and slot < end_slot

    @cute.jit
    def _page_and_row(
        self, pages: PagedTensors, sequence: Int32, slot: Int32
    ) -> tuple[Int32, Int32]:
        # Unsigned, because // of signed numbers takes more instructions.
        index = Int32(Uint32(slot) // Uint32(pages.page_rows))
        row = Int32(Uint32(slot) % Uint32(pages.page_rows))
        return pages.table[Int64(sequence) * pages.max_pages + index], row


@kept
def compile_decode_compressed(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    row_groups: int,
    rule: DecodeRule,
    packed: bool,
    records: bool,
    whole: bool,
    after_append: bool,
) -> Callable:
    """The compiled kernel of these forms."""
    attention = make_attention(dtype, head_dim, head_dim_v, row_groups)

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def floats(used: bool = True):
        return fake_flat(Float32 if used else None, alignment=4)

    return compile_kernel(
        DecodeCompressed(attention, rule, records, whole),
        _Tensors(
            fake_flat(CUTE_DTYPES[dtype]),
            integers(packed),
            *(integers(after_append), integers(), integers(), integers()),
            *(fake_flat(Float32), integers(), floats()),
            fake_flat(Float32 if records else None),
            *(floats(records and rule.carried > 0), integers(records)),
        ),
        fake_pages(CUTE_DTYPES[dtype]),
        _Sizes(*(Int32(1) for _ in range(10)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    paper = DecodeRule.of(NSAConfig.paper())
    forms = [
        (torch.bfloat16, 128, 128, 1, paper, False, True, True, True),
        (torch.bfloat16, 128, 128, 4, paper, True, True, True, False),
        (torch.float16, 64, 64, 8, paper, False, True, False, True),
        (torch.float16, 96, 96, 2, DecodeRule(16, 16, 32), False, True, True, True),
        (torch.float16, 96, 96, 4, DecodeRule(16, 16, 32), False, True, True, False),
        (torch.bfloat16, 192, 128, 1, DecodeRule(32, 32, 32), False, True, False, True),
        (torch.bfloat16, 256, 256, 2, DecodeRule(16, 8, 64), False, True, True, True),
        (torch.bfloat16, 256, 256, 8, DecodeRule(64, 4, 64), False, True, True, False),
        (torch.bfloat16, 128, 128, 1, DecodeRule(64, 4, 64), False, True, True, True),
        (torch.bfloat16, 128, 128, 1, paper, False, False, True, True),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-compressed-{name}", functools.partial(compile_decode_compressed, *form)


def decode_compressed(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    scale: float,
    records: bool,
    lengths: Tensor | None,
    limit: int,
) -> tuple[Parts, Records | None]:
    """See :func:`nsa.fused.decode_calls.decode_compressed`."""
    head_dim, head_dim_v = q.shape[-1], pool.v.shape[-1]
    floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    integers = functools.partial(torch.empty, dtype=torch.int32, device=q.device)
    slots, rows = shape.part_slots, shape.rows
    parts = Parts(floats(slots, rows, head_dim_v), integers(slots, rows), floats(slots, rows))
    groups, made = most_groups(table, pool.k.shape[1]), None
    if records:
        sums, entries = record_shapes(shape, rule, groups)
        carried = floats(entries) if rule.carried else None
        made = Records(floats(sums), carried, integers(entries))
    flat_q, q_stride = flat_rows(q)
    results = (*parts, *(made or (None, None, None)))
    compile_decode_compressed(
        q.dtype,
        head_dim,
        head_dim_v,
        shape.row_groups,
        rule,
        cu_seqlens is not None,
        records,
        pool.k.shape[1] % TILE_KEYS == 0,
        lengths is not None,
    )(
        _Tensors(
            flat_q,
            *(cu_seqlens, lengths, *schedule),
            *(None if x is None else x.view(-1) for x in results),
        ),
        page_arguments(pool, table),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.group),
            *(shape.unit_tokens, shape.token_blocks, shape.ctas, shape.whole_units),
            *(limit, groups, q_stride),
        ),
        scale * LOG2_E,
    )
    return parts, made
