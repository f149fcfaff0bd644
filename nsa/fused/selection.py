"""Selects blocks, and in tile mode groups, for queries (paper section 3.3.2, Eq. 8 to 12).

In tile mode, one scoring serves blocks and groups. Callers have turned autograd off.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from nsa.blocks import num_selection_blocks
from nsa.fused import kernel_calls
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.fused.token_inputs import Rule, choose_shape, find_shape
from nsa.precision import accumulation_dtype

TILE_SCORES = 1 << 26
"""Scores in memory at a time in tile mode."""

TOKEN_SCORES = 1 << 27
"""Scores in memory at a time in token mode."""

FEW_SCORES = 1 << 18
"""Scores up to which float64 products are as fast as those of bfloat16, in fewer launches."""


def select_blocks(q_rows: Tensor, k_cmp: Tensor, lse_cmp: Tensor | None, plan: Plan) -> Tensor:
    """The blocks of the selected branch.

    Args:
        q_rows: ``plan.align_queries(q)``.
        k_cmp: ``(B, M, H_kv, D)``.
        lse_cmp: ``(B, H, T)``, of :func:`nsa.fused.attention.compressed_lse`; only in token mode.
        plan: the sequences.

    Returns:
        int32 ``(B, tiles, H, n)`` in tile mode, ``(B, T, H_kv, n)`` in token mode: indices in the
        sequence, ascending, -1 at the end of the row if fewer exist.
    """
    if plan.config.selection == "token":
        assert lse_cmp is not None
        return _select_token_blocks(q_rows, k_cmp, lse_cmp, plan)
    blocks = _unwritten(q_rows, plan.config.num_selected_blocks, plan)
    _select_tiles(q_rows, k_cmp, plan, blocks, None)
    return blocks


def select_groups(q_rows: Tensor, k_cmp: Tensor, plan: Plan) -> Tensor:
    """The groups of the sparse compressed branch, ``(B, tiles, H, m)``; the rest as for blocks."""
    groups = _unwritten(q_rows, plan.config.num_cmp_selected_blocks, plan)
    _select_tiles(q_rows, k_cmp, plan, None, groups)
    return groups


def select_blocks_and_groups(q_rows: Tensor, k_cmp: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Blocks and groups from one scoring."""
    config = plan.config
    blocks = _unwritten(q_rows, config.num_selected_blocks, plan)
    groups = _unwritten(q_rows, config.num_cmp_selected_blocks, plan)
    _select_tiles(q_rows, k_cmp, plan, blocks, groups)
    return blocks, groups


def _unwritten(q_rows: Tensor, count: int | None, plan: Plan) -> Tensor:
    assert count is not None  # where groups are selected, their number is configured
    shape = (plan.batch, plan.geometry.tiles.total, q_rows.shape[2], count)
    return torch.empty(shape, dtype=torch.int32, device=q_rows.device)


def _select_tiles(
    q_rows: Tensor, k_cmp: Tensor, plan: Plan, blocks: Tensor | None, groups: Tensor | None
) -> None:
    """Write ``blocks`` and ``groups``, if given, for each tile and query head."""
    summary = _tile_summary(q_rows, plan)  # (B, tiles, H, D)
    num_tiles, num_keys = summary.shape[1], k_cmp.shape[1]
    num_scores = math.prod(summary.shape[:3]) * num_keys
    if num_scores <= min(FEW_SCORES, TILE_SCORES):
        scores = kernel_calls.tile_scores(summary, k_cmp)
        _take(scores, slice(0, num_tiles), slice(0, num_keys), blocks, groups, plan)
    else:
        _score_in_steps(summary, k_cmp, num_scores, blocks, groups, plan)
    if blocks is not None and plan.scoring.forced_past_end:
        blocks.masked_fill_(blocks >= plan.scoring.num_blocks[:, None, None], -1)


def _score_in_steps(
    summary: Tensor,
    k_cmp: Tensor,
    num_scores: int,
    blocks: Tensor | None,
    groups: Tensor | None,
    plan: Plan,
) -> None:
    """Score some tiles at a time, and write their blocks and groups."""
    dtype = accumulation_dtype(k_cmp.dtype)
    if k_cmp.dtype == torch.bfloat16 and num_scores > FEW_SCORES:
        keys = k_cmp.transpose(1, 2)
        if summary.dtype == k_cmp.dtype:
            # Queries in their own dtype, because their products with keys are exact.
            summary = _by_head(summary, summary.dtype)
        else:
            summary, keys = _bfloat16_parts(_by_head(summary, dtype)), keys.repeat(1, 1, 1, 3)
    else:
        # Cast directly from the input dtype, which float64 holds exactly.
        summary, keys = _by_head(summary, torch.float64), _by_head(k_cmp, torch.float64)
    for tiles, columns in _steps(summary, keys, plan):
        scores = _scores(_part(summary, tiles), _part(keys, columns), dtype)
        _take(scores, tiles, columns, blocks, groups, plan)


