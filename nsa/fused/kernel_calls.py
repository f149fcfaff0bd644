"""The only file that calls our own CuTe DSL kernels. ``fa4`` calls those of FA4.

The functions are documented here, so that ``help`` shows them on a machine without CuTe. Functions
of the same names in :mod:`nsa.fused.kernels` check arguments, allocate and launch; ``locals()``
gives them each argument by its name. A kernel file is imported on its first call, because CuTe
takes seconds to import. Callers write ``kernel_calls.gating_forward(...)``, so that a test can
replace the functions of this module.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from nsa.blocks import BlockPlaces
from nsa.fused.kernel_inputs import (
    IN_ORDER,
    BlockLists,
    FewKeys,
    Pair,
    Placement,
    Placements,
    RowStatistics,
    StatisticsPlacements,
)
from nsa.fused.plan_tables import TableRule, Tables
from nsa.fused.token_inputs import Rule, TokenBlocks, TokenTiles


@cache
def _kernels(name: str) -> ModuleType:
    return import_module(f"nsa.fused.kernels.{name}")


def gating_forward(
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``, computed in float32.

    Args:
        o_cmp, o_slc, o_win: ``(..., H, D)``, bfloat16, float16 or float32; D a multiple of 8 up to
            256. Slices of heads are read where they are; other strides are copied. With a
            placement any ``(..., D)``, contiguous and not empty.
        q: ``(..., H, D)``; used only with ``weight``.
        gates: ``(..., H, 3)`` or None; used as they are.
        weight: ``(H, 3, D)`` or None: ``g_i = sigmoid(<q, weight[h, i]>)``. With neither gates nor
            weight each gate is 1/3; both is an error.
        out: where to write the result: like ``o_win``, a slice of heads at most. By default new.
        placements: where the rows of ``o_cmp`` and ``o_slc`` lie.

    Returns:
        ``(..., H, D)`` in the dtype of ``o_win``: ``out`` where it is given.
    """
    return _kernels("gates").gating_forward(**locals())


def gating_backward(
    dout: Tensor,
    o_cmp: Tensor,
    o_slc: Tensor,
    o_win: Tensor,
    lse_cmp: Tensor | None,
    lse_slc: Tensor,
    lse_win: Tensor,
    q: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    statistics_placements: StatisticsPlacements,
    placements: Placements = IN_ORDER,
) -> tuple[
    tuple[Tensor, Tensor, Tensor],
    tuple[RowStatistics | None, RowStatistics, RowStatistics],
    Tensor | None,
    Tensor | None,
    Tensor | None,
]:
    """Gradients of :func:`gating_forward`, in one pass; the same bits each time on a device.

    With ``dgate_i = <dout, o_i>`` and ``dlogit_i = dgate_i * g_i * (1 - g_i)`` it is
    ``dweight[h, i] = sum_r dlogit_i * q``, summed in float32. :func:`query_gradient` adds what
    ``dlogits`` contribute to the gradient of ``q``.

    The branches' gradients are ``g_i * dout``, but they are not written: the gate goes into the
    log-sum-exp of the :class:`RowStatistics`, and ``delta_i = <dout, o_i>``. Where
    :func:`nsa.fused.kernel_inputs.multiplies_gates` says so, branch gradients are written, the
    log-sum-exp has no gate, and ``delta_i`` is the product of the rounded gradient and ``o_i``.

    Args:
        dout: ``(..., H, D)``; the rest as in forward.
        lse_cmp, lse_slc, lse_win: float32, natural log-sum-exps of the branches, contiguous.
            ``lse_cmp`` is None if that branch needs no statistics.
        statistics_placements: where each row and head lies in these.

    Returns:
        douts: of each branch the gradient to pass to its backward: ``dout`` itself, or if gates
            are multiplied or with a placement a new tensor in the shape of the branch's output.
            With a placement it is 0 where no row lies.
        statistics: of each branch, in the shape of its log-sum-exp. Where no row lies, P is 0.
        dlogits: float32 ``(..., H, 3)``; None without ``weight``.
        dgates: ``(..., H, 3)`` in the dtype of ``gates``; None without these.
        dweight: like ``weight``; None without it.
    """
    return _kernels("gates").gating_backward(**locals())


