"""Compressed blocks: each computed once, by the rank of its last token, then gathered by all."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nsa.distributed.collectives import gather_rows
from nsa.distributed.layout import Layout
from nsa.precision import without_autocast
from nsa.reference.compression import compress


def block_rows(x: Tensor, layout: Layout, group: ProcessGroup) -> Tensor:
    """The tokens of the blocks that own tokens complete; differentiable.

    Args:
        x: own rows ``(T, ...)``.

    Returns:
        Rows of the sequences of :attr:`Layout.block_geometry`, some of which other ranks hold.
    """
    borders = layout.borders
    if len(borders.send):
        x = torch.cat((x, gather_rows(x.index_select(0, borders.send), borders.take, group)))
    return x.index_select(0, layout.block_tokens)


def compress_own(
    rows: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    layout: Layout,
    group: ProcessGroup,
) -> tuple[Tensor, ...]:
    """Compressed keys or values of the blocks that own tokens complete, in the order of those.

    Args:
        rows: own keys ``(T, H_kv, D)``, values ``(T, H_kv, Dv)``, or both.
        weights: for each of them, ``(H_kv, D, D)`` or None.
    """
    with without_autocast(rows[0].device):
        together = block_rows(torch.cat(tuple(rows), dim=-1), layout, group)
        parts = together.split([x.shape[-1] for x in rows], dim=-1)
        return tuple(
            compress(x, weight, layout.block_geometry)
            for x, weight in zip(parts, weights, strict=True)
        )


def gather_blocks(
    blocks: Sequence[Tensor], layout: Layout, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """The blocks that own queries attend, from those that each rank's tokens complete."""
    width, take = layout.blocks
    own = torch.cat(tuple(blocks), dim=-1)
    missing = own.new_zeros(width - own.shape[0], *own.shape[1:])
    rows = gather_rows(torch.cat((own, missing)), take, group)
    return rows.split([x.shape[-1] for x in blocks], dim=-1)