def _tile_summary(q_rows: Tensor, plan: Plan) -> Tensor:
    """Mean of each tile's queries in float32, or its first query: ``(B, tiles, H, D)``."""
    size, num_tiles = plan.config.q_tile_size, plan.geometry.tiles.total
    shape = (plan.batch, num_tiles, *q_rows.shape[2:])
    if plan.config.tile_summary == "first":
        row = q_rows.stride(1)
        strides = (num_tiles * size * row, size * row, *q_rows.stride()[2:])
        return q_rows.as_strided(shape, strides, q_rows.storage_offset())
    dtype = accumulation_dtype(q_rows.dtype)
    mean = kernel_calls.mean_forward(q_rows[0], plan.scoring.tile_start, size, dtype).view(shape)
    filled = plan.scoring.filled
    return mean if filled is None else mean.div_(filled[:, None, None])


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, R, H, D)`` as contiguous ``(B, H, R, D)`` in ``dtype``, in one pass."""
    batch, rows, heads, head_dim = x.shape
    out = torch.empty((batch, heads, rows, head_dim), dtype=dtype, device=x.device)
    return out.copy_(x.transpose(1, 2))


def _part(x: Tensor, rows: slice) -> Tensor:
    """Some rows of ``x (B, H, R, D)``. Taking all rows needs no operation."""
    return x if rows == slice(0, x.shape[2]) else x[:, :, rows]


def _steps(summary: Tensor, keys: Tensor, plan: Plan) -> Iterator[tuple[slice, slice]]:
    """Tiles to score at a time, and the columns (compressed tokens) that these may see."""
    batch, num_heads, num_tiles = summary.shape[:3]
    of_a_tile = batch * num_heads * max(1, keys.shape[2])
    if summary.dtype == torch.float64:
        # Twice the bytes, and then a copy in float32.
        of_a_tile *= 2
    step = max(1, TILE_SCORES // of_a_tile)
    for start in range(0, num_tiles, step):
        tiles = slice(start, min(start + step, num_tiles))
        yield tiles, _visible_columns(tiles, plan)


def _visible_columns(tiles: slice, plan: Plan) -> slice:
    """Columns that hold everything that the ``tiles`` see, without reading lengths on the host.

    Only the last tile of a sequence has fewer than ``q_tile_size`` tokens. So the first token of
    tile ``i`` is at ``i * q_tile_size`` or before it, by as many tokens as earlier sequences leave
    places empty. The same holds for compressed tokens. The key of a query lies at the query's row
    or after it, by as many keys as precede the queries of this and earlier sequences.
    """
    config, geometry = plan.config, plan.geometry
    keys, tile, block = geometry.keys, config.q_tile_size, config.compress_block_size
    if geometry.queries.sequence is not None:
        # Segments may lie in any order.
        return slice(0, keys.total // block)
    before, earlier = keys.num_sequences - 1, keys.total - geometry.queries.rows.total
    end = tiles.stop * tile if config.causal else (tiles.stop - 1) * tile + plan.longest
    first = tiles.start * tile - before * (tile - 1) - (plan.longest - 1) - before * (block - 1)
    return slice(max(0, first) // block, min(end + earlier, keys.total) // block)


def _scores(summary: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """``summary (B, H, C, D) . keys (B, H_kv, W, D)``: ``(B, H, C, W)`` in ``dtype``.

    Scores are exact to float32, because rounding the summary to 16 bits would reorder close scores.
    Float32 products are not used, because they may be TF32.

    Tensor cores compute many scores. They take 16-bit queries as they are. They take a float32
    summary as three bfloat16 numbers that add up to it: ``3 * D`` columns, times the keys three
    times over. Few scores are float64 products.
    """
    shape = (*summary.shape[:3], keys.shape[2])
    keys = keys.flatten(0, 1)  # (B * H_kv, W, D)
    rows = summary.reshape(keys.shape[0], -1, summary.shape[-1])  # (B * H_kv, G * C, D)
    if keys.dtype == torch.bfloat16:
        return kernel_calls.float32_products(rows, keys.mT).view(shape)
    return torch.bmm(rows, keys.mT).to(dtype).view(shape)


def _bfloat16_parts(x: Tensor) -> Tensor:
    """Three bfloat16 numbers that add up to each of float32 ``x (..., D)``: ``(..., 3 * D)``."""
    high = x.bfloat16()
    rest = x - high
    middle = rest.bfloat16()
    return torch.cat((high, middle, (rest - middle).bfloat16()), dim=-1)


def _take(
    scores: Tensor,
    tiles: slice,
    columns: slice,
    blocks: Tensor | None,
    groups: Tensor | None,
    plan: Plan,
) -> None:
    """Select for some tiles, and write their blocks and groups."""
    config, scoring = plan.config, plan.scoring
    common = dict(
        tile_offset=tiles.start,
        column_offset=columns.start,
        scale=config.softmax_scale(plan.head_dim),
    )
    forced = dict(num_initial=config.num_initial_blocks, num_local=config.num_local_blocks)
    per_block = config.select_block_size // config.compress_block_size
    first, visible = scoring.first, scoring.visible
    candidates, own = scoring.candidates, scoring.own
    if blocks is not None and groups is not None:
        kernel_calls.top_blocks_and_groups(
            scores,
            first,
            visible,
            candidates,
            own,
            blocks,
            groups,
            per_block=per_block,
            per_group=config.cmp_group_size,
            **forced,
            **common,
        )
    elif blocks is not None:
        kernel_calls.top_blocks(
            scores,
            first,
            visible,
            candidates,
            own,
            blocks,
            per_block=per_block,
            **forced,
            **common,
        )
    elif groups is not None:
        kernel_calls.top_blocks(
            scores,
            first,
            visible,
            visible,  # at least the groups that have a score
            own,
            groups,
            per_block=config.cmp_group_size,
            num_initial=0,
            num_local=0,
            **common,
        )


def _select_token_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, plan: Plan) -> Tensor:
    """Select per token of ``q (B, T, H, D)`` and KV head."""
    config, rule = plan.config, Rule.of(plan.config)
    (batch, length, num_heads, head_dim), num_kv_heads = q.shape, k_cmp.shape[2]
    width, scale = plan.max_selection_blocks, config.softmax_scale(head_dim)
    step, tile_tokens = scored_tokens(batch, length, num_heads, num_kv_heads, head_dim, width)
    tiles = plan.token_tiles(tile_tokens, step)
    own, candidates = plan.token_candidates
    shape = (batch, length, num_kv_heads, config.num_selected_blocks)
    taken = torch.empty(shape, dtype=torch.int32, device=q.device)
    shape = (batch, num_kv_heads, step, width)
    scratch = torch.empty(shape, dtype=accumulation_dtype(q.dtype), device=q.device)
    for index, start in enumerate(range(0, length, step)):
        scores, rest = scratch, length - start
        if rest < step:
            shape = (batch, num_kv_heads, rest, width)
            scores = scratch.view(-1)[: math.prod(shape)].view(shape)
        kernel_calls.importance_scores(q, k_cmp, lse, tiles, index, scores, scale, rule)
        kernel_calls.top_blocks(
            scores,
            plan.token_first,
            candidates,  # each has a score
            candidates,
            own,
            taken,
            tile_offset=start,
            column_offset=0,
            scale=1.0,
            per_block=1,
            num_initial=config.num_initial_blocks,
            num_local=config.num_local_blocks,
        )
    return taken


def scored_tokens(
    batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, width: int
) -> tuple[int, int]:
    """Tokens of an entry that are scored at a time, in whole tiles; and tokens of a tile.

    A tile that lies in two chunks is computed twice.
    """
    choose = find_shape if torch.compiler.is_compiling() else choose_shape
    # As ints, which a traced call may not have.
    tile_tokens = choose(int(head_dim), int(num_heads // num_kv_heads)).tile_tokens
    fitting = TOKEN_SCORES // (batch * num_kv_heads * width * tile_tokens)
    return min(max(1, fitting), -(-length // tile_tokens)) * tile_tokens, tile_tokens


def select_bytes(sizes: Sizes) -> int:
    """Bytes that selection allocates beside its results: scores, and copies of their inputs."""
    if sizes.token_mode:
        width = num_selection_blocks(sizes.longest, sizes.config)
        step, _ = scored_tokens(
            sizes.batch, sizes.length, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, width
        )
        scores = sizes.batch * sizes.num_kv_heads * step * width
        # The second term is the log-sum-exp in token order.
        return scores * 4 + sizes.tokens * sizes.num_heads * 4
    summaries = sizes.batch * sizes.tiles * sizes.num_heads
    # Scores of a step, and those of the step before it.
    scores = min(2 * TILE_SCORES, summaries * sizes.compressed // sizes.batch)
    keys = sizes.compressed * sizes.num_kv_heads
    if sizes.config.tile_summary == "first":
        # Products take the keys of one entry as they are.
        copied = (summaries + (keys if sizes.batch > 1 else 0)) * sizes.itemsize
    else:
        copied = (2 * summaries + keys) * 4
    return scores * 4 + copied * sizes.head_dim
