"""Compressed blocks: each computed once, by the rank of its last token, then gathered by all."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nsa.distributed.collectives import gather_rows
from nsa.distributed.rank_layout import Layout

Pair = tuple[Tensor, Tensor]


def block_rows(rows: Sequence[Tensor], layout: Layout, group: ProcessGroup) -> list[Tensor]:
    """The tokens of the blocks that own tokens complete; differentiable.

    Args:
        rows: tensors of own tokens, ``(T, H_kv, ...)`` each.

    Returns:
        For each of them, rows of the sequences of :attr:`Layout.block_boundaries`, some of which
        other ranks hold.
    """
    send, take = layout.borders
    rows = list(rows)
    if len(send):
        lent = torch.cat([x.index_select(0, send) for x in rows], dim=-1)
        borders = gather_rows(lent, take, group).split([x.shape[-1] for x in rows], dim=-1)
        rows = [torch.cat(pair) for pair in zip(rows, borders, strict=True)]
    tokens = layout.block_tokens
    return rows if tokens is None else [x.index_select(0, tokens) for x in rows]


def compress_own(
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    layout: Layout,
    backend: ModuleType,
    group: ProcessGroup,
) -> tuple[Pair, Pair | None]:
    """Compressed keys and values of the blocks that own tokens complete, in the order of those; and
    ``k`` and ``v`` for other branches, if the backend adds their gradients to those of the blocks.

    Args:
        k, v: own rows ``(T, H_kv, D)`` and ``(T, H_kv, Dv)`` of the compressed branch.
        weights: ``(H_kv, D, D)`` and ``(H_kv, Dv, Dv)``, or None.
        backend: the package that compresses.
    """
    keys, values = block_rows((k, v), layout, group)
    blocks, again = backend.compress_blocks(
        keys, values, config=layout.config, compress_k_weight=weights[0],
        compress_v_weight=weights[1], boundaries=layout.block_boundaries,
    )  # fmt: skip
    return blocks, again if keys is k and values is v else None


def gather_blocks(
    blocks: Sequence[Tensor], layout: Layout, group: ProcessGroup
) -> tuple[Tensor, ...]:
    """The blocks that own queries attend, from those that each rank's tokens complete."""
    width, take = layout.blocks
    own = torch.cat(tuple(blocks), dim=-1)
    missing = own.new_zeros(width - own.shape[0], *own.shape[1:])
    rows = gather_rows(torch.cat((own, missing)), take, group)
    return rows.split([x.shape[-1] for x in blocks], dim=-1)