def few_key_deltas(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    few: FewKeys,
    scale: float,
    statistics_placement: Placement,
    placement: Placement | None,
) -> None:
    """Write ``delta`` of the queries in ``few`` again, as the sum of P * dP over their keys.

    The product of the output and its gradient has the rounding error of the output, which matters
    where keys are few.

    Args:
        dout: ``(..., H, D)``, bfloat16 or float16; with a placement any ``(..., D)``, contiguous.
        q: ``(..., H, D)``.
        k, v: ``(..., H_kv, D)``.
        statistics: float32, contiguous. A row whose P are 0 stays as it is.
        few: the queries and their keys.
        scale: multiplies ``q @ k^T``.
        statistics_placement: where the rows of q lie in the statistics.
        placement: where they lie in ``dout``; None for order.
    """
    _kernels("few_keys").few_key_deltas(**locals())


def query_gradient(
    dq_cmp: Tensor,
    dq_slc: Tensor,
    dq_win: Tensor,
    dlogits: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """``dq_cmp + dq_slc + dq_win + sum_i dlogits[..., i] * weight[:, i]``, rounded once.

    Args:
        dq_cmp, dq_slc, dq_win: ``(..., H, D)``, bfloat16, float16 or float32; D a multiple of 8 up
            to 256. Slices of heads are read where they are; other strides are copied. With a
            placement any ``(..., D)``, contiguous and not empty.
        dlogits: float32 ``(..., H, 3)``, or None without ``weight``.
        weight: ``(H, 3, D)`` in the dtype of ``dq_win``, or None: the plain sum of three.
        out: where to write the result: like ``dq_win``, a slice of heads at most. It may be one of
            the gradients without a placement; it must not overlap any otherwise. By default new.
        placements: where the rows of ``dq_cmp`` and ``dq_slc`` lie.

    Returns:
        ``(..., H, D)`` in the dtype of ``dq_win``: ``out`` where it is given.
    """
    return _kernels("query_gradient").query_gradient(**locals())


def mean_forward(
    x: Tensor,
    start: Tensor,
    block_size: int,
    out_dtype: torch.dtype,
    other: Tensor | None = None,
) -> Tensor:
    """``mean[m] = mean(x[start[m] : start[m] + block_size])``, summed in float32.

    Args:
        x: ``(..., T, H_kv, D)``, bfloat16, float16 or float32; D a multiple of 8. A slice of heads
            is read where it is; other strides are copied.
        start: int32 ``(M,)``, the first token of each block among all rows of ``x``, negative for
            a block that is 0. Not checked: a block must end within ``x``. Blocks may overlap.
        block_size: tokens in a block.
        out_dtype: one of the dtypes of ``x``.
        other: a second tensor like ``x``, but for its strides.

    Returns:
        ``(..., M', H_kv, D)`` in ``out_dtype`` with the M blocks in order, as many for each of the
        leading dimensions; with ``other`` ``(2, ...)``.
    """
    return _kernels("means").mean_forward(**locals())


def mean_backward(
    dmeans: Pair,
    blocks: Tensor,
    block_size: int,
    dtype: torch.dtype,
    addends: tuple[Pair, Pair] | None = None,
) -> Pair:
    """``dx[t] = sum_i dmean[blocks[t, i]] / block_size`` for keys and values, rounded once.

    Args:
        dmeans: ``(..., M, H_kv, D)`` each, in float32 or ``dtype``. Copied if not contiguous.
        blocks: int32 ``(T, overlap)``, the blocks of each token among all rows of a ``dmean``, -1
            for none. Not checked against them.
        block_size: tokens in a block.
        dtype: bfloat16, float16 or float32.
        addends: two pairs of gradients of keys and values to add, ``(..., T', H_kv, D)`` each in
            ``dtype``. The first pair is overwritten, so it must be contiguous or slices of heads.
            The second pair is read in place if it is that too, else copied.

    Returns:
        ``(..., T', H_kv, D)`` each in ``dtype``: the first pair of ``addends``, or new tensors.
    """
    return _kernels("means").mean_backward(**locals())


def sequence_bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor, rule: TableRule) -> Tensor:
    """Where the items of each packed sequence start, then where the last end, for several kinds.

    Args:
        cu_seqlens, cu_seqlens_k: int32 ``(S + 1,)``, boundaries of queries and of keys. Each
            sequence has at most as many queries as keys. Neither is checked.
        rule: what items there are.

    Returns:
        int32 ``(7, S + 1)``: a row for each of :data:`nsa.fused.plan_tables.BOUNDS`.
    """
    return _kernels("plan_tables").sequence_bounds(**locals())


