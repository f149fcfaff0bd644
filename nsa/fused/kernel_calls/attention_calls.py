"""Attention to listed blocks, and what its backward takes."""

from collections.abc import Sequence

from torch import Tensor

from nsa.fused import kernels
from nsa.fused.kernel_inputs import (
    BlockLists,
    FewKeys,
    OtherGradients,
    Pair,
    Placement,
    RowStatistics,
)
from nsa.fused.token_inputs import TokenBlocks


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
    kernels.load("few_keys").few_key_deltas(**locals())


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
    return kernels.load("selected_forward").selected_forward(**locals())


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
    """:func:`selected_forward` with ``band``, and the gated sum with its output.

    Both are one kernel where shared memory has room for it. Then the output is not rounded before
    it is added.

    Args:
        q, k, v, block_indices, blocks, block_size, scale, causal: of :func:`selected_forward`. The
            dimension of v is that of q.
        o_cmp, o_win: ``(T, H, D)``.
        gates, weight, out: of :func:`nsa.fused.kernel_calls.gating_forward`.
        keep: whether the selected branch's output is wanted too.

    Returns:
        The sum ``(T, H, D)``, ``out`` where it is given; the selected branch's output, or None; and
        its log-sum-exp.
    """
    return kernels.load("selected_forward").closing_forward(**locals())


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
    others: OtherGradients | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in the dtype of q. Those of keys that no token sees are 0.

    Args:
        dout: ``(T, H, Dv)``, the gradient of the output.
        q, k, v: arguments of the forward, like all others that it shares.
        statistics: float32 ``(T, H)``; not used for a token with no block.
        deterministic: give the same bits each time. Otherwise the last ones of dk and dv vary.
        sums: float32 of the shapes of ``k`` and ``v``, contiguous: dk, without the scale, and dv
            are added, in the layout that :func:`round_sums` reads. Returned instead of these.
        others: what dq has beside, rounded once with it; D as of :func:`gradient_of_sums`.
    """
    return kernels.load("selected_backward").selected_backward(**locals())


def round_sums(
    sums: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: Sequence[float],
    last: Sequence[Tensor] | None = None,
) -> None:
    """As :func:`round_listed_sums`, for sums that :func:`selected_backward` adds to, of any number
    of keys. Those of values may have another dimension."""
    return kernels.load("float_sums").round_sums(**locals())


def join_near_blocks(
    window: RowStatistics,
    selected: RowStatistics,
    block_indices: Tensor,
    batch: int,
    first: int,
    block_size: int,
) -> tuple[RowStatistics, Tensor]:
    """Statistics with which the window's backward attends near blocks for the selected branch too.

    These are each token's own block and the one before, where the token's list names them. The
    window sees all keys of theirs that the selected branch sees, and both have one ``dout``.

    Args:
        window: float32 ``(H, B * T)``, contiguous.
        selected: float32 ``(B * T, H)``, contiguous.
        block_indices: int32 ``(B * T, H_kv, slots)``, read in place whatever the strides.
        batch: ``B``.
        first: the position of an entry's first token.
        block_size: keys of a block.

    Returns:
        statistics: by kind of key, as :func:`nsa.fused.fa4.dense_backward` takes them.
        others: ``block_indices`` with ``LEFT_OUT`` in place of near blocks, contiguous.
    """
    return kernels.load("near_block_statistics").join_near_blocks(**locals())


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
    return kernels.load("listed_backward").listed_backward(**locals())


def round_listed_sums(
    sums: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: Sequence[float],
    last: Sequence[Tensor] | None = None,
    dmeans: Sequence[Tensor] | None = None,
    block_size: int = 1,
) -> None:
    """Write ``factor * sums``, and what else is given, in the dtype and order of ``outs``.

    Args:
        sums: of keys and of values, or of one of them: float32 ``(..., T, H, D)``, contiguous, as
            :func:`listed_backward` adds to them: those of some consecutive keys; ``T`` and where
            they begin are multiples of 64. All that follows is one for each of these.
        outs: ``(..., T, H, D)``, contiguous, bfloat16 or float16.
        factors: see above.
        last: ``(..., T', H, D)`` in the dtype of ``outs``, added for the last keys of each entry.
        dmeans: ``(..., M, H, D)``, in float32 or that dtype: gradients of means over blocks that
            lie side by side from the first key of each entry on. A key gets its part of its
            block's. Both are copied if they are not contiguous.
        block_size: keys of such a block.
    """
    return kernels.load("block_sums").round_listed_sums(**locals())


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
    return kernels.load("row_statistics").row_statistics(**locals())
