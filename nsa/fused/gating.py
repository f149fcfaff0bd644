"""Gated sum of the three branches (paper Eq. 5), forward and backward."""

from typing import NamedTuple

from torch import Tensor

from nsa.fused import own_kernels

Branches = tuple[Tensor, Tensor, Tensor]


class GatingGradients(NamedTuple):
    """Gradients of the branches ``(B, T, H, D)`` each, and of the rest where there is one."""

    branches: Branches
    q: Tensor | None
    gates: Tensor | None
    gate_proj_weight: Tensor | None


def combine_branches(
    branches: Branches, q: Tensor, gates: Tensor | None, gate_proj_weight: Tensor | None
) -> Tensor:
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``.

    Args:
        branches: outputs ``(o_cmp, o_slc, o_win)``, each ``(B, T, H, D)``.
        q: ``(B, T, H, D)``.
        gates: ``(B, T, H, 3)``, used as they are.
        gate_proj_weight: ``(H, 3, D)``; without ``gates``, ``g_i = sigmoid(q . weight[h, i])``.
            With neither, each gate is 1/3.
    """
    rows = (x.flatten(0, 1) for x in (*branches, q))
    gates = None if gates is None else gates.flatten(0, 1)
    out = own_kernels.gating_forward(*rows, gates, None if gates is not None else gate_proj_weight)
    return out.unflatten(0, q.shape[:2])


def combine_branches_backward(
    dout: Tensor,
    branches: Branches,
    q: Tensor,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
) -> GatingGradients:
    """Gradients of :func:`combine_branches` for ``dout (B, T, H, D)``."""
    rows = (x.flatten(0, 1) for x in (dout, *branches, q))
    gates = None if gates is None else gates.flatten(0, 1)
    weight = None if gates is not None else gate_proj_weight
    *dbranches, dq, dgates, dweight = own_kernels.gating_backward(*rows, gates, weight)
    leading = q.shape[:2]
    return GatingGradients(
        tuple(x.unflatten(0, leading) for x in dbranches),
        None if dq is None else dq.unflatten(0, leading),
        None if dgates is None else dgates.unflatten(0, leading),
        dweight,
    )
