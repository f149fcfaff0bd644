"""The outputs of a list's branches: of the warps of a CTA, of the CTAs of a cluster, and of parts.

Selected and window branch are attended by the CTAs of a cluster, each of which holds its share of
the output in shared memory. Each then takes some of the output's elements, adds up those of all
CTAs and of the compressed branch's parts, with the gates, in a fixed order.

Where each CTA of a cluster has a token, they share the window alone: each has some of its keys, for
the rows of all tokens, and adds up its own token's.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from nsa.fused.decode_inputs import NO_REFERENCE
from nsa.fused.hardware import LOG2_E, QUAD, WARP
from nsa.fused.kernels.decode_tiles import MMA_ROWS, TileAttention, power_of_two

# Columns that a thread takes together: 16 bytes of float32.
_COLUMNS = 4
# Loads of parts that a thread has under way.
_LOADS = 16
# Rows of outputs are so much apart that rows of a quarter warp are in different banks.
_PADDING = 8


def output_bytes(rows: int, head_dim_v: int) -> int:
    """Shared memory of the outputs of one branch."""
    return 4 * rows * (head_dim_v + _PADDING)


class ClusterOutputs:
    """Outputs ``(rows, Dv)`` of two branches, 0 window and 1 selected, of ``cluster`` CTAs.

    With ``of_tokens`` each CTA has a token.
    """

    def __init__(self, attention: TileAttention, cluster: int, of_tokens: bool):
        self.attention = attention
        self.window_cluster = cluster
        # What is left for the end: CTAs of a list, and branches that they share.
        self.cluster = 1 if of_tokens else cluster
        self.branches = (1,) if of_tokens else (0, 1)
        self.rows = attention.rows
        self.head_dim_v = attention.head_dim_v
        self.pitch = self.head_dim_v + _PADDING
        # Vectors of columns of a thread, over the CTAs of a cluster.
        vectors = self.rows * self.head_dim_v // _COLUMNS
        self.vectors = -(-vectors // (self.cluster * attention.threads))

    def views(self, window: cute.Pointer, selected: cute.Pointer) -> tuple[cute.Tensor, ...]:
        """The branches' outputs in shared memory."""
        layout = cute.make_layout((self.rows, self.head_dim_v), stride=(self.pitch, 1))
        pointers = [cute.recast_ptr(pointer, dtype=Float32) for pointer in (window, selected)]
        return tuple(cute.make_tensor(pointer, layout) for pointer in pointers)

    @cute.jit
    def fold(
        self, branch: Int32, acc_O: cute.Tensor, reference: cute.Tensor, total: cute.Tensor,
        outputs, sums, scratch, row_group: Int32, key_group: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add up the output of the warps, to that of ``branch`` and to ``sums``.

        ``sums`` are references and totals ``(2, rows)``, ``scratch`` the same of each warp. All
        threads are done with what was in the output's memory before.
        """
        sReference, sTotal = sums
        sM, sL = scratch
        groups = const_expr(self.attention.key_groups)
        lane = tidx % WARP
        row = row_group * MMA_ROWS + lane // QUAD
        _sum_quads(total)
        for r in cutlass.range_constexpr(2):
            if lane % QUAD == 0:
                sM[key_group, row + 8 * r] = reference[r]
                sL[key_group, row + 8 * r] = total[r]
        cute.arch.barrier()
        factors = []
        for r in cutlass.range_constexpr(2):
            largest = sM[0, row + 8 * r]
            for g in cutlass.range_constexpr(1, groups):
                largest = cutlass.max(largest, sM[g, row + 8 * r])
            factors.append(power_of_two(reference[r] - largest))
        if tidx < self.rows:
            largest = sM[0, tidx]
            for g in cutlass.range_constexpr(1, groups):
                largest = cutlass.max(largest, sM[g, tidx])
            whole = Float32(0.0)
            for g in cutlass.range_constexpr(groups):
                whole += sL[g, tidx] * power_of_two(sM[g, tidx] - largest)
            sReference[branch, tidx] = largest
            sTotal[branch, tidx] = whole
        memory = outputs[0].iterator
        apart = (outputs[1].iterator.toint() - memory.toint()) // 4
        memory = memory + cute.assume(branch * apart, divby=_COLUMNS)
        # One warp of a row after the other, so that the order is always the same.
        for g in cutlass.range_constexpr(groups):
            if key_group == g:
                for r in cutlass.range_constexpr(2):
                    place = (row + 8 * r) * self.pitch + lane % QUAD * 2
                    for i in cutlass.range_constexpr(self.head_dim_v // 8):
                        pointer = memory + cute.assume(place + 8 * i, divby=2)
                        sPair = cute.make_tensor(pointer, cute.make_layout(2))
                        rPair = cute.make_rmem_tensor(2, Float32)
                        if const_expr(g > 0):
                            cute.autovec_copy(sPair, rPair)
                        for c in cutlass.range_constexpr(2):
                            value = acc_O[c + 2 * r + 4 * i] * factors[r]
                            rPair[c] = rPair[c] + value if const_expr(g > 0) else value
                        cute.autovec_copy(rPair, sPair)
            cute.arch.barrier()

    def make_vectors(self) -> list[cute.Tensor]:
        """This thread's vectors of the output, zeros."""
        vectors = [cute.make_rmem_tensor(_COLUMNS, Float32) for _ in range(self.vectors)]
        for vector in vectors:
            vector.fill(0.0)
        return vectors

    @cute.jit
    def add_window(
        self, found: list[cute.Tensor], acc_O: cute.Tensor, reference: cute.Tensor,
        total: cute.Tensor, memory: cute.Pointer, gates: cute.Tensor, heads: cutlass.Constexpr[int],
        rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Where CTAs have tokens: add the window's output of this token, times its gate.

        Warp ``w`` has rows ``16 w`` and so on of all tokens' rows, for the CTA's keys. ``memory``
        of the tiles is free, here and in all CTAs, before and after.
        """
        cluster = const_expr(self.window_cluster)
        rows = const_expr(self.rows * cluster)
        memory = cute.recast_ptr(memory, dtype=Float32)
        layout = cute.make_layout((rows, self.head_dim_v), stride=(self.pitch, 1))
        sWindow = cute.make_tensor(memory, layout)
        memory = memory + rows * self.pitch
        sTotal = cute.make_tensor(memory, cute.make_layout(rows))
        memory = cute.recast_ptr(memory + rows, dtype=Int32)
        sReference = cute.make_tensor(memory, cute.make_layout(rows))
        lane = tidx % WARP
        _sum_quads(total)
        for r in cutlass.range_constexpr(2):
            row = tidx // WARP * MMA_ROWS + lane // QUAD + 8 * r
            if lane % QUAD == 0:
                sReference[row] = reference[r]
                sTotal[row] = total[r]
            for i in cutlass.range_constexpr(self.head_dim_v // 8):
                rPair = cute.make_rmem_tensor(2, Float32)
                for c in cutlass.range_constexpr(2):
                    rPair[c] = acc_O[c + 2 * r + 4 * i]
                place = row * self.pitch + (8 * i + lane % QUAD * 2)
                pointer = sWindow.iterator + cute.assume(place, divby=2)
                cute.autovec_copy(rPair, cute.make_tensor(pointer, cute.make_layout(2)))
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, Int32(0), tidx)
            row = cutlass.min(row, heads - 1)
            place = rank * self.rows + row
            factors = _cluster_factors(sReference, sTotal, place, cluster, gates[row * 3 + 2])
            for peer in cutlass.range_constexpr(cluster):
                vector = self._remote_vector(sWindow, place, column, peer, cluster)
                for c in cutlass.range_constexpr(_COLUMNS):
                    found[v][c] = found[v][c] + vector[c] * factors[peer]
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()

    @cute.jit
    def add_parts(
        self, found: list[cute.Tensor], parts, shared, gates: cute.Tensor, slot: Int32,
        count: Int32, unit_rows: Int32, first_row: Int64, heads: cutlass.Constexpr[int],
        rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add the compressed branch's output, times its gate, to the vectors ``found``.

        ``shared`` is what :func:`nsa.fused.kernels.decode_scores.sum_parts` found.
        """
        mO, mReference, _ = parts
        sReference, sInverse = shared
        places, scales = [], []
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, rank, tidx)
            row = cutlass.min(row, heads - 1)
            places.append((row, column))
            scales.append((sReference[row], sInverse[row] * gates[row * 3]))
        step = const_expr(max(1, _LOADS // self.vectors))
        for begin in cutlass.range(0, count, step, unroll=1):
            # All loads before the first use, so that they are under way together.
            loaded = []
            for u in cutlass.range_constexpr(step):
                # Past the end the last part again.
                part = slot + cutlass.min(begin + u, count - 1)
                for v in cutlass.range_constexpr(self.vectors):
                    row, column = places[v]
                    place = Int64(part) * unit_rows + first_row + row
                    values = _load_floats(mO, place * self.head_dim_v + column)
                    loaded.append((mReference[place], values))
            for u in cutlass.range_constexpr(step):
                for v in cutlass.range_constexpr(self.vectors):
                    reference, values = loaded[u * self.vectors + v]
                    largest, share = scales[v]
                    factor = power_of_two(reference - largest) * share
                    factor = factor if begin + u < count else Float32(0.0)
                    for c in cutlass.range_constexpr(_COLUMNS):
                        found[v][c] = found[v][c] + values[c] * factor

    @cute.jit
    def share_factors(
        self, sums, gates: cute.Tensor, sFactor: cute.Tensor, heads: Int32, tidx: Int32
    ):
        """What the output of each CTA of the cluster is multiplied with: ``(cluster, 2, rows)``."""
        sReference, sTotal = sums
        if tidx < len(self.branches) * self.rows:
            branch, row = self.branches[0] + tidx // self.rows, tidx % self.rows
            place = branch * self.rows + row
            gate = gates[cutlass.min(row, heads - 1) * 3 + 2 - branch]
            factors = _cluster_factors(sReference, sTotal, place, self.cluster, gate)
            for peer in cutlass.range_constexpr(self.cluster):
                sFactor[peer, branch, row] = factors[peer]

    @cute.jit
    def write(
        self, found: list[cute.Tensor], outputs, sums, gates: cute.Tensor, sFactor: cute.Tensor,
        mOut: cute.Tensor, out_row: Int64, heads: cutlass.Constexpr[int], rank: Int32, tidx: Int32,
    ):  # fmt: skip
        """Add the outputs of all CTAs to the vectors ``found``, and store them."""
        # All loads before the first use, so that they are under way together.
        places, loaded, each = [], [], const_expr(self.cluster * len(self.branches))
        for v in cutlass.range_constexpr(self.vectors):
            row, column = self._place(v, rank, tidx)
            places.append((row, column))
            row = cutlass.min(row, heads - 1)
            for i in cutlass.range_constexpr(each):
                peer, branch = i // len(self.branches), self.branches[i % len(self.branches)]
                loaded.append(self._remote_vector(outputs[branch], row, column, peer, self.cluster))
        self.share_factors(sums, gates, sFactor, heads, tidx)
        cute.arch.barrier()
        for v in cutlass.range_constexpr(self.vectors):
            row, column = places[v]
            values = found[v]
            for i in cutlass.range_constexpr(each):
                peer, branch = i // len(self.branches), self.branches[i % len(self.branches)]
                factor = sFactor[peer, branch, cutlass.min(row, heads - 1)]
                for c in cutlass.range_constexpr(_COLUMNS):
                    values[c] = values[c] + loaded[v * each + i][c] * factor
            if row < heads:
                rounded = cute.make_rmem_tensor(_COLUMNS, mOut.element_type)
                rounded.store(values.load().to(mOut.element_type))
                place = (out_row + row) * self.head_dim_v + column
                pointer = mOut.iterator + cute.assume(place, divby=_COLUMNS)
                target = cute.make_tensor(pointer, cute.make_layout(_COLUMNS))
                cute.autovec_copy(rounded, target)

    def _place(self, v: int, rank: Int32, tidx: Int32) -> tuple[Int32, Int32]:
        """Row and first column of a thread's vector ``v``."""
        index = (v * self.cluster + rank) * self.attention.threads + tidx
        each = self.head_dim_v // _COLUMNS
        return index // each, index % each * _COLUMNS

    def _remote_vector(
        self, sO: cute.Tensor, row: Int32, column: Int32, peer: int, cluster: int
    ) -> cute.Tensor:
        offset = cute.assume(row * self.pitch + column, divby=_COLUMNS)
        pointer = _of_peer(sO.iterator, peer, cluster) + offset
        rX = cute.make_rmem_tensor(_COLUMNS, Float32)
        cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(_COLUMNS)), rX)
        return rX


@cute.jit
def _cluster_factors(
    sReference: cute.Tensor, sTotal: cute.Tensor, place: Int32, cluster: cutlass.Constexpr[int],
    gate: Float32,
) -> list[Float32]:  # fmt: skip
    """What the row ``place`` of each CTA's output is multiplied with, given its references and
    sums."""
    largest, references, totals = Int32(NO_REFERENCE), [], []
    for peer in cutlass.range_constexpr(cluster):
        references.append(load_peer(sReference, place, peer, cluster))
        totals.append(load_peer(sTotal, place, peer, cluster))
        largest = cutlass.max(largest, references[peer])
    whole = Float32(0.0)
    for peer in cutlass.range_constexpr(cluster):
        whole += totals[peer] * power_of_two(references[peer] - largest)
    # A branch without keys adds nothing.
    share = gate / whole if largest != NO_REFERENCE else Float32(0.0)
    return [share * power_of_two(reference - largest) for reference in references]


@cute.jit
def _sum_quads(total: cute.Tensor):
    for r in cutlass.range_constexpr(2):
        for offset in cutlass.range_constexpr(2):
            total[r] += cute.arch.shuffle_sync_bfly(total[r], offset=1 << offset)


@cute.jit
def store_peer(sX: cute.Tensor, place: Int32, peer: Int32, value: cute.Numeric):
    """Set element ``place`` of what CTA ``peer`` of the cluster has where this one has ``sX``."""
    pointer = cute.arch.map_dsmem_ptr(sX.iterator, peer) + place
    rX = cute.make_rmem_tensor(1, sX.element_type)
    rX[0] = value
    cute.autovec_copy(rX, cute.make_tensor(pointer, cute.make_layout(1)))


def load_peer(sX: cute.Tensor, place: Int32, peer: int, cluster: int) -> cute.Numeric:
    """Element ``place`` of what CTA ``peer`` of the cluster has where this one has ``sX``."""
    pointer = _of_peer(sX.iterator, peer, cluster) + place
    rX = cute.make_rmem_tensor(1, sX.element_type)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(1)), rX)
    return rX[0]


def _of_peer(pointer: cute.Pointer, peer: int, cluster: int) -> cute.Pointer:
    """Where CTA ``peer`` of the cluster has what ``pointer`` points to."""
    return cute.arch.map_dsmem_ptr(pointer, Int32(peer)) if cluster > 1 else pointer


def _load_floats(mX: cute.Tensor, offset: Int64) -> cute.Tensor:
    pointer = mX.iterator + cute.assume(offset, divby=_COLUMNS)
    rX = cute.make_rmem_tensor(_COLUMNS, Float32)
    cute.autovec_copy(cute.make_tensor(pointer, cute.make_layout(_COLUMNS)), rX)
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
