"""The plain data that the fused stages and the kernels exchange, and limits of the kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""Tensors of keys and of values, of one shape and dtype; strides may differ."""

HEAD_DIMS = (64, 96, 128, 256)
"""Head dimensions of the kernels."""

MAX_BLOCKS = 256
"""The most blocks that a query tile may take: the best so far are in the registers of one warp."""


class BlockLists(NamedTuple):
    """The key blocks that each query block of each head attends, or the transpose.

    Forward: a row is a query block and entries are key blocks. Backward: a row is a key block and
    entries are query blocks. The last block of either kind may be short. Entries of a row ascend,
    do not repeat, and appear in at most one of the two lists; entries past the count are not read.

    Attributes:
        partial_count: int32 ``(1, H, rows)``, blocks to which the mask is applied.
        partial_index: int32 ``(1, H, rows, width)``, ``1 <= width <= number of blocks``.
        full_count: the same for blocks in which every pair is visible, so the mask is skipped.
            None if there are none.
        full_index: the same for those blocks; its width may differ.
        query_block: queries in a block, a multiple of 64.
        key_block: keys in a block, 64 or 128.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor | None
    full_index: Tensor | None
    query_block: int
    key_block: int


class RowStatistics(NamedTuple):
    """What the backward of attention needs of each row and head, beside its inputs.

    With ``P = exp2(scale * log2(e) * S - lse_log2)`` it is ``dV = P^T dout`` and
    ``dS = P * (dout V^T - delta)``. Float32, or in tests the dtype of sums.

    For attention alone, ``lse_log2`` is the log-sum-exp times log2(e) and ``delta`` the sum of
    ``dout * out``. A gate ``g`` of the output goes into the first: it is less by ``log2(g)``, so
    that P has the factor g, and ``dout`` is the gradient of the gated sum.

    Attributes:
        lse_log2: infinity, so that P is 0, for a row that sees no key or whose gate is 0.
        delta: any finite number where P is 0.
    """

    lse_log2: Tensor
    delta: Tensor


KINDS_OF_KEYS = 3
"""Keys of a query's own block, of the block before, and all others."""

LEFT_OUT = -2
"""In place of a block that the backward of another branch attends for the selected one."""


class OtherGradients(NamedTuple):
    """What the gradient of queries of a batch has beside that of the selected branch.

    Attributes:
        sums: :func:`nsa.fused.fa4_call.new_query_sums`, without the scale.
        dlogits: float32 ``(B, T, H, 3)``, gradients of the logits of the gates; None for no logits.
        weight: ``(H, 3, D)``, with ``dlogits``: of each logit the gradient that is to be added.
        out: where to write the whole, ``(B, T, H, D)`` or a slice of heads of that; None: new.
    """

    sums: Tensor
    dlogits: Tensor | None
    weight: Tensor | None
    out: Tensor | None = None


class Placement(NamedTuple):
    """Where every token's heads lie in a contiguous buffer of vectors ``(D,)``, or of numbers.

    Head ``h`` of token ``r`` is vector
    ``place[r] * unit + h // group * group_stride + h % group * head_stride`` of the buffer. A token
    without a place reads as 0 and is not written. No two tokens share a vector.

    Attributes:
        place: int32 ``(R,)``, contiguous; -1 for none. None if the place of token ``r`` is ``r``.
        unit: vectors from one place to the next.
        group: number of heads whose distance is ``head_stride``: those of a KV head, or all.
        group_stride: vectors from the first head of one group to the first of the next.
        head_stride: vectors from a head to the next of the group.
    """

    place: Tensor | None
    unit: int
    group: int
    group_stride: int
    head_stride: int = 1


def multiplies_gates(dtype: torch.dtype, gates: Tensor | None, weight: Tensor | None) -> bool:
    """Whether each branch gets an output gradient of its own, times its gate.

    Else the gate goes into the log-sum-exp. Gates that are given may be 0 or less, so they have no
    logarithm. And in float16 probabilities times a small gate are denormal: with a gate of 0.01 and
    16K keys, gradients of values then err by 2.5 % instead of 0.03 %.
    """
    return gates is not None or (weight is not None and dtype == torch.float16)


def new_statistics(lse: Tensor, placement: Placement, written: int) -> RowStatistics:
    """Statistics like ``lse``, of which a kernel will write so many by ``placement``.

    Where it may leave some unwritten, as in padding, P is 0.
    """
    statistics = RowStatistics(*torch.empty((2, *lse.shape), dtype=lse.dtype, device=lse.device))
    if placement.place is not None or lse.numel() > written:
        statistics.lse_log2.fill_(torch.inf)
        statistics.delta.zero_()
    return statistics


Placements = tuple[Placement | None, Placement | None]
"""Placements of the compressed and the selected branch; None for token order."""

IN_ORDER: Placements = (None, None)

StatisticsPlacements = tuple[Placement | None, Placement, Placement]
"""Where the log-sum-exps and statistics of the branches lie: compressed, selected, window. None if
there are no compressed tokens."""


MOST_FEW_KEYS = 4
"""Keys that a query of :class:`FewKeys` sees at most. In simulation, delta from the 16-bit output
makes gradients err 1.15 times as much as the reference's for 2 keys, and 0.98 for 4."""


class FewKeys(NamedTuple):
    """Queries that see 2 to ``MOST_FEW_KEYS`` neighbouring keys; int32 ``(R,)`` each.

    Attributes:
        query: row of q, -1 for none.
        first: row of k of the first key; 0 for none, because kernels read it all the same.
        keys: how many keys, at least 1.
    """

    query: Tensor
    first: Tensor
    keys: Tensor


def kernel_head_dim(head_dim: int, value_dim: int) -> int:
    """The kernels' head dimension for ``D`` and ``Dv``: the smallest that fits both."""
    widest = max(head_dim, value_dim)
    return next((dim for dim in HEAD_DIMS if dim >= widest), widest)
