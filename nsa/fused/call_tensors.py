"""The tensors of a call: its inputs, the results of its branches, and what backward gets.

Queries are ``(B, T, H, D)``, keys ``(B, Tk, H_kv, D)``, with ``B = 1`` for packed input.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nsa.fused.kernel_inputs import Pair


def made(x: Tensor | None) -> Tensor:
    """A tensor that an earlier stage has made."""
    assert x is not None
    return x


class Inputs(NamedTuple):
    """The differentiable arguments of a call. Optional ones that it does not use are None.

    ``k`` and ``v`` are the compressed branch's, or those of all branches if ``k_slc`` is None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_slc: Tensor | None
    v_slc: Tensor | None
    k_win: Tensor | None
    v_win: Tensor | None
    gates: Tensor | None
    gate_proj_weight: Tensor | None
    compress_k_weight: Tensor | None
    compress_v_weight: Tensor | None
    k_cmp: Tensor | None
    v_cmp: Tensor | None

    @property
    def compress_weights(self) -> tuple[Tensor | None, Tensor | None]:
        return self.compress_k_weight, self.compress_v_weight

    def keys_and_values(self) -> tuple[Pair, Pair]:
        """Keys and values of the selected and of the window branch."""
        k_slc, k_win = (self.k if x is None else x for x in (self.k_slc, self.k_win))
        v_slc, v_win = (self.v if x is None else x for x in (self.v_slc, self.v_win))
        return (k_slc, v_slc), (k_win, v_win)


class BranchResults(NamedTuple):
    """The outputs and log-sum-exps of the branches, and the keys and values that were compressed.

    Outputs lie as :meth:`nsa.fused.plan.Plan.query_placements` says, log-sum-exps as
    :meth:`nsa.fused.plan.Plan.statistics_placements`. Those of the window are None if backward
    computes them again, by :func:`nsa.fused.pipeline.attend_window`; compressed keys and values if
    the caller gave them.
    """

    o_cmp: Tensor
    lse_cmp: Tensor
    o_slc: Tensor
    lse_slc: Tensor
    o_win: Tensor | None
    lse_win: Tensor | None
    k_cmp: Tensor | None
    v_cmp: Tensor | None

    @property
    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.o_win is not None  # attend_window made it
        return self.o_cmp, self.o_slc, self.o_win


SAVED_TENSORS = (*BranchResults._fields, "block_indices", "groups")
"""Names of what :meth:`Saved.tensors` gives."""

_NO_BRANCHES = (None,) * len(BranchResults._fields)


class Saved(NamedTuple):
    """The results of a forward that its backward needs. Without branches, it recomputes them.

    Shapes are those of :meth:`nsa.fused.sizes.Sizes.saved_shapes`.
    """

    branches: BranchResults | None
    block_indices: Tensor | None
    groups: Tensor | None

    @classmethod
    def of_chunks(cls, tensors: Sequence[Any], *, recompute: bool) -> list["Saved"]:
        """From the :meth:`tensors` of each chunk, one after another."""
        saved = []
        for start in range(0, len(tensors), len(SAVED_TENSORS)):
            *branches, blocks, groups = tensors[start : start + len(SAVED_TENSORS)]
            saved.append(cls(None if recompute else BranchResults(*branches), blocks, groups))
        return saved

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in one tuple."""
        return *(self.branches or _NO_BRANCHES), self.block_indices, self.groups
