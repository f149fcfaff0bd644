"""The end of a decoding step of a few tokens: a CTA attends what all tokens of a unit selected.

Tokens of a sequence select much the same blocks and see almost the same window. So a CTA has all of
a unit's rows, and loads each block that any token selected once. One warpgroup attends the window,
and then adds up the compressed branch's parts; the others attend the selected blocks. A row sees
the blocks of its own token's list alone.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import warpgroup
from torch import Tensor

from nsa.fused.decode_inputs import (
    MAX_UNITED,
    NO_REFERENCE,
    TILE_KEYS,
    DecodeRule,
    DecodeShape,
    Parts,
    Pool,
    Schedule,
)
from nsa.fused.hardware import LOG2_E, QUAD, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_outputs import load_gates
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments
from nsa.fused.kernels.decode_schedule import PDL, divide, wait_for_previous
from nsa.fused.kernels.decode_softmax import softmax
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention, make_attention
from nsa.fused.kernels.decode_unit_outputs import UnitOutputs
from nsa.fused.kernels.decode_united import UnitedLists
from nsa.fused.kernels.gated_sum import FORMS
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat, flat_rows

_ROW_GROUPS = 4


@mlir_namedtuple
class _Tensors(NamedTuple):
    """Inputs, parts of the compressed branch, lists, gates, and results."""

    q: cute.Tensor
    cu_seqlens: cute.Tensor | None
    starts: cute.Tensor
    ends: cute.Tensor
    tiles: cute.Tensor
    cmp_out: cute.Tensor
    cmp_reference: cute.Tensor
    cmp_total: cute.Tensor
    blocks: cute.Tensor
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    out: cute.Tensor
    lengths: cute.Tensor


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call; lists have ``slots`` blocks."""

    batch: Int32
    tokens: Int32
    kv_heads: Int32
    unit_tokens: Int32
    token_blocks: Int32
    slots: Int32
    window: Int32
    q_stride: Int64


class _Unit(NamedTuple):
    """What a CTA attends: new tokens ``token0`` to ``last_token`` of a sequence, for a KV head.

    Its first row of queries is ``row0``, and its parts and rows there follow from ``unit`` and
    ``units``, those of a sequence.
    """

    sequence: Int32
    kv_head: Int32
    row0: Int32
    start: Int32
    end: Int32
    token0: Int32
    last_token: Int32
    unit: Int32
    units: Int32


class _Keys(NamedTuple):
    """The keys of a warpgroup, of the window (0) or of the lists.

    Of the window ``first_tile`` is the last one, as the last ones come first: what both have is
    then loaded at about the same time. Else it is a number among the tiles of all lists. Keys are
    loaded from position ``first`` to ``last``.
    """

    tile_group: Int32
    first_tile: Int32
    first: Int32
    last: Int32


