"""The end of a decoding step: selection, selected and window branch, and the gated sum.

A list is of a token and KV head, in tile mode of a token and query head. The CTAs of a cluster
share it. Each attends its tiles of the window, which needs no list, while the compressed branch
ends. Then it scores its share of the blocks from that branch's records; from the best of each CTA,
all find the list. Each attends its tiles of that. At last the branches are added up across the
cluster (:mod:`nsa.fused.kernels.decode_outputs`).

Or each CTA of a cluster has a token and its list, and the CTAs share the window, which is almost
the same for all of them. Each attends its tiles of the window for the rows of all tokens.

The first CTA also stores the new lengths: no kernel of the step reads them after the append.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused.decode_inputs import (
    CLUSTERS,
    MAX_LISTED,
    NO_REFERENCE,
    TILE_KEYS,
    DecodeRule,
    DecodeShape,
    Parts,
    Pool,
    Records,
    Schedule,
    TileLists,
    num_groups,
    record_groups,
)
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.decode_lists import ClusterLists, load_list
from nsa.fused.kernels.decode_outputs import ClusterOutputs, Exchange, load_gates
from nsa.fused.kernels.decode_pages import PagedTensors, fake_pages, page_arguments
from nsa.fused.kernels.decode_parts import COLUMNS
from nsa.fused.kernels.decode_places import MOST_TILES, KeyRange, ListTiles
from nsa.fused.kernels.decode_schedule import PDL, divide, unit_parts, wait_for_previous
from nsa.fused.kernels.decode_scores import RecordRows, RecordTensors, sum_parts
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention, make_attention
from nsa.fused.kernels.gated_sum import FORMS
from nsa.fused.kernels.hopper import mlir_namedtuple
from nsa.fused.kernels.vectors import CUTE_DTYPES, fake_flat, flat, flat_rows


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
    floors: cute.Tensor | None


@mlir_namedtuple
class _Sizes(NamedTuple):
    """Sizes of the call; lists have ``slots`` blocks.

    ``kv_share`` lists of a token share a KV head. ``tile_size`` and ``tile_slots`` are of tile
    mode. ``groups`` of 16 slots have room in the records of a row.
    """

    batch: Int32
    tokens: Int32
    lists: Int32
    kv_share: Int32
    unit_tokens: Int32
    token_blocks: Int32
    slots: Int32
    window: Int32
    tile_size: Int32
    tile_slots: Int32
    groups: Int32
    num_initial: Int32
    num_local: Int32
    q_stride: Int64


class DecodeFinish:
    """Lists serve ``group`` query heads. ``count`` blocks are selected; with 0 there are lists.

    ``form`` of the gates is one of ``FORMS``. With ``of_tokens`` each CTA of a cluster has a token.
    """

    def __init__(
        self, attention: TileAttention, group: int, rule: DecodeRule, count: int, form: str,
        cluster: int, of_tokens: bool, tile_mode: bool, rings: bool, record_groups: int,
    ):  # fmt: skip
        self.attention = attention
        self.group = group
        self.select_size = rule.select_size
        self.selects = count > 0
        self.form = form
        self.cluster = cluster
        # Tokens of a cluster, and CTAs of a list.
        self.cluster_tokens, self.splits = (cluster, 1) if of_tokens else (1, cluster)
        self.of_tokens = of_tokens
        self.tile_mode = tile_mode
        self.lists = ClusterLists(rule, group, count, self.splits, attention.warps, record_groups)
        self.tiles = ListTiles(attention, rule.select_size, rings)
        self.outputs = ClusterOutputs(attention, cluster, of_tokens)

    @cute.jit
    def __call__(
        self,
        tensors: _Tensors,
        records: RecordTensors | None,
        pages: PagedTensors,
        rings: PagedTensors | None,
        sizes: _Sizes,
        scale_log2: Float32,
        stream,
    ):
        attention = self.attention
        layouts, mmas = attention.layouts(), attention.make_mmas()
        units = sizes.batch * cute.ceil_div(sizes.tokens, self.cluster_tokens) * sizes.lists
        self.kernel(tensors, records, pages, rings, sizes, scale_log2, mmas, layouts).launch(
            grid=[units * self.cluster, 1, 1],
            block=[attention.threads, 1, 1],
            cluster=[self.cluster, 1, 1],
            stream=stream,
            use_pdl=PDL,
            min_blocks_per_mp=attention.ctas,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors: _Tensors,
        records: RecordTensors | None,
        pages: PagedTensors,
        rings: PagedTensors | None,
        sizes: _Sizes,
        scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...],
        layouts: tuple[cute.ComposedLayout, ...],
    ):
        tidx, _, _ = cute.arch.thread_idx()
        bidx, _, _ = cute.arch.block_idx()
        rank, unit = bidx % self.cluster, bidx // self.cluster
        unit, index = divide(unit, sizes.lists)
        blocks = (sizes.tokens + (self.cluster_tokens - 1)) // self.cluster_tokens
        sequence, block = divide(unit, blocks)
        first_token = block * self.cluster_tokens
        row0, new = sequence * sizes.tokens, sizes.tokens
        if const_expr(tensors.cu_seqlens is not None):
            row0 = tensors.cu_seqlens[sequence]
            new = tensors.cu_seqlens[sequence + 1] - row0

        smem = cutlass.memory.SmemAllocator()
        memory = self.attention.allocate(smem, layouts)
        listed = smem.allocate_tensor(Int32, cute.make_layout(MAX_LISTED), 16)
        sBest = smem.allocate_tensor(Int64, cute.make_layout(MAX_LISTED), 16)
        rows = const_expr(self.attention.rows)
        compressed = tuple(
            smem.allocate_tensor(dtype, cute.make_layout(rows), 16) for dtype in (Int32, Float32)
        )
        layout = cute.make_layout(MMA_ROWS * self.attention.warps)
        sums = None
        if const_expr(self.splits == 1):
            sums = tuple(smem.allocate_tensor(dtype, layout, 16) for dtype in (Int32, Float32))
        sGates = smem.allocate_tensor(Float32, cute.make_layout(3 * rows), 16)
        sParts = smem.allocate_tensor(Int32, cute.make_layout(4), 16)
        sTiles = tuple(
            smem.allocate_tensor(Int32, cute.make_layout(MOST_TILES), 16) for _ in range(2)
        )
        if first_token < new:
            exchange = None
            if const_expr(self.splits > 1):
                exchange = self.outputs.start_exchange(
                    smem, self.lists.best.count if self.selects else 0, tidx
                )
            self._finish(
                tensors, records, pages, rings, sizes, scale_log2, mmas, memory, exchange, listed,
                sBest, compressed, sums, sGates, sParts, sTiles, sequence, row0, new, first_token,
                index, rank,
            )  # fmt: skip
        if bidx == 0:
            wait_for_previous()
            for b in cutlass.range(tidx, sizes.batch, self.attention.threads, unroll=1):
                end = tensors.ends[b]
                tensors.lengths[b] = end
                if const_expr(self.tile_mode):
                    # The lists of older tiles are gone.
                    tile = (end - 1) // sizes.tile_size - (sizes.tile_slots - 1)
                    floor = tensors.floors[b]
                    tensors.floors[b] = cutlass.max(floor, tile * sizes.tile_size)

    @cute.jit
    def _finish(
        self, tensors: _Tensors, records: RecordTensors | None, pages: PagedTensors,
        rings: PagedTensors | None, sizes: _Sizes, scale_log2: Float32,
        mmas: tuple[cute.TiledMma, ...], memory, exchange: Exchange | None, listed: cute.Tensor,
        sBest: cute.Tensor, compressed, sums, sGates: cute.Tensor, sParts: cute.Tensor, sTiles,
        sequence: Int32, row0: Int32, new: Int32, first_token: Int32, index: Int32, rank: Int32,
    ):  # fmt: skip
        stages = const_expr(self.attention.stages)
        sQ, sK, sV, ring, *warp_sums = memory
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
        row_group, key_group = warp % self.attention.row_groups, warp // self.attention.row_groups
        kv_head = index
        if const_expr(self.tile_mode):
            kv_head = index // sizes.kv_share
        start, end = tensors.starts[sequence], tensors.ends[sequence]
        # This CTA's token and, in the window, that of the warp's rows. Some may be missing.
        last_token = cutlass.min(first_token + self.cluster_tokens, new) - 1
        token, window_token, window_group = first_token, first_token, row_group
        if const_expr(self.of_tokens):
            window_group = warp % (self.cluster * self.attention.row_groups)
            token = first_token + rank
            window_token = first_token + window_group // self.attention.row_groups
        is_real = token < new
        token = cutlass.min(token, last_token)
        row = Int64(row0 + token)
        position, window_position = (
            cutlass.min(start + cutlass.min(x, last_token), end - 1) for x in (token, window_token)
        )
        self.attention.load_queries(
            tensors.q, sQ, functools.partial(self._query_offset, sizes, row, index),
            functools.partial(self._has_query, sizes), tidx,
        )  # fmt: skip
        sRows = sQ
        if const_expr(self.of_tokens):
            # The rows of all tokens are where the last one of the first tiles will be.
            sRows = sK[None, None, stages - 1]
            self.attention.load_queries(
                tensors.q, sRows,
                functools.partial(
                    self._window_offset, sizes, Int64(row0), first_token, last_token, index
                ),
                functools.partial(self._has_window_query, sizes), tidx,
            )  # fmt: skip
        cute.arch.cp_async_commit_group()
        heads = sizes.lists * self.group
        # Parts of the compressed branch, and the rows there.
        unit_rows = sizes.unit_tokens * self.group * sizes.kv_share
        parts = tensors.cmp_out, tensors.cmp_reference, tensors.cmp_total
        # Queries are not needed any more where CTAs share a list.
        sRest = cute.make_tensor(
            cute.recast_ptr(sQ.iterator, dtype=Float32),
            cute.make_layout(self.outputs.owned * COLUMNS),
        )

        # The keys that a warp's rows see, and those that the CTAs load: in the window at first.
        first_seen = cutlass.max(window_position + 1 - sizes.window, 0)
        last_seen = window_position
        first_key = cutlass.min(start + first_token, end - 1) + 1 - sizes.window
        first_key = cutlass.max(first_key, 0)
        last_key = cutlass.min(start + last_token, end - 1)
        window_tile = first_key // TILE_KEYS
        tiles = last_key // TILE_KEYS + 1 - window_tile
        first_tile = rank * tiles // self.cluster
        count = (rank + 1) * tiles // self.cluster - first_tile
        # Times that a warp takes keys of a tile, and the first ones. Then those that are next to
        # the ones that all warps with these rows have.
        passes, first_group = Int32(1), key_group
        step = const_expr(self.attention.key_groups // self.cluster_tokens)
        if const_expr(self.of_tokens):
            passes = Int32(self.cluster)
            first_group = warp // (self.cluster * self.attention.row_groups)
        valid = Int32(0)
        queries = self.attention.make_rows(sQ, mmas[0], lane)
        acc_O = self.attention.make_output(mmas, lane)
        reference = cute.make_rmem_tensor(2, Int32)
        total = cute.make_rmem_tensor(2, Float32)
        found = self.outputs.make_vectors()
        turns = Int32(2)
        if const_expr(self.of_tokens):
            turns = Int32(2) if is_real else Int32(1)
        # The window, then the list. One copy of this code for both, because much of a short step
        # is its loading.
        for turn in cutlass.range(turns, unroll=1):
            if turn == 1:
                wait_for_previous()
                first_slot, num_parts, unit_row = sParts[0], sParts[1], sParts[2]
                sum_up = functools.partial(
                    sum_parts, parts, compressed, first_slot, num_parts, unit_rows,
                    Int64(unit_row), self.group, self.attention.warps, tidx,
                )  # fmt: skip
                receive_window = functools.partial(
                    self._receive_window, found, exchange, sGates, rank, tidx
                )
                list_row = row * sizes.lists + index
                if const_expr(self.selects):
                    record_rows = RecordRows(sParts[3], unit_rows, unit_row)
                    self.lists.select(
                        records, sizes.groups, (sizes.num_initial, sizes.num_local), ring,
                        exchange, sBest, compressed, sum_up, receive_window, position, record_rows,
                        rank % self.splits, tidx,
                    )  # fmt: skip
                    valid = self.lists.list_best(
                        tensors.blocks, listed, sBest, list_row, rank % self.splits
                    )
                else:
                    sum_up()
                    if const_expr(self.splits > 1):
                        receive_window()
                    if const_expr(self.tile_mode):
                        slot = position // sizes.tile_size % sizes.tile_slots
                        list_row = Int64(sequence * sizes.tile_slots + slot) * sizes.lists + index
                    valid = load_list(
                        tensors.blocks, sizes.slots, self.select_size, listed, position, list_row
                    )
                cute.arch.barrier()
                tiles = cute.ceil_div(valid * self.select_size, TILE_KEYS)
                # The other way round, so that CTAs with fewer tiles of the window have more.
                after = self.splits - 1 - rank % self.splits
                first_tile = after * tiles // self.splits
                count = (after + 1) * tiles // self.splits - first_tile
                first_seen, last_seen, first_key, last_key = Int32(0), position, Int32(0), position
                passes, first_group = Int32(1), key_group
            acc_O.fill(0.0)
            reference.fill(NO_REFERENCE)
            total.fill(0.0)
            key_position = functools.partial(
                self.tiles.key_position, listed, turn, window_tile, valid
            )
            keys = KeyRange(sequence, kv_head, first_key, last_key)
            self.tiles.find(pages, rings, sTiles, keys, turn, key_position, tidx, first_tile, count)
            load_tile = functools.partial(
                self.tiles.load, pages, rings, sK, sV, sTiles, keys, turn, key_position, tidx,
                first_tile,
            )  # fmt: skip
            self.attention.start_tiles(load_tile, count)
            # While the first tiles are on their way.
            if turn == 0:
                load_gates(
                    self.form, self.attention.head_dim, self.attention.warps, tensors.gates,
                    tensors.weight, tensors.q, row * sizes.q_stride, row * heads,
                    index * self.group, self.group, sGates, tidx,
                )  # fmt: skip
                self._find_parts(tensors, sizes, sequence, index, token, sParts, tidx)
                cute.arch.cp_async_wait_group(stages - 1)
                cute.arch.barrier()
                self.attention.read_rows(queries, sRows, mmas[0], window_group, lane)
            else:
                if const_expr(self.of_tokens):
                    self.attention.read_rows(queries, sQ, mmas[0], row_group, lane)
                self.outputs.add_parts(
                    found, parts, compressed, sGates, sParts[0], sParts[1], unit_rows,
                    Int64(sParts[2]), self.group, rank % self.splits, sRest, tidx,
                )  # fmt: skip
            for i in cutlass.range(count, unroll=1):
                self.attention.wait_for_tile(Int32(0))
                stage = self.attention.load_ahead(load_tile, i, count)
                for j in cutlass.range(passes, unroll=1):
                    self.attention.attend_tile(
                        mmas, queries, sK[None, None, stage], sV[None, None, stage], acc_O,
                        reference, total, key_position, (first_tile + i) * TILE_KEYS, first_seen,
                        last_seen, first_group + j * step, warp, lane, scale_log2,
                    )  # fmt: skip
            cute.arch.cp_async_wait_group(0)
            add_up = functools.partial(
                self.outputs.add_up, found, acc_O, reference, total, ring, warp_sums, sums,
                sGates, 2 - turn, self.group,
            )  # fmt: skip
            if const_expr(self.of_tokens):
                if turn == 0:
                    add_up(self.cluster, rank, tidx)
                else:
                    add_up(1, Int32(0), tidx)
            else:
                if const_expr(self.splits > 1):
                    self.outputs.send(
                        exchange, turn, acc_O, reference, total, ring, warp_sums, rank, tidx
                    )
                else:
                    add_up(1, rank, tidx)
        if const_expr(self.splits > 1):
            self.outputs.add_rest(found, sRest, tidx)
            self.outputs.receive(found, exchange, 1, sGates, self.group, rank, tidx)

        if is_real:
            self.outputs.store(
                found, tensors.out, row * heads + index * self.group, self.group,
                rank % self.splits, tidx,
            )  # fmt: skip

    @cute.jit
    def _find_parts(
        self, tensors: _Tensors, sizes: _Sizes, sequence: Int32, index: Int32, token: Int32,
        sParts: cute.Tensor, tidx: Int32,
    ):  # fmt: skip
        """Write first slot and number of a list's parts, its first row in them, and its unit."""
        block, in_block = divide(token, sizes.unit_tokens)
        kv_head, sharing, kv_heads = index, Int32(0), sizes.lists
        if const_expr(self.tile_mode):
            kv_head, sharing = divide(index, sizes.kv_share)
            kv_heads = sizes.lists // sizes.kv_share
        unit, units = kv_head * sizes.token_blocks + block, kv_heads * sizes.token_blocks
        slot, count = unit_parts(tensors.tiles, sequence, unit, units)
        row = (in_block * sizes.kv_share + sharing) * self.group
        if tidx == 0:
            found = slot, count, row, sequence * units + unit
            for i in cutlass.range_constexpr(4):
                sParts[i] = found[i]

    @cute.jit
    def _receive_window(
        self, found: list[cute.Tensor], exchange: Exchange, sGates: cute.Tensor, rank: Int32,
        tidx: Int32,
    ):  # fmt: skip
        self.outputs.receive(found, exchange, 0, sGates, self.group, rank, tidx)
        # CTAs may send the selected branch once all have received the window.
        cute.arch.barrier()
        cute.arch.cluster_arrive_relaxed()

    def _query_offset(self, sizes, token_row, index, row) -> Int64:
        return token_row * sizes.q_stride + (index * self.group + row) * self.attention.head_dim

    def _has_query(self, sizes, row) -> Boolean:
        return row < self.group

    def _window_offset(self, sizes, row0, first_token, last_token, index, row) -> Int64:
        """Where a row is of those of all tokens; each has as many as the CTA has rows."""
        token = cutlass.min(first_token + row // self.attention.rows, last_token)
        return self._query_offset(sizes, row0 + token, index, row % self.attention.rows)

    def _has_window_query(self, sizes, row) -> Boolean:
        return row % self.attention.rows < self.group


@kept
def compile_decode_finish(
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    group: int,
    rule: DecodeRule,
    count: int,
    form: str,
    cluster: int,
    of_tokens: bool,
    packed: bool,
    tile_mode: bool,
    rings: bool,
    record_groups: int,
) -> Callable:
    """The compiled kernel of these forms."""
    row_groups = -(-group // MMA_ROWS)
    # Lists, tiles, places of parts and gates; sums, or what the CTAs of a list exchange.
    beside = 1808 + 20 * MMA_ROWS * row_groups
    if cluster > 1 and not of_tokens:
        beside += MMA_ROWS * row_groups * (4 * head_dim_v + 8 * cluster) + 8 * cluster * count + 32
    else:
        beside += 512
    attention = make_attention(dtype, head_dim, head_dim_v, row_groups, beside)
    vector = CUTE_DTYPES[dtype]

    def integers(used: bool = True):
        return fake_flat(Int32 if used else None, alignment=4)

    def floats(used: bool = True):
        return fake_flat(Float32 if used else None)

    return compile_kernel(
        DecodeFinish(
            attention, group, rule, count, form, cluster, of_tokens, tile_mode, rings, record_groups
        ),
        _Tensors(
            fake_flat(vector),
            *(integers(packed), integers(), integers(), integers()),
            *(floats(), integers(), floats(), integers()),
            fake_flat(vector if form == "gates" else None),
            fake_flat(vector if form == "weight" else None),
            *(fake_flat(vector), integers(), integers(tile_mode)),
        ),
        RecordTensors(floats(), floats(rule.carried > 0), fake_flat(Int32)) if count else None,
        fake_pages(vector),
        fake_pages(vector) if rings else None,
        _Sizes(*(Int32(1) for _ in range(13)), Int64(1)),
        Float32(1.0),
    )


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and functions that compile what each names; no GPU is needed."""
    paper, bf16, fp16 = DecodeRule.of(NSAConfig.paper()), torch.bfloat16, torch.float16
    forms = [
        (bf16, 128, 128, 16, paper, 16, "gates", c, False, False, False, False, 1) for c in CLUSTERS
    ]
    forms += [
        (bf16, 128, 128, 8, paper, 0, form, 2, False, True, False, False, 1) for form in FORMS
    ]
    forms += [
        (bf16, 128, 128, 16, paper, 16, "gates", 2, True, False, False, False, 4),
        (fp16, 64, 64, 32, DecodeRule(16, 16, 32), 64, "mean", 8, False, True, False, True, 4),
        (fp16, 64, 64, 32, DecodeRule(16, 16, 32), 64, "mean", 2, True, True, False, True, 4),
        (fp16, 96, 96, 3, DecodeRule(32, 32, 32), 1, "weight", 4, False, False, False, False, 1),
        (bf16, 192, 128, 1, DecodeRule(64, 4, 64), 40, "weight", 2, False, False, False, False, 1),
        (bf16, 256, 256, 20, DecodeRule(16, 8, 64), 16, "weight", 1, False, False, False, False, 1),
        (bf16, 256, 256, 3, DecodeRule(16, 8, 64), 16, "weight", 4, True, False, False, False, 1),
        (fp16, 32, 32, 6, DecodeRule(32, 32, 32), 16, "weight", 1, False, False, False, False, 1),
        (bf16, 128, 128, 1, DecodeRule(64, 64, 64), 0, "mean", 1, False, False, True, False, 1),
    ]
    for form in forms:
        name = "-".join(map(str, form)).replace("torch.", "")
        yield f"decode-finish-{name}", functools.partial(compile_decode_finish, *form)


def decode_finish(
    q: Tensor,
    pool: Pool,
    rings: Pool | None,
    table: Tensor,
    parts: Parts,
    records: Records | None,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor | TileLists,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
    gates: Tensor | None,
    weight: Tensor | None,
    lengths: Tensor,
    floors: Tensor | None,
    cluster: int,
    of_tokens: bool,
) -> Tensor:
    """See :func:`nsa.fused.decode_calls.decode_finish`."""
    head_dim, head_dim_v = q.shape[-1], pool.v.shape[-1]
    out = q.new_empty((*q.shape[:2], head_dim_v))
    tile_mode, tile_size, tile_slots = isinstance(lists, TileLists), 1, 1
    kv_share, group, blocks = 1, shape.group, lists
    if isinstance(lists, TileLists):
        blocks, tile_size = lists
        tile_slots = blocks.shape[1]
        kv_share, group = group, 1
    together = record_groups(shape.row_groups)
    form = "gates" if gates is not None else "weight" if weight is not None else "mean"
    flat_q, q_stride = flat_rows(q)
    compile_decode_finish(
        q.dtype, head_dim, head_dim_v, group, rule,
        0 if records is None else blocks.shape[-1], form, cluster, of_tokens,
        cu_seqlens is not None, tile_mode, rings is not None, together,
    )(
        _Tensors(
            *(flat_q, cu_seqlens, *schedule, *(x.view(-1) for x in parts)),
            blocks.contiguous().view(-1),
            *(flat(gates), flat(weight), out.view(-1), lengths),
            floors if tile_mode else None,
        ),
        None if records is None
        else RecordTensors(*(None if x is None else x.view(-1) for x in records)),
        page_arguments(pool, table),
        None if rings is None else page_arguments(rings, table),
        _Sizes(
            *(shape.batch, shape.tokens, shape.kv_heads * kv_share, kv_share),
            *(shape.unit_tokens, shape.token_blocks, blocks.shape[-1], window),
            *(tile_size, tile_slots, num_groups(records, shape.row_groups) if records else 1),
            *(num_initial, num_local, q_stride),
        ),
        scale * LOG2_E,
    )  # fmt: skip
    return out
