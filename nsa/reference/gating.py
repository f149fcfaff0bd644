"""Gated sum of the three branches (paper Eq. 5)."""

from typing import cast

from torch import Tensor

from nsa.precision import accumulation_dtype
from nsa.reference.products import inner_products


def combine_branches(
    branches: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
) -> Tensor:
    """``o = g0 * o_cmp + g1 * o_slc + g2 * o_win``.

    Args:
        branches: outputs ``(o_cmp, o_slc, o_win)``, each ``(T, H, Dv)``.
        q: queries ``(T, H, D)``.
        gates: ``(T, H, 3)``; used as they are.
        gate_proj_weight: ``(H, 3, D)``; without ``gates``, ``g_i = sigmoid(q . weight[h, i])``.
            With neither, each gate is 1/3.

    Returns:
        ``(T, H, Dv)`` in the dtype of ``q``, contiguous whatever the layout of the gates.
    """
    dtype = accumulation_dtype(q.dtype)
    if gates is None:
        if gate_proj_weight is None:
            total = cast(Tensor, sum(branch.to(dtype) for branch in branches))
            return (total / 3).to(q.dtype)
        logits = inner_products(q.to(dtype).transpose(0, 1), gate_proj_weight.to(dtype))
        gates = logits.sigmoid().transpose(0, 1)
    weighted = [gates[..., i, None].to(dtype) * o.to(dtype) for i, o in enumerate(branches)]
    return cast(Tensor, sum(weighted)).to(q.dtype).contiguous()
