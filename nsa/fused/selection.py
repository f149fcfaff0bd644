"""Which blocks and groups each tile attends: one scoring for both (paper section 3.3.2)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.plan import Plan
from nsa.precision import accumulation_dtype

SCORE_ELEMENTS = 1 << 26
"""Scores that are held at a time."""

FEW_SCORES = 1 << 22
"""Scores up to which a float64 product is as fast as three of bfloat16, in fewer launches."""


class Selection(NamedTuple):
    """Blocks ``(B, tiles, H, n)`` and groups ``(B, tiles, H, m)``, int32, None where not asked."""

    blocks: Tensor | None
    groups: Tensor | None


@torch.no_grad()
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
    summary = _tile_summary(q_rows, plan)  # (B, H, tiles, D)
    keys = k_cmp.transpose(1, 2)  # (B, H_kv, M, D)
    batch, num_heads, num_tiles = summary.shape[:3]
    if k_cmp.dtype == torch.bfloat16 and summary[..., 0].numel() * k_cmp.shape[1] > FEW_SCORES:
        summary, keys = _bfloat16_parts(summary), keys.repeat(1, 1, 1, 3)
    else:
        summary, keys = summary.double(), _copy(keys, torch.float64)

    def unwritten(count: int) -> Tensor:
        shape = (batch, num_tiles, num_heads, count)
        return torch.empty(shape, dtype=torch.int32, device=q_rows.device)

    taken = Selection(
        unwritten(config.num_selected_blocks) if blocks else None,
        unwritten(config.num_cmp_selected_blocks) if groups else None,
    )
    dtype = accumulation_dtype(q_rows.dtype)
    for tiles, columns in _chunks(summary, keys, plan):
        scores = _scores(summary[:, :, tiles], keys[:, :, columns], dtype)
        _take(scores, tiles, columns, taken, plan)
    if blocks and plan.scoring.forced_past_end:
        past = taken.blocks >= plan.scoring.num_blocks[:, None, None]
        taken.blocks.masked_fill_(past, -1)
    return taken


def _tile_summary(q_rows: Tensor, plan: Plan) -> Tensor:
    """Mean of each tile's queries, or its first query, in float32: ``(B, H, tiles, D)``."""
    size, num_tiles = plan.config.q_tile_size, plan.geometry.tiles.total
    dtype = accumulation_dtype(q_rows.dtype)
    if plan.config.tile_summary == "first":
        first = q_rows[0].unflatten(0, (-1, num_tiles, size))[:, :, 0]
        return _copy(first.transpose(1, 2), dtype)
    start = plan.scoring.tile_start(q_rows.shape[1] // (num_tiles * size))
    mean = kernel_calls.mean_forward(q_rows[0], start, size, dtype)
    mean = mean.unflatten(0, (-1, num_tiles)).transpose(1, 2)
    filled = plan.scoring.filled
    if filled is None:
        return _copy(mean, dtype)
    out = torch.empty(mean.shape, dtype=dtype, device=mean.device)
    return torch.div(mean, filled[:, None], out=out)


def _chunks(summary: Tensor, keys: Tensor, plan: Plan) -> Iterator[tuple[slice, slice]]:
    """Chunks of tiles and the columns (compressed tokens) that these may see."""
    batch, num_heads, num_tiles = summary.shape[:3]
    of_a_tile = batch * num_heads * max(1, keys.shape[2])
    if summary.dtype == torch.float64:
        # Twice the bytes, and then a copy in float32.
        of_a_tile *= 2
    step = max(1, SCORE_ELEMENTS // of_a_tile)
    for start in range(0, num_tiles, step):
        tiles = slice(start, min(start + step, num_tiles))
        yield tiles, _visible_columns(tiles, plan)


def _visible_columns(tiles: slice, plan: Plan) -> slice:
    """Columns that hold all that the ``tiles`` see, from what the host knows of their sequences.

    At most ``q_tile_size`` tokens are in a tile, and fewer only in the last one of a sequence, so
    ``tile * q_tile_size`` is at or past the tile's first token by what sequences before it leave
    empty; and so for compressed tokens.
    """
    config, tokens = plan.config, plan.geometry.tokens
    tile, block = config.q_tile_size, config.compress_block_size
    before = tokens.num_sequences - 1
    end = tiles.stop * tile if config.causal else (tiles.stop - 1) * tile + plan.longest
    first = tiles.start * tile - before * (tile - 1) - (plan.longest - 1) - before * (block - 1)
    return slice(max(0, first) // block, min(end, tokens.total) // block)


def _scores(summary: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """``summary (B, H, C, D) . keys (B, H_kv, W, D)``: ``(B, H, C, W)`` in ``dtype``.

    To float32 at least, because a rounding of the summary to 16 bits would reorder close scores.
    Many scores come from tensor cores: three bfloat16 numbers add up to a float32 of the summary,
    so their products with keys repeated three times, both ``3 * D`` wide, do to the float32 ones.
    Few are products in float64. No float32 product, in which PyTorch may be set to use TF32.
    """
    shape = (*summary.shape[:3], keys.shape[2])
    keys = keys.flatten(0, 1)  # (B * H_kv, W, D)
    rows = summary.reshape(len(keys), -1, summary.shape[-1])  # (B * H_kv, G * C, D)
    if keys.dtype == torch.bfloat16:
        return kernel_calls.float32_products(rows, keys.mT).view(shape)
    return torch.bmm(rows, keys.mT).to(dtype).view(shape)


def _bfloat16_parts(x: Tensor) -> Tensor:
    """Three bfloat16 numbers that add up to each of float32 ``x (..., D)``: ``(..., 3 * D)``."""
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return torch.cat((high, middle, (rest - middle).bfloat16()), dim=-1)


def _take(scores: Tensor, tiles: slice, columns: slice, taken: Selection, plan: Plan) -> None:
    """Write the blocks and groups of some tiles."""
    config, scoring = plan.config, plan.scoring
    common = dict(
        tile_offset=tiles.start,
        column_offset=columns.start,
        scale=config.softmax_scale(plan.head_dim),
    )
    if taken.blocks is not None:
        kernel_calls.top_blocks(
            scores,
            scoring.first,
            scoring.visible,
            scoring.candidates,
            scoring.own,
            taken.blocks,
            per_block=config.select_block_size // config.compress_block_size,
            num_initial=config.num_initial_blocks,
            num_local=config.num_local_blocks,
            **common,
        )
    if taken.groups is not None:
        kernel_calls.top_blocks(
            scores,
            scoring.first,
            scoring.visible,
            scoring.visible,  # at least the groups that have a score
            scoring.own,
            taken.groups,
            per_block=config.cmp_group_size,
            num_initial=0,
            num_local=0,
            **common,
        )


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, contiguous, in one pass."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
