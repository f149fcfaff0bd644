"""The gated sum of the branches."""

from torch import Tensor

from nsa.fused import kernels
from nsa.fused.kernel_inputs import IN_ORDER, Placements, RowStatistics, StatisticsPlacements


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
    return kernels.load("gated_sum").gating_forward(**locals())


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
    return kernels.load("gated_sum").gating_backward(**locals())


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
    return kernels.load("query_gradient").query_gradient(**locals())


def gradient_of_sums(
    sums: Tensor,
    dq_slc: Tensor,
    dlogits: Tensor | None,
    weight: Tensor | None,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`query_gradient` where the other branches have added theirs to ``sums`` in float32.

    Args:
        sums: :func:`nsa.fused.fa4_call.new_query_sums`, to be multiplied by ``scale``.
        dq_slc: ``(B, T, H, D)``, bfloat16 or float16; D one of 64, 96, 128 and 256.
        dlogits, weight: of ``query_gradient``.
        scale: of the scores.
        out: likewise; it may be ``dq_slc``.

    Returns:
        ``(B, T, H, D)`` in the dtype of ``dq_slc``: ``out`` where it is given.
    """
    return kernels.load("query_sums").gradient_of_sums(**locals())