class DecodeUnits:
    """Units of ``group`` query heads and some tokens; ``form`` of the gates is one of ``FORMS``."""

    def __init__(self, attention: TileAttention, group: int, select_size: int, form: str):
        self.attention = attention
        self.outputs = UnitOutputs(attention, group)
        self.group = group
        self.select_size = select_size
        self.form = form
        # Warpgroups that attend selected blocks, and tiles of a block.
        self.listed_groups = attention.tile_groups - 1
        self.block_tiles = select_size // TILE_KEYS
        self.lists = UnitedLists(
            select_size, attention.tile_threads * self.listed_groups, 1 + attention.tile_groups
        )

    @cute.jit
    def __call__(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale_log2: Float32, stream
    ):
        attention = self.attention
        layouts, mmas = attention.layouts(), attention.make_mmas()
        self.kernel(tensors, pages, sizes, scale_log2, mmas, layouts).launch(
            grid=[sizes.batch * sizes.kv_heads * sizes.token_blocks, 1, 1],
            block=[attention.threads, 1, 1],
            stream=stream,
            use_pdl=PDL,
            min_blocks_per_mp=attention.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...], layouts: tuple[cute.ComposedLayout, ...],
    ):  # fmt: skip
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        units = sizes.kv_heads * sizes.token_blocks
        sequence, unit = divide(bidx, units)
        kv_head, token_block = divide(unit, sizes.token_blocks)
        token0 = token_block * sizes.unit_tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.memory.SmemAllocator()
        memory = self.attention.allocate(smem, layouts)
        sLists = self.lists.allocate(smem)
        sGates = smem.allocate_tensor(Float32, cute.make_layout(3 * self.attention.rows), 16)
        if token0 < new:
            last_token = cutlass.min(token0 + sizes.unit_tokens, new) - 1
            self._finish(
                tensors, pages, sizes, scale_log2, mmas, memory, sLists, sGates,
                _Unit(
                    sequence, kv_head, row0, tensors.starts[sequence], tensors.ends[sequence],
                    token0, last_token, unit, units,
                ),
            )  # fmt: skip
        if bidx == 0:
            wait_for_previous()
            for b in cutlass.range(tidx, sizes.batch, self.attention.threads, unroll=1):
                tensors.lengths[b] = tensors.ends[b]

    @cute.jit
    def _finish(
        self, tensors: _Tensors, pages: PagedTensors, sizes: _Sizes, scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...], memory, sLists, sGates: cute.Tensor, unit: _Unit,
    ):  # fmt: skip
        stages = const_expr(self.attention.stages)
        sQ, sK, sV, ring, *warp_sums = memory
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        tile_group, row_group = warp // _ROW_GROUPS, warp % _ROW_GROUPS
        local = tidx % self.attention.tile_threads
        self.attention.load_queries(
            tensors.q, sQ, functools.partial(self._query_offset, sizes, unit),
            functools.partial(self._has_query, unit), tidx,
        )  # fmt: skip
        cute.arch.cp_async_commit_group()
        # The keys that the tokens see.
        position = functools.partial(self._position, unit)
        first_key = cutlass.max(position(unit.token0) + 1 - sizes.window, 0)
        last_key = position(unit.last_token)
        window_tile = first_key // TILE_KEYS
        count = last_key // TILE_KEYS + 1 - window_tile
        keys = _Keys(
            tile_group,
            window_tile + count - 1 if tile_group == 0 else tile_group - 1,
            first_key if tile_group == 0 else Int32(0),
            last_key,
        )
        load_tile = functools.partial(
            self._load_tile, pages, sK, sV, sLists[:4], unit, keys, local, tile_group * stages
        )
        if tile_group > 0:
            wait_for_previous()
            blocks = self.lists.unite(
                tensors.blocks,
                sizes,
                sLists,
                pages,
                unit,
                position,
                tidx - self.attention.tile_threads,
            )
            count = blocks * self.block_tiles - keys.first_tile
            count = (count + (self.listed_groups - 1)) // self.listed_groups
        self.attention.start_tiles(load_tile, count)
        # While the first tiles are on their way.
        heads = sizes.kv_heads * self.group
        for token in cutlass.range(unit.last_token + 1 - unit.token0, unroll=1):
            row = Int64(unit.row0 + unit.token0 + token)
            place = sGates.iterator + token * (3 * self.group)
            load_gates(
                self.form, self.attention.head_dim, self.attention.warps, tensors.gates,
                tensors.weight, tensors.q, row * sizes.q_stride, row * heads,
                unit.kv_head * self.group, self.group,
                cute.make_tensor(place, cute.make_layout(3 * self.group)), tidx,
            )  # fmt: skip
        self.attention.wait_for_queries()

        acc_O = self.attention.make_output(mmas, lane)
        acc_O.fill(0.0)
        reference = cute.make_rmem_tensor(2, Int32)
        reference.fill(NO_REFERENCE)
        total = cute.make_rmem_tensor(2, Float32)
        total.fill(0.0)
        # The tokens of this thread's rows, and the positions that they see.
        own_tokens = cute.make_rmem_tensor(2, Int32)
        first_seen, last_seen = (cute.make_rmem_tensor(2, Int32) for _ in range(2))
        row = row_group * MMA_ROWS + lane // QUAD
        for r in cutlass.range_constexpr(2):
            own_tokens[r] = (row + 8 * r) // self.group
            last_seen[r] = position(cutlass.min(unit.token0 + own_tokens[r], unit.last_token))
            first_seen[r] = Int32(0)
            if tile_group == 0:
                first_seen[r] = cutlass.max(last_seen[r] + 1 - sizes.window, 0)
        for i in cutlass.range(count, unroll=1):
            self.attention.wait_for_tile(tile_group)
            stage = tile_group * stages + i % stages
            accs = self.attention.compute_scores(mmas, sQ, sK[None, None, stage], 0, warp, lane)
            # While wgmma computes.
            self.attention.load_ahead(load_tile, i, count)
            first, selectors = self._tile(sLists[:4], keys, i)
            low, high, seen = [[], []], [[], []], Boolean(False)
            for r in cutlass.range_constexpr(2):
                selects = (selectors >> own_tokens[r]) & 1 == 1
                last = last_seen[r] if selects else Int32(-1)
                seen = seen or selects
                for u in cutlass.range_constexpr(self.attention.units):
                    low[r].append(first_seen[r] - (first + u * MMA_ROWS))
                    high[r].append(last + 1 - (first + u * MMA_ROWS))
            seen = cute.arch.vote_any_sync(seen)
            warpgroup.wait_group(0)
            if seen:
                softmax(accs, acc_O, reference, total, low, high, lane, scale_log2)
            else:
                for u in cutlass.range_constexpr(self.attention.units):
                    accs[u].fill(0.0)
            self.attention.add_values(mmas, acc_O, accs, sV[None, None, stage], 0, warp, lane)
            warpgroup.wait_group(0)
        cute.arch.cp_async_wait_group(0)
        for r in cutlass.range_constexpr(2):
            for offset in cutlass.range_constexpr(2):
                total[r] += cute.arch.shuffle_sync_bfly(total[r], offset=1 << offset)
        if tile_group == 0:
            wait_for_previous()
            self.outputs.add_parts(tensors, sizes, sGates, unit, acc_O, total, row, lane)
        self.outputs.store(
            tensors, sizes, sGates, unit, ring, warp_sums, acc_O, reference, total, tile_group,
            row, lane, tidx,
        )  # fmt: skip

    def _position(self, unit: _Unit, token: Int32) -> Int32:
        return cutlass.min(unit.start + token, unit.end - 1)

    def _query_offset(self, sizes: _Sizes, unit: _Unit, row: Int32) -> Int64:
        token = unit.row0 + unit.token0 + row // self.group
        head = unit.kv_head * self.group + row % self.group
        return Int64(token) * sizes.q_stride + head * self.attention.head_dim

    def _has_query(self, unit: _Unit, row: Int32) -> Boolean:
        return unit.token0 + row // self.group <= unit.last_token

    @cute.jit
    def _tile(self, sLists, keys: _Keys, i: Int32) -> tuple[Int32, Int32]:
        """The first position of a warpgroup's tile, and the tokens that attend it, a bit each."""
        sBlock, sSelectors, _, _ = sLists
        first, selectors = (keys.first_tile - i) * TILE_KEYS, Int32(-1)
        if keys.tile_group > 0:
            tile = keys.first_tile + i * self.listed_groups
            entry = tile // self.block_tiles
            first = sBlock[entry] * self.select_size + tile % self.block_tiles * TILE_KEYS
            selectors = sSelectors[entry]
        return first, selectors

    @cute.jit
    def _load_tile(
        self, pages: PagedTensors, sK: cute.Tensor, sV: cute.Tensor, sLists, unit: _Unit,
        keys: _Keys, tidx: Int32, stage0: Int32, i: Int32, stage: Int32,
    ):  # fmt: skip
        _, _, sPage, sRow = sLists
        first, _ = self._tile(sLists, keys, i)
        page, row = Int32(0), Int32(0)
        if keys.tile_group == 0:
            index, row = divide(first, pages.page_rows)
            page = pages.table[Int64(unit.sequence) * pages.max_pages + index]
        else:
            tile = keys.first_tile + i * self.listed_groups
            entry = tile // self.block_tiles
            page, row = sPage[entry], sRow[entry] + tile % self.block_tiles * TILE_KEYS
        place = functools.partial(self._place, keys, first, page, row)
        self.attention.load_tile(
            pages, sK, sV, place, unit.kv_head, True, True, tidx, stage0 + stage
        )

    def _place(self, keys: _Keys, first: Int32, page: Int32, row: Int32, key: Int32):
        position = first + key
        return page, row + key, (position >= keys.first) & (position <= keys.last)


