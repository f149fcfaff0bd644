"""FlashAttention-4's forward that ends with the gated sum of all branches (paper Eq. 5).

The last kernel of a long batch's forward is the window's, because it has the same rows in the same
order as the output. Its tensor cores set the pace, so the outputs of the other branches arrive
while it computes: three of the four producer warps, which FA4 leaves idle, copy them to shared
memory and compute the gates from the queries there. So no pass over memory is left for the sum, and
where no backward needs the window's output, it is never written.

A CTA of FA4's has one tile of queries, whose row r is head ``r % group`` of a token.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr
from cutlass.base_dsl.utils.mlir_value_tree import extract_mlir_attributes
from torch import Tensor

from nsa.fused.fa4_call import Call
from nsa.fused.fa4_variants import Variant
from nsa.fused.hardware import LOG2_E, QUAD, WARP, WARP_ROWS, WARPGROUP
from nsa.fused.kernel_inputs import IN_ORDER, Pair
from nsa.fused.kernels.compiled import compile_kernel, kept
from nsa.fused.kernels.fa4_fakes import Fakes
from nsa.fused.kernels.fa4_sm90 import forward_kernel, ordered
from nsa.fused.kernels.gates import gating_form
from nsa.fused.kernels.hopper import (
    FlashAttentionForwardSm90,
    get_smem_load_atom,
    get_smem_store_C,
    mlir_namedtuple,
    reshape_acc_to_mn,
)
from nsa.fused.kernels.vectors import (
    CUTE_DTYPES,
    VECTOR,
    check_output,
    check_tensor,
    copy_vector,
    dot,
    fake_flat,
    flat,
    flat_rows,
    load_shared,
    load_vector,
)

# The first producer warp loads queries, keys and values.
_PREPARING = WARPGROUP - WARP
# FA4's forward uses those up to 6.
_PREPARED = 7
# Registers of a thread that computes, and of one that loads, by warp groups that compute. Of two,
# FA4 gives 24 to those that load, too few for the gates.
_REGISTERS = {2: (232, 40), 3: (160, 32)}


@mlir_namedtuple
class Branches(NamedTuple):
    """The outputs of the other branches, the gates or the weight, and the window's output to write.

    ``strides`` are the elements from token to token of the first two; ``heads`` counts all heads.
    """

    o_cmp: cute.Tensor
    o_slc: cute.Tensor
    gates: cute.Tensor | None
    weight: cute.Tensor | None
    o_win: cute.Tensor | None
    strides: tuple[Int64, Int64]
    heads: Int32


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
    )


class _Carrier(cute.TiledCopy):
    """Carries the branches to a kernel in place of a copy that it takes and does not use."""

    def __init__(self, branches: Branches):
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
    :mod:`nsa.fused.kernels.gates`. For batches, and where TMA loads queries."""

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
        self.branches = branches
        FlashAttentionForwardSm90.__call__(
            self,
            *(mQ, mK, mV, mO, mLSE, softmax_scale),
            window_size_left=window_size_left,
            window_size_right=window_size_right,
            stream=stream,
        )

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

        # Two barriers, and the gates in what alignment would leave empty.
        numbers = 2 + (3 * self.tile_m + 1) // 2
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
        start = pipeline_q.sync_object_full.get_barrier(0) + 2
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
        """FA4's loads by the first warp; the others prepare the sum."""
        *_, pipeline_q, carrier, _, _, _, seqlen_info, scheduler = arguments
        super().load(mQ, mK, mV, sQ, *arguments)
        self._prepare(sQ, pipeline_q, carrier.branches, seqlen_info, scheduler)

    @cute.jit
    def _prepare(
        self,
        sQ: cute.Tensor,
        pipeline_q: cutlass.pipeline.PipelineAsync,
        branches: Branches,
        seqlen_info: Callable,
        scheduler: Callable,
    ):
        """Bring the other branches' outputs and the gates to shared memory."""
        tidx, _, _ = cute.arch.thread_idx()
        if tidx >= WARP:
            tidx = tidx - WARP
            m_block, head_idx, batch, _ = scheduler().initial_work_tile_info().tile_idx
            length = seqlen_info(batch).seqlen_q
            lanes = const_expr(self.tile_hdimv // VECTOR)
            column = tidx % lanes * VECTOR
            for row in cutlass.range(tidx // lanes, self.tile_m, _PREPARING // lanes, unroll=4):
                token, head = self._place(row, m_block, head_idx)
                # Rows past the last token are copied from it, and not stored.
                token = Int64(batch) * length + cutlass.min(token, length - 1)
                for i in cutlass.range_constexpr(2):
                    tile = cute.local_tile(self._other(sQ, i), (1, VECTOR), (row, column // VECTOR))
                    offset = token * branches.strides[i] + (head * self.tile_hdimv + column)
                    vector = cute.make_tensor(tile.iterator, cute.make_layout(((VECTOR, 1),)))
                    copy_vector(branches[i], offset, vector, Boolean(True))
            cute.arch.cp_async_commit_group()
            sGates = self._gates(pipeline_q)
            pipeline_q.consumer_wait_w_index_phase(0, Int32(0))
            for row in cutlass.range(tidx // QUAD, self.tile_m, _PREPARING // QUAD, unroll=1):
                token, head = self._place(row, m_block, head_idx)
                token = Int64(batch) * length + cutlass.min(token, length - 1)
                token_head = token * branches.heads + head
                gates = self._row_gates(branches, sQ, row, head, token_head, tidx % QUAD)
                if tidx % QUAD == 0:
                    for i in cutlass.range_constexpr(3):
                        sGates[row, i] = gates[i]
            cute.arch.cp_async_wait_group(0)
            cute.arch.barrier_arrive(
                barrier_id=_PREPARED, number_of_threads=_PREPARING + self.num_mma_threads
            )

    @cute.jit
    def _row_gates(
        self,
        branches: Branches,
        sQ: cute.Tensor,
        row: Int32,
        head: Int32,
        token_head: Int64,
        lane: Int32,
    ) -> tuple[Float32, Float32, Float32]:
        """The gates of a row, in each thread of a quad; see :class:`RowGates`."""
        if const_expr(self.form == "mean"):
            return (Float32(1.0 / 3.0),) * 3
        if const_expr(self.form == "gates"):
            return tuple(branches.gates[token_head * 3 + i].to(Float32) for i in range(3))
        logits = cute.make_rmem_tensor(3, Float32)
        logits.fill(0.0)
        for group in cutlass.range(self.tile_hdim // (QUAD * VECTOR), unroll=1):
            sPart = cute.local_tile(sQ, (1, VECTOR), (row, group * QUAD + lane))
            q = load_shared(cute.group_modes(sPart, 0, 2))
            for i in cutlass.range_constexpr(3):
                column = (group * QUAD + lane) * VECTOR
                weight = load_vector(
                    branches.weight, Int64((head * 3 + i) * self.tile_hdim) + column
                )
                logits[i] += dot(q, weight.load().to(Float32))
        for i in cutlass.range_constexpr(3):
            total = cute.arch.warp_reduction_sum(logits[i], threads_in_group=QUAD)
            # exp2 overflows to infinity where the gate is 0, and the reciprocal of that is 0.
            logits[i] = cute.arch.rcp_approx(1.0 + cute.math.exp2(total * -LOG2_E, fastmath=True))
        return logits[0], logits[1], logits[2]

    def mma(self, *arguments):
        self.queries = arguments[12]
        super().mma(*arguments)

    def epilogue(self, acc_O, *arguments):
        _, _, _, sO, seqlen, carrier, _, tiled_mma, tidx, m_block, head_idx, batch = arguments
        sGates = self._gates(self.queries)
        place = (seqlen.seqlen_q, m_block, head_idx, batch)
        self._add_branches(acc_O, sO, sGates, carrier.branches, tiled_mma, tidx, place)
        super().epilogue(acc_O, *arguments)

    @cute.jit
    def _add_branches(
        self,
        acc_O: cute.Tensor,
        sO: cute.Tensor,
        sGates: cute.Tensor,
        branches: Branches,
        tiled_mma: cute.TiledMma,
        tidx: Int32,
        place: tuple[Int32, Int32, Int32, Int32],
    ):
        """Turn the window's output into the gated sum."""
        cute.arch.barrier(barrier_id=_PREPARED, number_of_threads=_PREPARING + self.num_mma_threads)
        rows = reshape_acc_to_mn(
            tiled_mma.get_slice(tidx).partition_C(
                cute.make_identity_tensor((self.tile_m, self.tile_hdimv))
            )
        )
        if const_expr(branches.o_win is not None):
            # In place of its queries, which a warp alone still had a use for.
            store, _, _ = get_smem_store_C(tiled_mma, sO, tidx)
            store(acc_O)
            cute.arch.sync_warp()
            self._store_rows(sO, branches, tidx, place)
        acc_mn = reshape_acc_to_mn(acc_O)
        for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
            acc_mn[r, None].store(acc_mn[r, None].load() * sGates[rows[r, 0][0], 2])
        copy = cute.make_tiled_copy_C(get_smem_load_atom(self.dtype), tiled_mma)
        thread = copy.get_slice(tidx)
        for i in cutlass.range_constexpr(2):
            other = cute.make_fragment_like(acc_O, self.dtype)
            cute.copy(copy, thread.partition_S(self._other(sO, i)), thread.retile(other))
            other = reshape_acc_to_mn(other)
            for r in cutlass.range_constexpr(cute.size(acc_mn, mode=[0])):
                part = other[r, None].load().to(Float32) * sGates[rows[r, 0][0], i]
                acc_mn[r, None].store(acc_mn[r, None].load() + part)

    @cute.jit
    def _store_rows(
        self,
        sOutput: cute.Tensor,
        branches: Branches,
        tidx: Int32,
        place: tuple[Int32, Int32, Int32, Int32],
    ):
        """Store a warp's rows of the window's output."""
        length, m_block, head_idx, batch = place
        first, lane = tidx // WARP * WARP_ROWS, tidx % WARP
        lanes = const_expr(self.tile_hdimv // VECTOR)
        for i in cutlass.range(WARP_ROWS * lanes // WARP, unroll=1):
            row, column = first + (lane + i * WARP) // lanes, (lane + i * WARP) % lanes
            token, head = self._place(row, m_block, head_idx)
            if token < length:
                token_head = (Int64(batch) * length + token) * branches.heads + head
                offset = token_head * self.tile_hdimv + column * VECTOR
                vector = cute.make_rmem_tensor(VECTOR, self.dtype)
                tile = cute.local_tile(sOutput, (1, VECTOR), (row, column))
                cute.autovec_copy(cute.group_modes(tile, 0, 2), vector)
                pointer = branches.o_win.iterator + cute.assume(offset, divby=VECTOR)
                target = cute.make_tensor(pointer, cute.make_layout(VECTOR))
                cute.autovec_copy(vector, target)


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
    branches = Branches(*tensors, flat(gates), weight, written, strides, call.q.shape[-2])
    kernel = compile_closing(call.variant(), form, o_win is not None)
    kernel(*_closing_arguments(call, out, lse, branches))


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
