"""Gated sum of the three branches (paper Eq. 5), forward and backward."""

from typing import NamedTuple

from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import IN_ORDER, Placements
from nsa.fused.sizes import Sizes

Branches = tuple[Tensor, Tensor, Tensor]


class GatingGradients(NamedTuple):
    """Gradients of the branches, in the layout of the branches, and of the other inputs or None.

    ``logits (B, T, H, 3)`` are the sigmoids' inputs with ``gate_proj_weight``, in float32 for
    16-bit inputs. :func:`query_gradient` passes their gradient on to ``q``.
    """

    branches: Branches
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
    q: Tensor,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    placements: Placements = IN_ORDER,
) -> GatingGradients:
    """Gradients of :func:`combine_branches` for ``dout (B, T, H, D)``."""
    weight = None if gates is not None else gate_proj_weight
    do_cmp, do_slc, do_win, dlogits, dgates, dweight = kernel_calls.gating_backward(
        dout, *branches, q, gates, weight, placements
    )
    return GatingGradients((do_cmp, do_slc, do_win), dlogits, dgates, dweight)


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


def gate_gradient_bytes(sizes: Sizes) -> int:
    """Bytes of the gradients of the logits or gates, in float32."""
    return sizes.tokens * sizes.num_heads * 3 * 4
