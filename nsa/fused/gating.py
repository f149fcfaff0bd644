"""Gated sum of the three branches (paper Eq. 5), forward and backward."""

from typing import NamedTuple

from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import (
    IN_ORDER,
    OtherGradients,
    Placements,
    RowStatistics,
    StatisticsPlacements,
)
from nsa.fused.sizes import Sizes

Branches = tuple[Tensor, Tensor, Tensor]


class GatingGradients(NamedTuple):
    """What the backwards of the branches take, and the gradients of the other inputs or None.

    Attributes:
        douts: the gradient of each branch's output, in its layout. The gate is multiplied into it,
            unless it is in ``statistics``.
        statistics: of each branch, in the layout of its log-sum-exp.
        logits: ``(B, T, H, 3)``, the sigmoids' inputs with ``gate_proj_weight``, in float32 for
            16-bit inputs. :func:`query_gradient` passes their gradient on to ``q``.
        gates, gate_proj_weight: like these.
    """

    douts: Branches
    statistics: tuple[RowStatistics | None, RowStatistics, RowStatistics]
    logits: Tensor | None
    gates: Tensor | None
    gate_proj_weight: Tensor | None


def combine_branches(
    branches: Branches,
    q: Tensor,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``.

    Args:
        branches: outputs ``(o_cmp, o_slc, o_win)``, each ``(B, T, H, D)``; with a placement, any
            contiguous ``(1, rows, heads, D)``.
        q: ``(B, T, H, D)``.
        gates: ``(B, T, H, 3)``, used as they are.
        gate_proj_weight: ``(H, 3, D)``; without ``gates``, ``g_i = sigmoid(q . weight[h, i])``.
            With neither, each gate is 1/3.
        out: where to write the result, ``(B, T, H, D)``: a contiguous tensor, or a slice of heads
            of one. By default a new tensor.
        placements: where the tokens of the first two branches lie.
    """
    weight = None if gates is not None else gate_proj_weight
    return kernel_calls.gating_forward(*branches, q, gates, weight, out, placements)


def combine_branches_backward(
    dout: Tensor,
    branches: Branches,
    lses: tuple[Tensor | None, Tensor, Tensor],
    q: Tensor,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    statistics_placements: StatisticsPlacements,
    placements: Placements = IN_ORDER,
) -> GatingGradients:
    """Gradients of :func:`combine_branches` for ``dout (B, T, H, D)``.

    ``lses`` are the branches' log-sum-exps, that of the compressed branch None if it has no keys;
    ``statistics_placements`` say where tokens lie in them.
    """
    weight = None if gates is not None else gate_proj_weight
    gradients = kernel_calls.gating_backward(
        dout, *branches, *lses, q, gates, weight, statistics_placements, placements
    )
    return GatingGradients(*gradients)


def query_gradient(
    branches: Branches,
    dlogits: Tensor | None,
    gate_proj_weight: Tensor | None,
    out: Tensor | None = None,
    placements: Placements = IN_ORDER,
) -> Tensor:
    """Gradient of ``q``: the sum of those of the branches and of the gates, rounded once.

    Args:
        branches: gradients ``(dq_cmp, dq_slc, dq_win)``, as in :func:`combine_branches`.
        dlogits: from :func:`combine_branches_backward`; None if the gates do not depend on ``q``.
        gate_proj_weight: ``(H, 3, D)``; ignored without ``dlogits``.
        out: as in :func:`combine_branches`. It may be one of ``branches`` without a placement.
        placements: where the tokens of the first two branches lie.
    """
    weight = None if dlogits is None else gate_proj_weight
    return kernel_calls.query_gradient(*branches, dlogits, weight, out, placements)


def gradient_of_sums(
    sums: Tensor,
    dq_slc: Tensor,
    dlogits: Tensor | None,
    gate_proj_weight: Tensor | None,
    scale: float,
    out: Tensor | None,
) -> Tensor:
    """:func:`query_gradient` if the window and the compressed branch have added theirs to ``sums``.

    These are without the ``scale``. The result is written to ``out``, by default to ``dq_slc`` if
    that is contiguous.
    """
    weight = None if dlogits is None else gate_proj_weight
    if out is None and dq_slc.is_contiguous():
        out = dq_slc
    return kernel_calls.gradient_of_sums(sums, dq_slc, dlogits, weight, scale, out)


def other_gradients(
    sums: Tensor, dlogits: Tensor | None, gate_proj_weight: Tensor | None, out: Tensor | None
) -> OtherGradients:
    """What :func:`gradient_of_sums` adds to the gradient of token mode's selected branch."""
    return OtherGradients(sums, dlogits, None if dlogits is None else gate_proj_weight, out)


def gate_gradient_bytes(sizes: Sizes) -> int:
    """Bytes of the gradients of the logits or gates, in float32, and of the row statistics."""
    return sizes.tokens * sizes.num_heads * 3 * 4 + 2 * sizes.lses


def output_gradient_bytes(sizes: Sizes) -> list[int]:
    """Bytes of the branches' output gradients that :func:`combine_branches_backward` writes."""
    placed = (not sizes.in_order, not sizes.in_order, False)
    return [
        output if sizes.gated_gradients or is_placed else 0
        for output, is_placed in zip(sizes.outputs(), placed, strict=True)
    ]
