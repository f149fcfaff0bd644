"""FlashAttention-4's forward that ends with the gated sum of all branches (paper Eq. 5).

The last kernel of a long batch's forward is the window's, because it has the same rows in the same
order as the output. Its tensor cores set the pace, so the outputs of the other branches arrive
while it computes: TMA copies them to shared memory, and three of the four producer warps, which
FA4 leaves idle, compute the gates from the queries there. So no pass over memory is left for the
sum, and where no backward needs the window's output, it is never written.

Row r of a tile of queries is head ``r % group`` of a token. A CTA passes through several tiles:
while it ends one, the queries and the first keys of the next one arrive.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.base_dsl.utils.mlir_value_tree import extract_mlir_attributes
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.tensor_utils import LayoutEnum
from torch import Tensor

from nsa.fused.fa4_call import Call
from nsa.fused.fa4_variants import Variant, forward_tile
from nsa.fused.hardware import LOG2_E, QUAD, WARP, WARP_ROWS, WARPGROUP
from nsa.fused.kernel_inputs import IN_ORDER, Pair
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.fa4_fakes import Fakes
from nsa.fused.kernels.fa4_sm90 import forward_kernel, ordered
from nsa.fused.kernels.gated_sum import gating_form
from nsa.fused.kernels.head_rows import sm_count
from nsa.fused.kernels.hopper import (
    FlashAttentionForwardSm90,
    SingleTileScheduler,
    WorkTileInfo,
    get_smem_load_atom,
    get_smem_store_C,
    make_packgqa_tiled_tma_atom,
    make_smem_layout,
    mlir_namedtuple,
    reshape_acc_to_mn,
    tma_get_copy_fn,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_output,
    check_tensor,
    fake_flat,
    flat,
    flat_rows,
    load_vector,
)

# The first producer warp loads queries, keys and values.
_PREPARING = WARPGROUP - WARP
# Named barriers; FA4's forward uses those up to 6.
_INITIALIZED, _SUMMED = 7, 8
# Of FA4's pipeline of queries, and one more.
_BARRIERS = 3
# The most tiles of a CTA. With more, CTAs that start late, because another kernel holds their
# processors, end later.
_MOST_TILES = 16
# Of a tile's time, what a CTA takes for itself, by estimate.
_START = 0.2
# Registers of a thread that computes, and of one that loads, by warp groups that compute. Of two,
# FA4 gives 24 to those that load, too few for the gates.
_REGISTERS = {2: (232, 40), 3: (160, 32)}


@mlir_namedtuple
class Branches(NamedTuple):
    """The outputs of the other branches, the gates or the weight, and the window's output to write.

    ``strides`` are the elements from token to token of the first two; ``heads`` counts all heads,
    ``ctas`` the CTAs.
    """

    o_cmp: cute.Tensor
    o_slc: cute.Tensor
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    o_win: cute.Tensor | None
    strides: tuple[Int64, Int64]
    heads: Int32
    ctas: Int32


def fake_branches(dtype: type[cutlass.Numeric], form: str, keep: bool) -> Branches:
    """Stand-ins, to compile with."""
    return Branches(
        fake_flat(dtype),
        fake_flat(dtype),
        fake_flat(dtype) if form == "gates" else None,
        fake_flat(dtype) if form == "weight" else None,
        fake_flat(dtype) if keep else None,
        (Int64(1), Int64(1)),
        Int32(1),
        Int32(1),
    )


@mlir_namedtuple
class _Loaded(NamedTuple):
    """The same in the kernel: TMA copies of the other branches' outputs and of the sum, and the
    tensors that they read or write."""

    copies: tuple
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    o_win: cute.Tensor | None
    heads: Int32


class _Carrier(cute.TiledCopy):
    """Carries the branches to a kernel in place of a copy that it takes and does not use."""

    def __init__(self, branches: _Loaded):
        self.branches = branches

    def __str__(self) -> str:
        return str(self.branches)

    def __extract_mlir_values__(self) -> list:
        return cutlass.extract_mlir_values(self.branches)

    def __extract_mlir_attributes__(self) -> list:
        return extract_mlir_attributes(self.branches)

    def __new_from_mlir_values__(self, values: list) -> "_Carrier":
        return _Carrier(cutlass.new_from_mlir_values(self.branches, values))


class ClosingForward(FlashAttentionForwardSm90):
    """Writes the sum of the branches in place of its output; gates in a form of
    :mod:`nsa.fused.kernels.gated_sum`. For batches, and where TMA loads queries."""

    def __init__(self, *arguments, form: str, **options):
        super().__init__(*arguments, **options)
        self.form = form

    @cute.jit
    def __call__(
        self,
        mQ: cute.Tensor,
        mK: cute.Tensor,
        mV: cute.Tensor,
        mO: cute.Tensor,
        mLSE: cute.Tensor,
        softmax_scale: Float32,
        window_size_left: Int32 | None,
        window_size_right: Int32 | None,
        branches: Branches,
        stream,
    ):
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        _, length, _, dim = mQ.shape
        others = zip(branches[:2], branches.strides, strict=True)
        others = [(load, x, (stride * length, stride, dim)) for x, stride in others]
        copies = [self._make_copy(*x, mQ.shape) for x in (*others, (store, mO, mO.stride[:3]))]
        self.branches = _Loaded(
            tuple(part for copy in copies for part in copy),
            *(branches.gates, branches.weight, branches.o_win, branches.heads),
        )
        self.ctas = branches.ctas
        FlashAttentionForwardSm90.__call__(
            self,
            *(mQ, mK, mV, mO, mLSE, softmax_scale),
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            stream=stream,
        )

    def kernel(self, *arguments):
        """FA4's, launched with fewer CTAs."""
        return _Launcher(super().kernel(*arguments), self.ctas)

    def _make_copy(self, operation, mX: cute.Tensor, strides: tuple, shape: tuple) -> tuple:
        """The copy of a tile of a branch's output or of the sum, and the tensor that it copies.
        ``strides`` are those of batch, token and head."""
        batch, length, heads, dim = shape
        per_batch, token, head = (cute.assume(Int64(x), divby=VECTOR) for x in strides)
        layout = cute.make_layout((length, dim, heads, batch), stride=(token, 1, head, per_batch))
        smem = make_smem_layout(self.dtype, LayoutEnum.ROW_MAJOR, (self.tile_m, self.tile_hdimv))
        make = cpasync.make_tiled_tma_atom
        if const_expr(self.pack_gqa):
            make = partial(
                make_packgqa_tiled_tma_atom, qhead_per_kvhead=self.qhead_per_kvhead, head_idx=2
            )
        atom, tensor = make(
            operation,
            cute.make_tensor(mX.iterator, layout),
            smem,
            (self.tile_m, self.tile_hdimv),
        )
        return atom, tensor

    def _setup_attributes(self):
        super()._setup_attributes()
        self.num_mma_regs, self.num_producer_regs = _REGISTERS[self.num_wg_mma]
        # FA4 hands these copies to the threads that load and to those that store, and uses TMA.
        self.gmem_tiled_copy_Q = self.gmem_tiled_copy_O = _Carrier(self.branches)

    def _get_shared_storage_cls(self):
        element, stages = self.dtype, self.num_stages

        def aligned(elements: int):
            memory = cute.struct.MemRange[element, elements]
            return cute.struct.Align[memory, self.buffer_align_bytes]

        def barriers(count: int):
            return cute.struct.MemRange[Int64, count]

        # FA4's two barriers, that of the copies, and the gates in what alignment would leave empty.
        numbers = _BARRIERS + (3 * self.tile_m + 1) // 2
        others = 2 * self.tile_m * self.tile_hdimv
        weights = 0 if self.sP_layout is None else cute.cosize(self.sP_layout)

        @cute.struct
        class Storage:
            mbar_ptr_K: barriers(2 * stages)
            mbar_ptr_V: barriers(2 * stages)
            mbar_ptr_Q: barriers(numbers)
            sV: aligned(cute.cosize(self.sV_layout))
            sQ: aligned(cute.cosize(self.sQ_layout) + others)
            sK: aligned(cute.cosize(self.sK_layout))
            sP: aligned(weights)

        return Storage

    def _other(self, sQ: cute.Tensor, i: int) -> cute.Tensor:
        """Where the tile of branch ``i`` lies: the tiles follow the queries."""
        size = self.tile_m * self.tile_hdim
        return cute.make_tensor(sQ.iterator + size * (1 + i), sQ.layout)

    def _gates(self, pipeline_q) -> cute.Tensor:
        """The gates of the rows in shared memory, ``(rows, 3)``."""
        start = pipeline_q.sync_object_full.get_barrier(0) + _BARRIERS
        return cute.make_tensor(
            cute.recast_ptr(start, dtype=Float32), cute.make_layout((self.tile_m, 3))
        )

    def _place(self, row: Int32, m_block: Int32, head_idx: Int32) -> tuple[Int32, Int32]:
        """The token and the head of a row of a tile."""
        index = m_block * self.tile_m + row
        token = index // self.qhead_per_kvhead
        head = index - token * self.qhead_per_kvhead
        return token, head_idx * self.qhead_per_kvhead + head

    def load(self, mQ, mK, mV, sQ, *arguments):
        """FA4's loads by the first warp; the others prepare the sum, and one stores it."""
        *others, block_info, seqlen_info, scheduler = arguments
        *_, pipeline_q, carrier, _, _ = others
        seqlen_info = partial(self._from_first_key, block_info, seqlen_info)
        scheduler = partial(_Tiles.start, *scheduler.args)
        super().load(mQ, mK, mV, sQ, *others, block_info, seqlen_info, scheduler)
        self._prepare(sQ, pipeline_q, carrier.branches, seqlen_info, scheduler)

    @cute.jit
    def _from_first_key(self, block_info, seqlen_info: Callable, place: "_Place"):
        """What FA4 knows of a tile's sequence, without keys before the first that the tile sees.

        Tiles of keys start there, so that there are fewer: of 48 queries with windows of 512 keys,
        7 of 80 keys, where 8 would hold them if they started at multiples of 80.
        """
        seqlen = seqlen_info(place.batch)
        first = Int32(0)
        if const_expr(block_info.window_size_left is not None):
            query = place.m_block * self.tile_m // self.qhead_per_kvhead
            first = query + seqlen.seqlen_k - seqlen.seqlen_q - block_info.window_size_left
            first = cutlass.max(first, 0)
        return _FromFirstKey(seqlen, first)

    @cute.jit
    def _prepare(
        self,
        sQ: cute.Tensor,
        pipeline_q: cutlass.pipeline.PipelineAsync,
        branches: _Loaded,
        seqlen_info: Callable,
        scheduler: Callable,
    ):
        """Bring the other branches' outputs and the gates to shared memory, and store the sums."""
        tidx, _, _ = cute.arch.thread_idx()
        if tidx >= WARP:
            tidx = tidx - WARP
            prepared = self._prepared(pipeline_q)
            if tidx < WARP:
                with cute.arch.elect_one():
                    # Each warp arrives, and what the copies bring.
                    cute.arch.mbarrier_init(prepared, _PREPARING // WARP + 1)
                cute.arch.mbarrier_init_fence()
                cute.arch.fence_view_async_shared()
            self._wait_for_barriers()
            tiles = scheduler()
            tile = tiles.initial_work_tile_info()
            while tile.is_valid_tile:
                m_block, head_idx, place, _ = tile.tile_idx
                # The queries and the first keys come first.
                pipeline_q.consumer_wait_w_index_phase(0, place.turn)
                if tidx < WARP:
                    self._copy_others(sQ, prepared, branches, m_block, head_idx, place.batch)
                sGates = self._gates(pipeline_q)
                if const_expr(self.form == "weight"):
                    first_head = head_idx * self.qhead_per_kvhead
                    for item in cutlass.range(tidx // WARP, self._gate_items, _PREPARING // WARP):
                        self._compute_gates(
                            branches.weight, sQ, sGates, first_head, item, tidx % WARP
                        )
                else:
                    length = seqlen_info(place).seqlen_q
                    for row in cutlass.range(tidx, self.tile_m, _PREPARING, unroll=1):
                        token, head = self._place(row, m_block, head_idx)
                        token = Int64(place.batch) * length + cutlass.min(token, length - 1)
                        for i in cutlass.range_constexpr(3):
                            sGates[row, i] = Float32(1.0 / 3.0)
                            if const_expr(self.form == "gates"):
                                gate = (token * branches.heads + head) * 3 + i
                                sGates[row, i] = branches.gates[gate].to(Float32)
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(prepared)
                # When all rows of the sum are there, the gates have been read too.
                self._meet_sums(cute.arch.barrier)
                if tidx < WARP:
                    self._store_sum(sQ, branches, m_block, head_idx, place.batch)
                tiles.advance_to_next_work()
                tile = tiles.get_current_work()

    def _prepared(self, pipeline_q) -> cute.Pointer:
        """The barrier at which the other branches' outputs and the gates arrive."""
        return pipeline_q.sync_object_full.get_barrier(0) + 2

    def _wait_for_barriers(self):
        """Wait until the barrier is initialized."""
        cute.arch.barrier(
            barrier_id=_INITIALIZED, number_of_threads=_PREPARING + self.num_mma_threads
        )

    def _meet_sums(self, meet: Callable):
        """Arrive where a tile's sum is complete, and perhaps wait."""
        meet(barrier_id=_SUMMED, number_of_threads=_PREPARING + self.num_mma_threads)

    def mma_init(self):
        super().mma_init()
        self._wait_for_barriers()

    @cute.jit
    def _copy_others(
        self,
        sQ: cute.Tensor,
        prepared: cute.Pointer,
        branches: _Loaded,
        m_block: Int32,
        head_idx: Int32,
        batch: Int32,
    ):
        """Start to copy them, by a warp. Rows past the last token are zeros, and not stored."""
        tile = (self.tile_m, self.tile_hdimv)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(
                prepared, 2 * tile[0] * tile[1] * self.dtype.width // 8
            )
        for i in cutlass.range_constexpr(2):
            atom, mX = branches.copies[2 * i : 2 * i + 2]
            source = cute.local_tile(mX[None, None, head_idx, batch], tile, (m_block, 0))
            copy, _, _ = tma_get_copy_fn(
                *(atom, 0, cute.make_layout(1), source, self._other(sQ, i)), single_stage=True
            )
            copy(tma_bar_ptr=prepared)

    @cute.jit
    def _store_sum(
        self,
        sQ: cute.Tensor,
        branches: _Loaded,
        m_block: Int32,
        head_idx: Int32,
        batch: Int32,
    ):
        """Store the sum by a warp, for which it has been read when this returns."""
        atom, mX = branches.copies[4:]
        tile = (self.tile_m, self.tile_hdimv)
        target = cute.local_tile(mX[None, None, head_idx, batch], tile, (m_block, 0))
        copy, _, _ = tma_get_copy_fn(
            *(atom, 0, cute.make_layout(1), self._other(sQ, 0), target), single_stage=True
        )
        copy()
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)

    @property
    def _gate_items(self) -> int:
        """How often a warp computes the gates of one head and of up to 16 of the tile's tokens."""
        tokens = self.tile_m // self.qhead_per_kvhead
        return -(-tokens // WARP_ROWS) * self.qhead_per_kvhead

    @cute.jit
    def _compute_gates(
        self,
        mWeight: cute.Tensor,
        sQ: cute.Tensor,
        sGates: cute.Tensor,
        first_head: Int32,
        item: Int32,
        lane: Int32,
    ):
        """The gates of 16 tokens and a head, by a warp's product with the head's three weights.

        A thread has 8 neighbouring channels of each 32 of two rows and of a weight. Which channels
        meet in a product does not matter, so these are as good as those that mma.sync names.
        """
        heads, tokens = self.qhead_per_kvhead, const_expr(self.tile_m // self.qhead_per_kvhead)
        head, token = item % heads, item // heads * WARP_ROWS + lane // QUAD
        # Past the last token, it is computed again.
        rows = [cutlass.min(token + 8 * r, tokens - 1) * heads + head for r in range(2)]
        # Three columns are of use; the others are the last one again.
        gate = cutlass.min(lane // QUAD, 2)
        start = Int64((first_head + head) * 3 + gate) * self.tile_hdim
        tiled_mma = cute.make_tiled_mma(warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16)))
        logits = cute.make_rmem_tensor(((2, 2), 1, 1), Float32)
        logits.fill(0.0)
        for group in cutlass.range_constexpr(self.tile_hdim // (QUAD * VECTOR)):
            vector = group * QUAD + lane % QUAD
            weight = load_vector(mWeight, start + vector * VECTOR)
            q = []
            for r in cutlass.range_constexpr(2):
                part = cute.make_rmem_tensor(VECTOR, self.dtype)
                tile = cute.local_tile(sQ, (1, VECTOR), (rows[r], vector))
                cute.autovec_copy(cute.group_modes(tile, 0, 2), part)
                q.append(cute.recast_tensor(part, Int32))
            weight = cute.recast_tensor(weight, Int32)
            for half in cutlass.range_constexpr(2):
                a = cute.make_rmem_tensor(((2, 2, 2), 1, 1), self.dtype)
                b = cute.make_rmem_tensor(((2, 2), 1, 1), self.dtype)
                a_words = cute.make_tensor(cute.recast_ptr(a.iterator, dtype=Int32), 4)
                b_words = cute.make_tensor(cute.recast_ptr(b.iterator, dtype=Int32), 2)
                for word in cutlass.range_constexpr(2):
                    b_words[word] = weight[2 * half + word]
                    for r in cutlass.range_constexpr(2):
                        a_words[2 * word + r] = q[r][2 * half + word]
                cute.gemm(tiled_mma, logits, a, b, logits)
        # A thread has two neighbouring columns of both rows.
        for r in cutlass.range_constexpr(2):
            for i in cutlass.range_constexpr(2):
                column = lane % QUAD * 2 + i
                logit = logits[2 * r + i]
                # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
                value = cute.arch.rcp_approx(1.0 + cute.math.exp2(logit * -LOG2_E, fastmath=True))
                if column < 3:
                    sGates[rows[r], column] = value

    def mma(self, *arguments):
        *others, block_info, seqlen_info, mask, scheduler, lists, aux, divisors = arguments
        self.queries, branches = others[12], others[13].branches
        others[12] = _Queries(self.queries, self._prepared(self.queries), branches.o_win is None)
        seqlen_info = partial(self._from_first_key, block_info, seqlen_info)
        scheduler = partial(_Tiles.start, *scheduler.args)
        super().mma(*others, block_info, seqlen_info, mask, scheduler, lists, aux, divisors)

    def epilogue(self, acc_O, lse, mO, mLSE, sO, seqlen, carrier, _, tiled_mma, tidx, *place):
        m_block, head_idx, place = place
        place = (seqlen.seqlen_q, m_block, head_idx, place)
        self._add_branches(acc_O, sO, carrier.branches, tiled_mma, tidx, place)
        self._store_lse(lse, mLSE, tiled_mma, tidx, place)

    @cute.jit
    def _add_branches(
        self,
        acc_O: cute.Tensor,
        sO: cute.Tensor,
        branches: _Loaded,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        place: tuple,
    ):
        """Turn the window's output into the gated sum, and leave it in shared memory.

        A warp touches its own rows alone, so it waits for no other.
        """
        cute.arch.mbarrier_wait(self._prepared(self.queries), place[3].turn)
        acc_mn = reshape_acc_to_mn(acc_O)
        numbers = self._rows(tiled_mma, tidx)
        rows = const_expr(cute.size(acc_mn, mode=[0]))
        gates = self._gates(self.queries)
        if const_expr(branches.o_win is not None):
            # In place of its queries, which a warp alone still had a use for.
            store, _, _ = get_smem_store_C(tiled_mma, sO, tidx)
            store(acc_O)
            cute.arch.sync_warp()
            self._store_rows(sO, branches, tidx, place)
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            self.queries.consumer_release_w_index(0)
        for r in cutlass.range_constexpr(rows):
            acc_mn[r, None].store(acc_mn[r, None].load() * gates[numbers[r, 0][0], 2])
        copy = cute.make_tiled_copy_C(get_smem_load_atom(self.dtype), tiled_mma)
        thread = copy.get_slice(tidx)
        for i in cutlass.range_constexpr(2):
            # In turn: with the loads of both at once the compiler spills registers.
            cute.arch.sync_warp()
            other = cute.make_fragment_like(acc_O, self.dtype)
            cute.copy(copy, thread.partition_S(self._other(sO, i)), thread.retile(other))
            other = reshape_acc_to_mn(other)
            for r in cutlass.range_constexpr(rows):
                part = other[r, None].load().to(Float32) * gates[numbers[r, 0][0], i]
                acc_mn[r, None].store(acc_mn[r, None].load() + part)
        cute.arch.sync_warp()
        store, _, _ = get_smem_store_C(tiled_mma, self._other(sO, 0), tidx)
        store(acc_O)
        cute.arch.fence_view_async_shared()
        self._meet_sums(cute.arch.barrier_arrive)

    def _rows(self, tiled_mma: cute.TiledMma, tidx: Int32) -> cute.Tensor:
        """Which row and column of a tile each number of a thread's output is."""
        places = cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
        return reshape_acc_to_mn(tiled_mma.get_slice(tidx).partition_C(places))

    @cute.jit
    def _store_lse(
        self,
        lse: cute.Tensor,
        mLSE: cute.Tensor,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        place: tuple,
    ):
        """Store the log-sum-exps, by the threads that have the first column."""
        length, m_block, head_idx, place = place
        numbers = self._rows(tiled_mma, tidx)
        if tidx % QUAD == 0:
            for r in cutlass.range_constexpr(cute.size(lse)):
                token, head = self._place(numbers[r, 0][0], m_block, head_idx)
                if token < length:
                    if const_expr(self.pack_gqa):
                        head = head - head_idx * self.qhead_per_kvhead
                        mLSE[(head, token), head_idx, place.batch] = lse[r]
                    else:
                        mLSE[token, head, place.batch] = lse[r]

    @cute.jit
    def _store_rows(
        self,
        sOutput: cute.Tensor,
        branches: _Loaded,
        tidx: Int32,
        place: tuple,
    ):
        """Store a warp's rows of the window's output."""
        length, m_block, head_idx, place = place
        first, lane = tidx // WARP * WARP_ROWS, tidx % WARP
        lanes = const_expr(self.tile_hdimv // VECTOR)
        for i in cutlass.range(WARP_ROWS * lanes // WARP, unroll=1):
            row, column = first + (lane + i * WARP) // lanes, (lane + i * WARP) % lanes
            token, head = self._place(row, m_block, head_idx)
            if token < length:
                token_head = (Int64(place.batch) * length + token) * branches.heads + head
                offset = token_head * self.tile_hdimv + column * VECTOR
                vector = cute.make_rmem_tensor(VECTOR, self.dtype)
                tile = cute.local_tile(sOutput, (1, VECTOR), (row, column))
                cute.autovec_copy(cute.group_modes(tile, 0, 2), vector)
                pointer = branches.o_win.iterator + cute.assume(offset, divby=VECTOR)
                target = cute.make_tensor(pointer, cute.make_layout(VECTOR))
                cute.autovec_copy(vector, target)


class _Launcher:
    """Launches a kernel with CTAs of its own number."""

    def __init__(self, kernel, ctas: Int32):
        self.kernel, self.ctas = kernel, ctas

    def launch(self, *, grid: tuple, **options):
        self.kernel.launch(grid=(self.ctas, 1, 1), **options)


class _Place(NamedTuple):
    """What FA4's loops take for the index of a tile's sequence; ``turn`` is 0 and 1 in turns."""

    batch: Int32
    m_block: Int32
    turn: Int32


class _Tile(WorkTileInfo):
    """FA4's, with a :class:`_Place`."""

    @property
    def tile_idx(self) -> tuple:
        m_block, head_idx, batch, turn = self._tile_idx
        return m_block, head_idx, _Place(batch, m_block, turn), turn

    def __extract_mlir_values__(self) -> list:
        return cutlass.extract_mlir_values((*self._tile_idx, self._is_valid_tile))

    def __new_from_mlir_values__(self, values: list) -> "_Tile":
        numbers = (*self._tile_idx, self._is_valid_tile)
        *tile_idx, valid = cutlass.new_from_mlir_values(numbers, values)
        return _Tile(tuple(tile_idx), valid)


class _Tiles:
    """The tiles of a CTA, in place of FA4's scheduler: each as many after the last as there are
    CTAs. So CTAs that run together have neighbouring tiles."""

    def __init__(self, params: SingleTileScheduler.Params, index: Int32, turn: Int32):
        self.params, self.index, self.turn = params, index, turn

    @classmethod
    def start(cls, params: SingleTileScheduler.Params) -> "_Tiles":
        index, _, _ = cute.arch.block_idx()
        return cls(params, index, Int32(0))

    def get_current_work(self) -> _Tile:
        blocks, heads = self.params.num_block, self.params.num_head
        rest = self.index // blocks
        batch = rest // heads
        tile_idx = self.index - rest * blocks, rest - batch * heads, batch, self.turn
        return _Tile(tile_idx, self.index < blocks * heads * self.params.num_batch)

    def initial_work_tile_info(self) -> _Tile:
        return self.get_current_work()

    def prefetch_next_work(self):
        """FA4 calls it, and tiles are known without."""

    def advance_to_next_work(self):
        ctas, _, _ = cute.arch.grid_dim()
        self.index += ctas
        self.turn ^= 1

    def __extract_mlir_values__(self) -> list:
        return cutlass.extract_mlir_values((self.index, self.turn))

    def __new_from_mlir_values__(self, values: list) -> "_Tiles":
        index, turn = cutlass.new_from_mlir_values((self.index, self.turn), values)
        return _Tiles(self.params, index, turn)


class _FromFirstKey:
    """What FA4 knows of a sequence, without its keys before the first that are wanted."""

    def __init__(self, seqlen, first: Int32):
        self.seqlen, self.first = seqlen, first
        self.seqlen_k = seqlen.seqlen_k - first

    def __getattr__(self, name: str):
        return getattr(self.seqlen, name)

    def offset_batch_Q(self, mX: cute.Tensor, place: _Place, **options) -> cute.Tensor:
        return self.seqlen.offset_batch_Q(mX, place.batch, **options)

    def offset_batch_K(self, mX: cute.Tensor, place: _Place, **options) -> cute.Tensor:
        mX = self.seqlen.offset_batch_K(mX, place.batch, **options)
        return cute.domain_offset((self.first, 0, 0), mX)


class _Queries:
    """The pipeline of queries, as FA4's computing warps see it.

    They release a tile before its last product of values. Then the gates must be there, whose
    computation reads the queries too. Without ``released``, they leave that to the sum.
    """

    def __init__(self, pipeline, prepared: cute.Pointer, released: bool):
        self.pipeline, self.prepared, self.released = pipeline, prepared, released

    def consumer_wait_w_index_phase(self, index: Int32, phase: Int32):
        self.phase = phase
        self.pipeline.consumer_wait_w_index_phase(index, phase)

    def consumer_release_w_index(self, index: Int32):
        if self.released:
            cute.arch.mbarrier_wait(self.prepared, self.phase)
            self.pipeline.consumer_release_w_index(index)

    def __extract_mlir_values__(self) -> list:
        return []

    def __new_from_mlir_values__(self, values: list) -> "_Queries":
        return self


def launch_closing(
    call: Call,
    others: Pair,
    gates: Tensor | None,
    weight: Tensor | None,
    out: Tensor,
    o_win: Tensor | None,
    lse: Tensor,
):
    """Write the sum of the branches, the output of the attention if wanted, and log-sum-exp."""
    form = gating_form((*others, call.q), call.q, gates, weight, IN_ORDER)
    check_tensor("out", out, call.q.shape, call.q.dtype, call.q.device)
    check_output("out", out)
    tensors, strides = zip(*map(flat_rows, others), strict=True)
    weight = flat(weight) if form == "weight" else None
    written = None if o_win is None else o_win.view(-1)
    variant = call.variant()
    heads = call.q.shape[-2]
    ctas = closing_ctas(_tiles(call.q.shape, variant), sm_count(call.q.device))
    branches = Branches(*tensors, flat(gates), weight, written, strides, heads, ctas)
    kernel = compile_closing(variant, form, o_win is not None)
    kernel(*_closing_arguments(call, out, lse, branches))


@lru_cache(maxsize=256)
def closing_ctas(tiles: int, processors: int) -> int:
    """CTAs that share the tiles, in equal parts. A processor has one CTA at a time, so their last
    wave costs as much as a full one."""

    def ctas(part: int) -> int:
        return -(-tiles // part)

    parts = range(1, _MOST_TILES + 1)
    return ctas(min(parts, key=lambda part: -(-ctas(part) // processors) * (part + _START)))


def _tiles(shape: tuple[int, ...], variant: Variant) -> int:
    """Tiles of queries of a shape ``(B, N, H, D)``."""
    batch, length, heads, _ = shape
    rows, _ = forward_tile(variant)
    return batch * (heads // variant.group) * -(-length * variant.group // rows)


def _closing_arguments(call: Call, out: Tensor, lse: Tensor, branches: Branches) -> list:
    rows = dict(mQ=call.q, mK=call.k, mV=call.v, mO=out, mLSE=lse, softmax_scale=call.scale)
    left, right = call.window
    window = dict(window_size_left=left, window_size_right=right)
    return ordered(ClosingForward, branches=branches, **rows, **window)


@kept
def compile_closing(variant: Variant, form: str, keep: bool) -> Callable:
    """The compiled forward of a variant that ends with the sum of the branches."""
    fakes, branches = Fakes(variant), fake_branches(CUTE_DTYPES[variant.dtype], form, keep)
    arguments = _closing_arguments(fakes.call(), fakes.out(), fakes.lse(), branches)
    return compile_kernel(forward_kernel(partial(ClosingForward, form=form), variant), *arguments)