@kept
def compile_decode_units(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    select_size: int,
    form: str,
    packed: bool,
) -> Callable:
    """The compiled kernel of these forms."""
    # Lists and gates.
    beside = 4 * 6 * MAX_UNITED + 12 * MMA_ROWS * _ROW_GROUPS
    attention = make_attention(dtype, head_dim, head_dim_v, _ROW_GROUPS, beside)
    vector = CUTE_DTYPES[dtype]

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    return compile_kernel(
        DecodeUnits(attention, group, select_size, form),
        _Tensors(
            fake_flat(vector),
            *(integers(packed), integers(), integers(), integers()),
            *(fake_flat(Float32), integers(), fake_flat(Float32, alignment=4), integers()),
            fake_flat(vector if form == "gates" else None),
            fake_flat(vector if form == "weight" else None),
            *(fake_flat(vector), integers()),
        ),
        fake_pages(vector),
        _Sizes(*(Int32(1) for _ in range(7)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    bf16, fp16 = torch.bfloat16, torch.float16
    forms = [
        (bf16, 128, 128, 16, 64, FORMS[0], False),
        (fp16, 64, 64, 8, 128, FORMS[1], True),
        (bf16, 96, 96, 12, 64, FORMS[2], True),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-units-{name}", functools.partial(compile_decode_units, *form)


def decode_units(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    parts: Parts,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor,
    window: int,
    scale: float,
    gates: Tensor | None,
    weight: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    """See :func:`nsa.fused.decode_calls.decode_units`."""
    head_dim, head_dim_v = q.shape[-1], pool.v.shape[-1]
    out = q.new_empty((*q.shape[:2], head_dim_v))
    form = "gates" if gates is not None else "weight" if weight is not None else "mean"
    flat_q, q_stride = flat_rows(q)
    compile_decode_units(
        q.dtype, head_dim, head_dim_v, shape.group, rule.select_size, form, cu_seqlens is not None
    )(
        _Tensors(
            *(flat_q, cu_seqlens, *schedule, *(x.view(-1) for x in parts)),
            lists.contiguous().view(-1),
            *(flat(gates), flat(weight), out.view(-1), lengths),
        ),
        page_arguments(pool, table),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads, shape.unit_tokens, shape.token_blocks),
            *(lists.shape[-1], window, q_stride),
        ),
        scale * LOG2_E,
    )
    return out
