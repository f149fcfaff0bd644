"""The outputs of a list's branches: of the warps of a CTA, of the CTAs of a cluster, and of parts.

Selected and window branch are attended by the CTAs of a cluster, each of which owns some of the
output's elements. Each adds up what its warps have found, and sends every CTA what that one owns;
an mbarrier counts the bytes, so that no CTA waits for memory to be in order. Each adds up its
elements from all CTAs and from the compressed branch's parts, with the gates, in a fixed order.

Where each CTA of a cluster has a token, they share the window alone: each has some of its keys, for
the rows of all tokens, and adds up its own token's.
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from nsa.fused.decode_inputs import NO_REFERENCE
from nsa.fused.hardware import LOG2_E, WARP
from nsa.fused.kernels.decode_parts import COLUMNS, WarpOutputs
from nsa.fused.kernels.decode_softmax import power_of_two
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention
from nsa.fused.kernels.hopper import (
    f32x2_to_i64,
    i64_to_f32x2,
    store_shared_remote,
    store_shared_remote_x4,
)
from nsa.fused.kernels.vectors import load_peer, of_peer

# Loads of parts that a thread has under way.
_LOADS = 16


class Exchange(NamedTuple):
    """What a CTA gets from those of its cluster, in shared memory.

    Attributes:
        outputs: float32 ``(cluster, elements that the CTA owns)``, of a branch.
        sums: int64 ``(cluster, rows)``, references and sums of the branch.
        ranks: int64 ``(cluster, blocks)``, the best blocks of each CTA, unless lists are given.
        barriers: mbarriers of the window, the selected branch, and the ranks.
    """

    outputs: cute.Tensor
    sums: cute.Tensor
    ranks: cute.Tensor
    barriers: cute.Pointer


class ClusterOutputs(WarpOutputs):
    """Outputs ``(rows, Dv)`` of a list, of ``cluster`` CTAs; or of as many tokens, a CTA each."""

    def __init__(self, attention: TileAttention, cluster: int, of_tokens: bool):
        super().__init__(attention)
        self.cluster = cluster
        self.of_tokens = of_tokens
        # Vectors of columns that a CTA owns, and a thread.
        self.owned = self.rows * self.head_dim_v // COLUMNS // (1 if of_tokens else cluster)
        self.vectors = -(-self.owned // self.threads)
        # Threads that share a vector's parts.
        self.sharing = 2 if 2 * self.owned <= self.threads else 1

    @cute.jit
    def add_up(
        self, found: list[cute.Tensor], acc_O: cute.Tensor, reference: cute.Tensor,
        total: cute.Tensor, ring: cute.Pointer, warp_sums, sums, gates: cute.Tensor, gate: Int32,
        heads: cutlass.Constexpr[int], tokens: cutlass.Constexpr[int], rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add a branch's output, times the gate number ``gate``, to the vectors ``found``.

        The CTA alone has it, or those of ``tokens`` tokens have it together. Warp ``w`` has row
        group ``w % n`` of the ``n`` of all rows. ``warp_sums`` and ``sums`` have room for
        references and sums of the warps' rows. The ring of tiles is free, here and in all CTAs,
        before and after.
        """
        row_groups = const_expr(tokens * self.attention.row_groups)
        sO = self._share(acc_O, reference, total, ring, warp_sums, sums, row_groups, tidx)
        if const_expr(tokens > 1):
            self._combine(sO, row_groups, tidx)
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, rank, tidx)
            row = cutlass.min(row, heads - 1)
            share = gates[row * 3 + gate]
            if const_expr(tokens > 1):
                row += rank * self.rows
            sReference, sTotal = sums
            factors = self._factors(
                [load_peer(sReference, row, peer, tokens) for peer in range(tokens)],
                [load_peer(sTotal, row, peer, tokens) for peer in range(tokens)],
                share,
            )
            for peer in cutlass.range_constexpr(tokens):
                if const_expr(tokens > 1):
                    vector = self._load(of_peer(sO, peer, tokens), row, column)
                else:
                    vector = self.sum_copies(sO, row, column, row_groups)
                self._add(found[v], vector, factors[peer])
        # No CTA reads what another has in shared memory any more.
        if const_expr(tokens > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.barrier()

    @cute.jit
    def start_exchange(self, smem, ranks: cutlass.Constexpr[int], tidx: Int32) -> Exchange:
        """Prepare to get ``ranks`` ranks and the outputs of both branches from each CTA.

        :meth:`wait_for_cluster` must follow before something is sent.
        """
        cluster, rows = const_expr(self.cluster), const_expr(self.rows)
        exchange = Exchange(
            smem.allocate_tensor(Float32, cute.make_layout(cluster * self.owned * COLUMNS), 16),
            smem.allocate_tensor(Int64, cute.make_layout(cluster * rows), 16),
            smem.allocate_tensor(Int64, cute.make_layout(max(1, cluster * ranks)), 16),
            smem.allocate_array(Int64, 3),
        )
        if tidx == 0:
            branch = const_expr(cluster * (self.owned * COLUMNS * 4 + rows * 8))
            for i in cutlass.range_constexpr(3):
                cute.arch.mbarrier_init(exchange.barriers + i, 1)
            cute.arch.mbarrier_init_fence()
            for i in cutlass.range_constexpr(3):
                expected = const_expr(branch if i < 2 else cluster * ranks * 8)
                cute.arch.mbarrier_arrive_and_expect_tx(exchange.barriers + i, expected)
        cute.arch.cluster_arrive_relaxed()
        return exchange

    @cute.jit
    def send(
        self, exchange: Exchange, branch: Int32, acc_O: cute.Tensor, reference: cute.Tensor,
        total: cute.Tensor, ring: cute.Pointer, warp_sums, rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up the CTA's output of a branch, 0 window and 1 selected; send all what they own.

        First all CTAs must have started, or have received the branch before.
        """
        rank, tidx = recomputed(rank), recomputed(tidx)
        row_groups, owned = const_expr(self.attention.row_groups), const_expr(self.owned)
        sO, sM, sL = self.share_outputs(acc_O, reference, total, ring, warp_sums, row_groups, tidx)
        cute.arch.barrier()
        cute.arch.cluster_wait()
        barrier = exchange.barriers + branch
        number = const_expr(self.cluster * self.rows)
        for v in cutlass.range_constexpr(cute.ceil_div(number, self.threads)):
            index = v * self.threads + tidx
            if index < number:
                peer, row = index // self.rows, index % self.rows
                largest, whole = self.sum_warps(sM, sL, row)
                pair = f32x2_to_i64(largest.bitcast(Float32), whole)
                place = exchange.sums.iterator + (rank * self.rows + row)
                store_shared_remote(pair, place, barrier, peer)
        each = const_expr(self.head_dim_v // COLUMNS)
        number = const_expr(self.rows * each)
        for v in cutlass.range_constexpr(cute.ceil_div(number, self.threads)):
            index = v * self.threads + tidx
            if index < number:
                row, column = index // each, index % each * COLUMNS
                vector = self.sum_copies(sO.iterator, row, column, row_groups)
                place = exchange.outputs.iterator + (rank * owned + index % owned) * COLUMNS
                store_shared_remote_x4(
                    *(vector[c] for c in range(COLUMNS)), place, barrier, index // owned
                )
        # The ring of tiles is free.
        cute.arch.barrier()

    @cute.jit
    def receive(
        self, found: list[cute.Tensor], exchange: Exchange, branch: cutlass.Constexpr[int],
        gates: cute.Tensor, heads: cutlass.Constexpr[int], rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add a branch of all CTAs, times its gate, to the vectors ``found``."""
        rank, tidx = recomputed(rank), recomputed(tidx)
        cute.arch.mbarrier_wait(exchange.barriers + branch, 0)
        for v in cutlass.range_constexpr(self.vectors):
            row, _ = self._place(v, rank, tidx)
            if row < heads:
                loaded, references, totals = [], [], []
                for peer in cutlass.range_constexpr(self.cluster):
                    place = peer * self.owned + (v * self.threads + tidx)
                    loaded.append(_load_floats(exchange.outputs.iterator, place * COLUMNS))
                    largest, whole = i64_to_f32x2(exchange.sums[peer * self.rows + row])
                    references.append(largest.bitcast(Int32))
                    totals.append(whole)
                factors = self._factors(references, totals, gates[row * 3 + 2 - branch])
                for peer in cutlass.range_constexpr(self.cluster):
                    self._add(found[v], loaded[peer], factors[peer])

    @cute.jit
    def _share(
        self, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor, ring: cute.Pointer,
        warp_sums, sums, row_groups: cutlass.Constexpr[int], tidx: Int32,
    ) -> cute.Pointer:  # fmt: skip
        """Write the warps' outputs to the ring, and their sums to ``sums``."""
        sReference, sTotal = sums
        sO, sM, sL = self.share_outputs(acc_O, reference, total, ring, warp_sums, row_groups, tidx)
        if tidx < MMA_ROWS * row_groups:
            largest, whole = self.sum_warps(sM, sL, tidx)
            sReference[tidx] = largest
            sTotal[tidx] = whole
        cute.arch.barrier()
        return sO.iterator

    @cute.jit
    def _combine(self, sO: cute.Pointer, row_groups: cutlass.Constexpr[int], tidx: Int32):
        """Add up the warps' outputs, where those of the first warps are."""
        each = const_expr(self.head_dim_v // COLUMNS)
        number = const_expr(MMA_ROWS * row_groups * each)
        for v in cutlass.range_constexpr(cute.ceil_div(number, self.threads)):
            index = v * self.threads + tidx
            if index < number:
                row, column = index // each, index % each * COLUMNS
                vector = self.sum_copies(sO, row, column, row_groups)
                pointer = sO + cute.assume(row * self.pitch + column, divby=COLUMNS)
                cute.autovec_copy(vector, cute.make_tensor(pointer, cute.make_layout(COLUMNS)))

    def _load(self, pointer: cute.Pointer, row: Int32, column: Int32) -> cute.Tensor:
        return _load_floats(pointer, row * self.pitch + column)

    @cute.jit
    def _add(self, found: cute.Tensor, vector: cute.Tensor, factor: Float32):
        for c in cutlass.range_constexpr(COLUMNS):
            found[c] = found[c] + vector[c] * factor

    @cute.jit
    def _factors(
        self, references: list[Int32], totals: list[Float32], gate: Float32
    ) -> list[Float32]:
        """What a row of the output of each CTA is multiplied with."""
        largest = references[0]
        for reference in references[1:]:
            largest = cutlass.max(largest, reference)
        whole = Float32(0.0)
        for reference, total in zip(references, totals, strict=True):
            whole += total * power_of_two(reference - largest)
        # A branch without keys adds nothing.
        share = gate / whole if largest != NO_REFERENCE else Float32(0.0)
        return [share * power_of_two(reference - largest) for reference in references]

    def make_vectors(self) -> list[cute.Tensor]:
        """This thread's vectors of the output, zeros."""
        vectors = [cute.make_rmem_tensor(COLUMNS, Float32) for _ in range(self.vectors)]
        for vector in vectors:
            vector.fill(0.0)
        return vectors

    @cute.jit
    def add_parts(
        self, found: list[cute.Tensor], parts, shared, gates: cute.Tensor, slot: Int32,
        count: Int32, unit_rows: Int32, first_row: Int64, heads: cutlass.Constexpr[int],
        rank: Int32, sRest: cute.Tensor, tidx: Int32,
    ):  # fmt: skip
        """Add the compressed branch's output, times its gate, to the vectors ``found``.

        Where a CTA owns few vectors, other threads have half of the parts, and put what they add up
        into ``sRest`` for :meth:`add_rest`. ``shared`` is what
        :func:`nsa.fused.kernels.decode_scores.sum_parts` found.
        """
        rank, tidx = recomputed(rank), recomputed(tidx)
        mO, mReference, _ = parts
        sReference, sInverse = shared
        first = Int64(slot) * unit_rows + first_row
        outputs = mO.iterator + cute.assume(first * self.head_dim_v, divby=COLUMNS)
        references = cute.make_tensor(mReference.iterator + first, mReference.layout)
        turn, local = Int32(0), tidx
        if const_expr(self.sharing > 1):
            turn, local = tidx // self.owned, tidx % self.owned
        places, scales = [], []
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, rank, local)
            row = cutlass.min(row, heads - 1)
            places.append((row, column))
            scales.append((sReference[row], sInverse[row] * gates[row * 3]))
        step = const_expr(max(1, _LOADS // self.vectors))
        for begin in cutlass.range(0, count, step * self.sharing, unroll=1):
            # All loads before the first use, so that they are under way together.
            loaded, real = [], []
            for u in cutlass.range_constexpr(step):
                part = begin + u * self.sharing + turn
                real.append(part < count)
                # Past the end the last part again.
                part = cutlass.min(part, count - 1) * unit_rows
                for v in cutlass.range_constexpr(self.vectors):
                    row, column = places[v]
                    values = _load_floats(outputs, (part + row) * self.head_dim_v + column)
                    loaded.append((references[part + row], values))
            for u in cutlass.range_constexpr(step):
                for v in cutlass.range_constexpr(self.vectors):
                    reference, values = loaded[u * self.vectors + v]
                    largest, share = scales[v]
                    factor = power_of_two(reference - largest) * share
                    factor = factor if real[u] else Float32(0.0)
                    self._add(found[v], values, factor)
        if const_expr(self.sharing > 1):  # noqa: SIM102 (one is decided at compile time)
            if turn == 1:
                pointer = sRest.iterator + cute.assume(local * COLUMNS, divby=COLUMNS)
                cute.autovec_copy(found[0], cute.make_tensor(pointer, cute.make_layout(COLUMNS)))

    @cute.jit
    def add_rest(self, found: list[cute.Tensor], sRest: cute.Tensor, tidx: Int32):
        """Add what other threads put into ``sRest``; a barrier must lie between."""
        if const_expr(self.sharing > 1):  # noqa: SIM102 (one is decided at compile time)
            if tidx < self.owned:
                self._add(found[0], _load_floats(sRest.iterator, tidx * COLUMNS), Float32(1.0))

    @cute.jit
    def store(
        self, found: list[cute.Tensor], mOut: cute.Tensor, out_row: Int64, heads: Int32,
        rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Store the vectors ``found``."""
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, rank, tidx)
            if row < heads:
                rounded = cute.make_rmem_tensor(COLUMNS, mOut.element_type)
                rounded.store(found[v].load().to(mOut.element_type))
                place = (out_row + row) * self.head_dim_v + column
                pointer = mOut.iterator + cute.assume(place, divby=COLUMNS)
                target = cute.make_tensor(pointer, cute.make_layout(COLUMNS))
                cute.autovec_copy(rounded, target)

    @cute.jit
    def _place(self, v: cutlass.Constexpr[int], rank: Int32, tidx: Int32) -> tuple[Int32, Int32]:
        """Row and first column of a thread's vector ``v``; where there is none, no head's row."""
        index, each = v * self.threads + tidx, self.head_dim_v // COLUMNS
        is_owned = index < self.owned
        if not self.of_tokens:
            index += rank * self.owned
        row = index // each if is_owned else Int32(self.rows)
        return row, index % each * COLUMNS


@dsl_user_op
def recomputed(x: Int32, *, loc=None, ip=None) -> Int32:
    """``x``, such that what depends on it is computed after here and for here alone.

    Else addresses are computed before the loop over branches, and no register is left for them.
    """
    found = llvm.inline_asm(
        T.i32(),
        [Int32(x).ir_value(loc=loc, ip=ip)],
        "mov.b32 $0, $1;",
        "=r,r",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    return Int32(found)


def _load_floats(pointer: cute.Pointer, offset: Int32 | Int64) -> cute.Tensor:
    pointer = pointer + cute.assume(offset, divby=COLUMNS)
    rX = cute.make_rmem_tensor(COLUMNS, Float32)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(COLUMNS)), rX)
    return rX


@cute.jit
def load_gates(
    form: cutlass.Constexpr[str], head_dim: cutlass.Constexpr[int],
    warps: cutlass.Constexpr[int], gates: cute.Tensor | None, weight: cute.Tensor | None,
    mQ: cute.Tensor, q_row: Int64, gate_row: Int64, head0: Int32, heads: Int32,
    sGates: cute.Tensor, tidx: Int32,
):  # fmt: skip
    """The gates ``(heads, 3)`` of the heads from ``head0`` of a token, to ``sGates``.

    ``q_row`` is where the token's queries are, ``gate_row`` its first row of gates.
    """
    warp, lane = cute.arch.make_warp_uniform(tidx // WARP), tidx % WARP
    if const_expr(form == "mean"):
        for i in cutlass.range(tidx, heads * 3, warps * WARP, unroll=1):
            sGates[i] = Float32(1.0 / 3.0)
    if const_expr(form == "gates"):
        for i in cutlass.range(tidx, heads * 3, warps * WARP, unroll=1):
            sGates[i] = gates[(gate_row + head0) * 3 + i].to(Float32)
    if const_expr(form == "weight"):
        for h in cutlass.range(warp, heads, warps, unroll=1):
            logits = [Float32(0.0)] * 3
            for j in cutlass.range_constexpr(head_dim // WARP):
                column = j * WARP + lane
                q = mQ[q_row + (head0 + h) * head_dim + column].to(Float32)
                for i in cutlass.range_constexpr(3):
                    value = weight[((head0 + h) * 3 + i) * head_dim + column]
                    logits[i] = logits[i] + q * value.to(Float32)
            for i in cutlass.range_constexpr(3):
                # exp2 overflows to infinity where the gate is 0.
                logit = cute.arch.warp_reduction_sum(logits[i])
                power = cute.math.exp2(logit * -LOG2_E, fastmath=True)
                if lane == 0:
                    sGates[h * 3 + i] = cute.arch.rcp_approx(1.0 + power)
