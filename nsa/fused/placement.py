"""Where the queries of a branch lie when they are not in token order."""

from typing import NamedTuple

from torch import Tensor


class Placement(NamedTuple):
    """The place of every token's heads in a contiguous buffer of vectors ``(D,)``.

    Head ``h`` of token ``r`` is vector
    ``place[r] * unit + h // group * group_stride + h % group`` of the buffer. A token without a
    place is 0 where it is read, and is not written. No two tokens share a vector.

    Attributes:
        place: int32 ``(R,)``, contiguous; -1 for none.
        unit: vectors from one place to the next.
        group: heads that are adjacent, those of a KV head or all.
        group_stride: vectors from the first head of a group to that of the next.
    """

    place: Tensor
    unit: int
    group: int
    group_stride: int


Placements = tuple[Placement | None, Placement | None]
"""Of the compressed and of the selected branch; None for token order."""

IN_ORDER: Placements = (None, None)
