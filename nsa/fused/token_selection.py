"""Which blocks each token and KV head attends (paper section 3.3.2, Eq. 8 to 12)."""

import torch
from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.importance import Rule, choose_shape
from nsa.fused.plan import Plan
from nsa.precision import accumulation_dtype

SCORE_ELEMENTS = 1 << 27
"""Scores that are held at a time."""


@torch.no_grad()
def select_tokens(q: Tensor, k_cmp: Tensor, lse: Tensor, plan: Plan) -> Tensor:
    """Select per token and KV head.

    Args:
        q: ``(B, T, H, D)``.
        k_cmp: ``(B, M, H_kv, D)``.
        lse: ``(B, H, T)``, the log-sum-exp of the compressed branch.
        plan: the sequences of an entry of the batch.

    Returns:
        int32 ``(B, T, H_kv, n)``: indices in the sequence, ascending, -1 at the end of the row
        where fewer exist.
    """
    config, rule = plan.config, Rule.of(plan.config)
    (batch, length, num_heads, head_dim), num_kv_heads = q.shape, k_cmp.shape[2]
    width, scale = plan.max_selection_blocks, config.softmax_scale(head_dim)
    chunk, tile_tokens = chunk_tokens(batch, length, num_heads, num_kv_heads, head_dim, width)
    tiles = plan.token_tiles(tile_tokens, chunk)
    own, candidates = plan.token_candidates
    first = torch.zeros_like(own)
    shape = (batch, length, num_kv_heads, config.num_selected_blocks)
    taken = torch.empty(shape, dtype=torch.int32, device=q.device)
    scratch = torch.empty(
        batch * num_kv_heads * chunk * width, dtype=accumulation_dtype(q.dtype), device=q.device
    )
    for index, start in enumerate(range(0, length, chunk)):
        shape = (batch, num_kv_heads, min(chunk, length - start), width)
        scores = scratch[: shape[0] * shape[1] * shape[2] * width].view(shape)
        kernel_calls.importance_scores(q, k_cmp, lse, tiles, index, scores, scale, rule)
        kernel_calls.top_blocks(
            scores,
            first,
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


def chunk_tokens(
    batch: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int, width: int
) -> tuple[int, int]:
    """Tokens of an entry of the batch that are scored at a time, and of a tile: whole tiles.

    A tile that lies in two chunks is computed twice.
    """
    tile_tokens = choose_shape(head_dim, num_heads // num_kv_heads).tile_tokens
    fitting = SCORE_ELEMENTS // (batch * num_kv_heads * width * tile_tokens)
    return min(max(1, fitting), -(-length // tile_tokens)) * tile_tokens, tile_tokens
