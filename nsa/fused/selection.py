"""Which blocks and groups each tile attends: one scoring for both (paper section 3.3.2)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.fused.layout import Plan
from nsa.precision import accumulation_dtype

SCORE_ELEMENTS = 1 << 26
"""Scores that are held at a time."""


class Selection(NamedTuple):
    """Blocks ``(B, tiles, H, n)`` and groups ``(B, tiles, H, m)``, int32, None where not asked."""

    blocks: Tensor | None
    groups: Tensor | None


def select(q_rows: Tensor, k_cmp: Tensor, plan: Plan, *, blocks: bool, groups: bool) -> Selection:
    """Select per tile of queries and query head.

    Args:
        q_rows: queries in aligned rows, ``(1, B * rows, H, D)``.
        k_cmp: ``(B, M, H_kv, D)``.
        plan: the sequences and how they lie.
        blocks: whether to select blocks for the selected branch.
        groups: whether to select groups for the sparse compressed branch.

    Returns:
        Indices in the sequence, ascending, -1 at the end of the row where fewer exist.
    """
    config = plan.config
    summary = _tile_summary(q_rows, plan)  # (B, tiles, H, D)
    batch, num_tiles, num_heads = summary.shape[:3]
    step = max(1, SCORE_ELEMENTS // (batch * num_heads * max(1, k_cmp.shape[1])))
    per_block = config.select_block_size // config.compress_block_size
    taken_blocks, taken_groups = [], []
    for start in range(0, num_tiles, step):
        tiles = slice(start, start + step)
        scores = _scores(summary[:, tiles], k_cmp, tiles, plan)  # (B, C, H, W)
        if blocks:
            taken_blocks.append(_take_blocks(_maximum(scores, per_block), tiles, plan))
        if groups:
            best = _maximum(scores, config.cmp_group_size)
            taken_groups.append(take_top(best, config.num_cmp_selected_blocks).int())
    return Selection(
        torch.cat(taken_blocks, dim=1) if blocks else None,
        torch.cat(taken_groups, dim=1) if groups else None,
    )


def take_top(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` best scores above -inf, ascending, then -1.

    Equal scores go to the lower index. ``scores`` is ``(..., X)``; returns int64 ``(..., count)``.
    """
    num_scores = scores.shape[-1]
    width = min(count, num_scores)
    if scores.dtype == torch.float32:
        index = _ranking_keys(scores).topk(width, dim=-1, sorted=False).indices
    else:
        index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :width]
    index = torch.where(scores.gather(-1, index) > -torch.inf, index, num_scores)
    index = index.sort(dim=-1).values
    index = torch.where(index < num_scores, index, -1)
    return torch.nn.functional.pad(index, (0, count - width), value=-1)


def _ranking_keys(scores: Tensor) -> Tensor:
    """Distinct int64 keys in the order of (score, lower index first): topk leaves ties open."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) - torch.arange(scores.shape[-1], device=scores.device)


def _tile_summary(q_rows: Tensor, plan: Plan) -> Tensor:
    """Mean of each tile's queries, or its first query: ``(B, tiles, H, D)``."""
    geometry, size = plan.geometry, plan.config.q_tile_size
    dtype = accumulation_dtype(q_rows.dtype)
    tiles = q_rows[0].unflatten(0, (-1, geometry.tiles.total, size))  # (B, tiles, size, H, D)
    if plan.config.tile_summary == "first":
        return tiles[:, :, 0].to(dtype)
    count = (geometry.tile_last - geometry.tile_first + 1).clamp(min=1)
    return tiles.sum(dim=2, dtype=dtype) / count[:, None, None]


def _scores(summary: Tensor, k_cmp: Tensor, tiles: slice, plan: Plan) -> Tensor:
    """``scale * summary . k_cmp[j]`` for the blocks ``j < W`` of each tile's sequence.

    ``(B, C, H, W)`` with ``W`` the most that a sequence has; -inf where the tile does not see the
    block. In float32, because a rounding of the summary to 16 bits would reorder close scores.
    """
    geometry, config = plan.geometry, plan.config
    num_kv_heads = k_cmp.shape[2]
    rows = summary.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # (B, H_kv, G, C, D)
    keys = k_cmp.to(summary.dtype).permute(0, 2, 3, 1)  # (B, H_kv, D, M)
    scores = rows.flatten(2, 3) @ keys
    scores = scores.unflatten(2, rows.shape[2:4]).flatten(1, 2).transpose(1, 2)  # (B, C, H, M)
    owner = geometry.tiles.owner[tiles]
    index = torch.arange(plan.max_compressed, device=k_cmp.device)
    if plan.packed:
        column = geometry.compressed.offset[owner, None] + index
        column = column.clamp(max=max(0, k_cmp.shape[1] - 1))[:, None]  # (C, 1, W)
        scores = scores.gather(-1, column.expand(*scores.shape[:3], -1))
    position = geometry.tile_first if config.tile_summary == "first" else geometry.tile_last
    seen = geometry.num_visible(position[tiles], owner, "complete")
    scores = scores * config.softmax_scale(summary.shape[-1])
    return scores.masked_fill_((index >= seen[:, None])[:, None], -torch.inf)


def _maximum(scores: Tensor, size: int) -> Tensor:
    """Largest score of each block of ``size`` compressed tokens."""
    if size == 1:
        return scores
    missing = -scores.shape[-1] % size
    padded = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return padded.unflatten(-1, (-1, size)).amax(dim=-1)


def _take_blocks(scores: Tensor, tiles: slice, plan: Plan) -> Tensor:
    """Forced blocks and the best candidates of ``scores (B, C, H, blocks)``, ascending."""
    geometry = plan.geometry
    # The last blocks of a sequence may have no score: they are taken only if forced.
    missing = plan.max_selection - scores.shape[-1]
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    owner, position = geometry.tiles.owner[tiles], geometry.tile_last[tiles]
    first = geometry.selection.offset[owner, None]
    blocks = first + torch.arange(scores.shape[-1], device=scores.device)
    candidate, forced = geometry.block_rules(position, owner, blocks)
    # Tiles past the last sequence own nothing.
    real = geometry.tiles.real[tiles, None]
    scores = scores.masked_fill(~(candidate & real)[:, None], -torch.inf)
    scores = scores.masked_fill_((forced & real)[:, None], torch.inf)
    return take_top(scores, plan.config.num_selected_blocks).int()
