"""Scores of blocks, and the best ones."""

import torch
from torch import Tensor

from nsa.fused import kernels
from nsa.fused.token_inputs import Rule, TokenTiles


def importance_scores(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    tiles: TokenTiles,
    chunk: int,
    scores: Tensor,
    scale: float,
    rule: Rule,
) -> None:
    """Write Eq. 8 to 10 for the tokens of a chunk; their positions are in ``tiles``.

    ``p_h[j] = exp(scale * q_h . k_cmp[j] - lse_h)`` for the compressed tokens that the token sees.
    The score of a selection block is the sum, over the heads of the group and over ``j``, of
    ``p_h[j]`` times the overlap of ``j`` and the block. Equal keys score equally, bit for bit.

    Args:
        q: ``(B, T, H, D)``, bfloat16 or float16; ``D`` a multiple of 32 up to 256. A slice of heads
            is read where it is.
        k_cmp: ``(B, M, H_kv, D)``; ``H / H_kv`` up to 32.
        lse: float32 ``(B, H, T)``, natural logarithm. Not used for tokens that see no key.
        tiles: tiles of an entry of the batch, of ``choose_shape(D, G).tile_tokens`` tokens each.
        chunk: which chunk of ``tiles``.
        scores: float32 ``(B, H_kv, C, W)``, contiguous, for the ``C`` tokens of the chunk. Blocks
            that start at or before a token are written (not causal: all of its sequence).
        scale: positive.
        rule: the part of the configuration that the kernel needs.
    """
    kernels.load("importance").importance_scores(**locals())


def tile_scores(summary: Tensor, k_cmp: Tensor) -> Tensor:
    """``scores[b, h, c, j] = summary[b, c, h] . k_cmp[b, j, h // (H / H_kv)]``, exact to float32.

    Equal keys score equally, bit for bit. For few scores: products are of float64.

    Args:
        summary: ``(B, tiles, H, D)``, float32 or in the dtype of ``k_cmp``; D a multiple of 8.
            Strided tensors are read in place.
        k_cmp: ``(B, M, H_kv, D)``, bfloat16 or float16, likewise.

    Returns:
        float32 ``(B, H, tiles, M)``.
    """
    return kernels.load("tile_scores").tile_scores(**locals())


def top_blocks(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    out: Tensor,
    *,
    tile_offset: int,
    column_offset: int,
    scale: float,
    per_block: int,
    num_initial: int,
    num_local: int,
) -> None:
    """For ``C`` tiles and each head write the ``n`` best blocks of the tile's sequence to ``out``.

    Block ``J < candidates`` scores the largest ``scale * s[j]`` of the compressed tokens
    ``J * per_block <= j < (J + 1) * per_block``, ``j < visible``. Blocks ``J <= own`` with
    ``J < num_initial`` or ``J > own - num_local`` are taken; then the best of the others, equal
    scores going to the lower index. A block is not taken if each of its scores is -inf or NaN, or
    if it has none.

    Args:
        scores: float32 ``(B, H, C, W)``, contiguous; ``s[j]`` is in column
            ``first - column_offset + j``.
        first: the column of the first compressed token of each tile's sequence, int32 ``(tiles,)``,
            contiguous, as are the next three. Columns outside of ``scores`` count as not visible.
        visible: compressed tokens that are scored.
        candidates: blocks that may be taken, 0 for a tile of no sequence.
        own: the block of the tile's last query.
        out: int32 ``(B, tiles, H, n)``, contiguous, ``n`` up to 256, at least
            ``num_initial + num_local``. Tiles ``tile_offset`` to ``tile_offset + C - 1`` are
            written: indices in the sequence, ascending, -1 at the end if fewer exist.
        tile_offset: the tile of ``scores[:, :, 0]``.
        column_offset: the column of ``scores[..., 0]``.
        scale: positive.
        per_block: compressed tokens in a block.
        num_initial, num_local: first and last blocks that are always taken.
    """
    kernels.load("top_blocks").top_blocks(**locals())


def top_blocks_and_groups(
    scores: Tensor,
    first: Tensor,
    visible: Tensor,
    candidates: Tensor,
    own: Tensor,
    blocks: Tensor,
    groups: Tensor,
    *,
    tile_offset: int,
    column_offset: int,
    scale: float,
    per_block: int,
    per_group: int,
    num_initial: int,
    num_local: int,
) -> None:
    """:func:`top_blocks` twice, of scores that are read from memory once.

    Args:
        scores, first, visible, candidates, own, tile_offset, column_offset, scale: as there.
        blocks: written with ``per_block``, ``num_initial`` and ``num_local``.
        groups: written with ``per_group``, of the groups that have a score, none of them forced.
        per_block, per_group: compressed tokens in a block, and in a group.
        num_initial, num_local: first and last blocks that are always taken.
    """
    kernels.load("top_blocks").top_blocks_and_groups(**locals())


def float32_products(a: Tensor, b: Tensor) -> Tensor:
    """``a (X, R, K) @ b (X, K, W)`` of bfloat16, summed and returned in float32.

    This is not our kernel. It is here because PyTorch has this product only on a GPU.
    """
    return torch.bmm(a, b, out_dtype=torch.float32)