def plan_tables(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, bounds: Tensor, rule: TableRule, means: bool
) -> Tables:
    """The tables of :func:`nsa.fused.plan_tables.table_shapes`.

    Args:
        cu_seqlens, cu_seqlens_k: see :func:`sequence_bounds`.
        bounds: its result.
        rule: what the tables depend on.
        means: whether the tables for means of blocks are wanted, or all others.
    """
    return _kernels("plan_tables").plan_tables(**locals())


def rotate(
    x: Tensor,
    other: Tensor | None,
    bounds: Tensor | None,
    origin: Tensor | None,
    start: float,
    step: int,
    theta: float,
    inverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rotary embedding: channels ``i`` and ``i + D/2`` turn by ``position * theta ** (-2i/D)``.

    The position of a row is ``start + step * index``. Angles are as exact at any position.

    Args:
        x: ``(..., R, H, D)``, bfloat16 or float16; D a multiple of 16 up to 256. Slices of heads
            are read in place.
        other: a second tensor with the same rows and channels, and its own heads; or None.
        bounds: int32 ``(S + 1,)``, where the rows of each packed sequence start, then where the
            last end; ``index`` counts from 0 in each. None: it counts in each entry of a batch.
        origin: int32 ``(S,)``, where ``index`` 0 of each packed sequence would lie; None where its
            rows start.
        start: a multiple of 1/2.
        step: positions from row to row.
        theta: base of the wavelengths, at least 1.
        inverse: turn back.

    Returns:
        ``x`` and ``other`` rotated, contiguous.
    """
    return _kernels("rope").rotate(**locals())


def gather_blocks(x: Tensor, position: Tensor, places: BlockPlaces) -> Tensor:
    """``rows[m, h, i] = x[start(m) + i, h] + position[i]``, rounded once.

    Args:
        x: ``(..., T, H_kv, D)``, bfloat16, float16 or float32; D a multiple of 8. Slices of heads
            are read in place.
        position: ``(l, D)`` in the dtype of ``x``.
        places: the blocks. A row of no block has the positions alone.

    Returns:
        ``(M, H_kv, l, D)`` in the dtype of ``x`` for the M rows of ``places``.
    """
    return _kernels("block_rows").gather_blocks(**locals())


def scatter_blocks(drows: Tensor, shape: tuple[int, ...], places: BlockPlaces) -> Tensor:
    """Gradient of the ``x`` of :func:`gather_blocks`: ``dx[t]`` adds up the rows of its blocks.

    Args:
        drows: ``(M, H_kv, l, D)``. Copied if it is not contiguous.
        shape: that of ``x``.
        places: as in forward.

    Returns:
        ``shape`` in the dtype of ``drows``, summed in float32 and rounded once.
    """
    return _kernels("block_rows").scatter_blocks(**locals())


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` of ``x``, 0 for a negative one. This is a mean over blocks of one token.

    Args:
        x: ``(B, T, H, D)``, D a multiple of 8.
        index: int32 ``(B * R,)``, rows of ``(B * T, H, D)``.

    Returns:
        ``(B, R, H, D)`` in the dtype of ``x``.
    """
    return mean_forward(x, index, 1, x.dtype)


def list_key_blocks(
    indices: Tensor,
    first: Tensor,
    num_blocks: Tensor,
    num_full: Tensor | None,
    parts: int,
    entry_blocks: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cut each listed block into key blocks of the row, and drop those past its sequence.

    Args:
        indices: int32 ``(B, tiles, H, n)``, blocks in the tile's sequence; negative ones are
            dropped. Copied if it is not contiguous.
        first: int32 ``(tiles,)``, where the key blocks of the tile's sequence start in the row of
            an entry of the batch.
        num_blocks: int32 ``(tiles,)``, how many there are; 0 for a tile of no sequence.
        num_full: int32 ``(tiles,)`` or None, how many of them, from the first, are full.
        parts: key blocks in a block.
        entry_blocks: key blocks in the row of an entry of the batch.

    Returns:
        partial_count: int32 ``(1, H, B * tiles)``; full blocks are in the other list.
        partial_index: int32 ``(1, H, B * tiles, width)``, in the order of ``indices``, with ``width
            = min(n * parts, B * entry_blocks)``: the most that can be listed. Entries past the
            count are not written.
        full_count: like ``partial_count``; None without ``num_full``.
        full_index: like ``partial_index``; None without ``num_full``.
    """
    return _kernels("lists").list_key_blocks(**locals())


def count_query_tiles(count: Tensor, index: Tensor, num_blocks: int) -> Tensor:
    """Only the counts of :func:`list_query_tiles`: int32 ``(1, H, num_blocks)``."""
    return _kernels("lists").count_query_tiles(**locals())


def list_query_tiles(
    count: Tensor, index: Tensor, num_blocks: int, width: int
) -> tuple[Tensor, Tensor]:
    """Transpose lists of key blocks into lists of query tiles; the same bits each time.

    Args:
        count: int32 ``(1, H, tiles)``.
        index: int32 ``(1, H, tiles, W)``, key blocks below ``num_blocks`` in any order, that do not
            repeat in a list. Entries past the count are ignored.
        num_blocks: key blocks.
        width: at least the longest of the new lists. Not checked.

    Returns:
        count: int32 ``(1, H, num_blocks)``.
        index: int32 ``(1, H, num_blocks, width)``, query tiles in ascending order. Entries past
            the count are not written.
    """
    return _kernels("lists").list_query_tiles(**locals())


def listed_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    lists: BlockLists,
    scale: float,
    key_limit: Tensor | None,
    deterministic: bool = False,
    sums: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention to listed key blocks.

    Args:
        dout: ``(1, Tq, H, D)``, the gradient of the output.
        q: ``(1, Tq, H, D)``, bfloat16 or float16. Slices of heads of any input are read in place.
            ``Tq`` is a multiple of ``lists.query_block``.
        k, v: ``(1, Tk, H_kv, D)``, ``Tk`` a multiple of 64.
        statistics: float32 ``(1, H, Tq)``.
        lists: the forward's lists, with blocks of 64 keys.
        scale: positive.
        key_limit: int32 ``(Tq,)``, at most ``Tk``: a query sees the keys before its limit. None:
            it sees keys up to its own; the last query's is the last key, so ``Tq <= Tk``.
        deterministic: give the same bits each time. Otherwise the last ones of dk and dv vary.
        sums: float32, contiguous and of the shape of ``k``, not if ``deterministic``: dk, without
            the scale, and dv are added, in the layout that :func:`round_listed_sums` reads.

    Returns:
        dq, dk, dv: like ``q``, ``k`` and ``v``, contiguous; with ``sums`` these
            instead of dk and dv.
    """
    return _kernels("listed_backward").listed_backward(**locals())


def round_listed_sums(sums: Tensor, out: Tensor, factor: float) -> None:
    """Write ``factor * sums`` in the dtype and order of ``out``.

    Args:
        sums: float32 ``(T, H, D)``, contiguous, as :func:`listed_backward` adds to them: those of
            some consecutive keys; ``T`` and where they begin are multiples of 64.
        out: ``(T, H, D)``, contiguous, bfloat16 or float16.
        factor: see above.
    """
    return _kernels("block_sums").round_listed_sums(**locals())


def importance_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    tiles: TokenTiles,
    chunk: int,
    scores: Tensor,
    scale: float,
    rule: Rule,
) -> None:
    """Write Eq. 8 to 10 for the tokens of a chunk; their positions are in ``tiles``.

    ``p_h[j] = exp(scale * q_h . k_cmp[j] - lse_h)`` for the compressed tokens that the token sees.
    The score of a selection block is the sum, over the heads of the group and over ``j``, of
    ``p_h[j]`` times the overlap of ``j`` and the block. Equal keys score equally, bit for bit.

    Args:
        q: ``(B, T, H, D)``, bfloat16 or float16; ``D`` a multiple of 32 up to 256. A slice of heads
            is read where it is.
        k_cmp: ``(B, M, H_kv, D)``; ``H / H_kv`` up to 32.
        lse: float32 ``(B, H, T)``, natural logarithm. Not used for tokens that see no key.
        tiles: tiles of an entry of the batch, of ``choose_shape(D, G).tile_tokens`` tokens each.
        chunk: which chunk of ``tiles``.
        scores: float32 ``(B, H_kv, C, W)``, contiguous, for the ``C`` tokens of the chunk. Blocks
            that start at or before a token are written (not causal: all of its sequence).
        scale: positive.
        rule: the part of the configuration that the kernel needs.
    """
    _kernels("importance").importance_scores(**locals())


def selected_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    band: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of each token over the keys of its blocks.

    Args:
        q: ``(T, H, D)``, bfloat16 or float16. Slices of heads of q, k and v are read in place.
        k: ``(Tk, H_kv, D)``.
        v: ``(Tk, H_kv, Dv)``.
        block_indices: int32 ``(T, H_kv, slots)``, indices in the token's sequence, in any order,
            read in place whatever the strides. Those that ``blocks`` does not let the token attend
            are left out. One that is listed twice counts twice; with ``band`` none may be.
        blocks: the blocks of the ``T`` tokens, of ``Tk`` keys in all.
        block_size: keys of a block: 32, 64, or without ``band`` 128.
        scale: positive.
        causal: whether a token sees only keys at or before its position.
        band: whether most lists name the first block of the sequence, the token's own and the one
            before, so that a separate kernel for these is faster. It changes only the rounding.

    Returns:
        out: ``(T, H, Dv)`` in the dtype of q, 0 for a token with no block.
        lse: float32 ``(T, H)``, natural logarithm, -inf for a token with no block.
    """
    return _kernels("selected_forward").selected_forward(**locals())


def closing_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    o_cmp: Tensor,
    o_win: Tensor,
    gates: Tensor | None,
    weight: Tensor | None,
    out: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`selected_forward` with ``band``, and :func:`gating_forward` with its output.

    Both are one kernel where shared memory has room for it. Then the output is not rounded before
    it is added.

    Args:
        q, k, v, block_indices, blocks, block_size, scale, causal: of :func:`selected_forward`. The
            dimension of v is that of q.
        o_cmp, o_win: ``(T, H, D)``.
        gates, weight, out: of :func:`gating_forward`.
        keep: whether the selected branch's output is wanted too.

    Returns:
        The sum ``(T, H, D)``, ``out`` where it is given; the selected branch's output, or None; and
        its log-sum-exp.
    """
    return _kernels("selected_forward").closing_forward(**locals())


def selected_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: RowStatistics,
    block_indices: Tensor,
    blocks: TokenBlocks,
    block_size: int,
    scale: float,
    causal: bool,
    deterministic: bool = False,
    sums: Pair | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the dtype of q. Those of keys that no token sees are 0.

    Args:
        dout: ``(T, H, Dv)``, the gradient of the output.
        q, k, v: arguments of the forward, like all others that it shares.
        statistics: float32 ``(T, H)``; not used for a token with no block.
        deterministic: give the same bits each time. Otherwise the last ones of dk and dv vary.
        sums: float32 of the shapes of ``k`` and ``v``, contiguous, not if ``deterministic``: dk,
            without the scale, and dv are added, in the layout that :func:`round_sums` reads.
    """
    return _kernels("selected_backward").selected_backward(**locals())


def round_sums(sums: Tensor, out: Tensor, factor: float) -> None:
    """As :func:`round_listed_sums`, for sums that :func:`selected_backward` adds to."""
    return _kernels("float_sums").round_sums(**locals())


def row_statistics(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> RowStatistics:
    """The statistics of attention alone.

    Args:
        dout: ``(T, H, Dv)``, the gradient of ``out``; bfloat16 or float16.
        out, lse: results of :func:`selected_forward`.
        dlse: float32 ``(T, H)``, the gradient of ``lse``; None for 0. ``delta`` is less by it: then
            ``dS = P * (dP - delta)`` has what comes through the log-sum-exp, whose derivative is P.

    Returns:
        float32 ``(T, H)`` each.
    """
    return _kernels("row_statistics").row_statistics(**locals())


def top_blocks(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    out: Tensor,
    *,
    tile_offset: int,
    column_offset: int,
    scale: float,
    per_block: int,
    num_initial: int,
    num_local: int,
) -> None:
    """For ``C`` tiles and each head write the ``n`` best blocks of the tile's sequence to ``out``.

    Block ``J < candidates`` scores the largest ``scale * s[j]`` of the compressed tokens
    ``J * per_block <= j < (J + 1) * per_block``, ``j < visible``. Blocks ``J <= own`` with
    ``J < num_initial`` or ``J > own - num_local`` are taken; then the best of the others, equal
    scores going to the lower index. A block is not taken if each of its scores is -inf or NaN, or
    if it has none.

    Args:
        scores: float32 ``(B, H, C, W)``, contiguous; ``s[j]`` is in column
            ``first - column_offset + j``.
        first: the column of the first compressed token of each tile's sequence, int32 ``(tiles,)``,
            contiguous, as are the next three. Columns outside of ``scores`` count as not visible.
        visible: compressed tokens that are scored.
        candidates: blocks that may be taken, 0 for a tile of no sequence.
        own: the block of the tile's last query.
        out: int32 ``(B, tiles, H, n)``, contiguous, ``n`` up to 256, at least
            ``num_initial + num_local``. Tiles ``tile_offset`` to ``tile_offset + C - 1`` are
            written: indices in the sequence, ascending, -1 at the end if fewer exist.
        tile_offset: the tile of ``scores[:, :, 0]``.
        column_offset: the column of ``scores[..., 0]``.
        scale: positive.
        per_block: compressed tokens in a block.
        num_initial, num_local: first and last blocks that are always taken.
    """
    _kernels("top_blocks").top_blocks(**locals())


def tile_scores(summary: Tensor, k_cmp: Tensor) -> Tensor:
    """``scores[b, h, c, j] = summary[b, c, h] . k_cmp[b, j, h // (H / H_kv)]``, exact to float32.

    Equal keys score equally, bit for bit. For few scores: products are of float64.

    Args:
        summary: ``(B, tiles, H, D)``, float32 or in the dtype of ``k_cmp``; D a multiple of 8.
            Strided tensors are read in place.
        k_cmp: ``(B, M, H_kv, D)``, bfloat16 or float16, likewise.

    Returns:
        float32 ``(B, H, tiles, M)``.
    """
    return _kernels("tile_scores").tile_scores(**locals())


def float32_products(a: Tensor, b: Tensor) -> Tensor:
    """``a (X, R, K) @ b (X, K, W)`` of bfloat16, summed and returned in float32.

    This is not our kernel. It is here because PyTorch has this product only on a GPU.
    """
    return torch.bmm(a, b, out_dtype=torch.float32)
