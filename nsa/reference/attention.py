"""The three attention branches (paper section 3.3), in chunks of queries with recomputation."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import Geometry, Segments
from nsa.precision import accumulation_dtype
from nsa.reference.chunks import (
    CHUNK_ELEMENTS,
    covered_range,
    query_chunks,
    recomputed,
)
from nsa.reference.operands import round_gradient, round_operand


class KeyBlocks(NamedTuple):
    """How the keys of every sequence are cut into blocks that a list can name."""

    keys: Segments
    blocks: Segments
    size: int


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, groups: Tensor | None, geometry: Geometry
) -> Tensor:
    """Attention over the visible compressed tokens, or those of each tile's selected groups.

    Args:
        q: ``(T, H, D)``.
        k_cmp, v_cmp: ``(sum of N_cmp, H_kv, D)`` and ``(sum of N_cmp, H_kv, Dv)``.
        groups: ``(tiles, H, m)`` group indices with -1 in empty slots, or None for all.
        geometry: the sequences of the ``T`` tokens.

    Returns:
        ``(T, H, Dv)`` in the dtype of ``q``; 0 for a query that sees no compressed token.
    """
    first, end = geometry.compressed_interval()
    if groups is None:
        return _interval_attention(q, k_cmp, v_cmp, first, end, geometry)
    table = KeyBlocks(geometry.compressed, geometry.groups, geometry.config.cmp_group_size)
    return _tile_attention(q, k_cmp, v_cmp, groups, table, end, geometry)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: Geometry
) -> Tensor:
    """Attention over the tokens of the selected blocks.

    Args:
        q: ``(T, H, D)``.
        k, v: ``(T, H_kv, D)`` and ``(T, H_kv, Dv)``.
        block_indices: ``(T, H_kv, n)`` in token mode, ``(tiles, H, n)`` in tile mode; indices of
            blocks in their sequence, -1 in empty slots at the end.
        geometry: the sequences of the ``T`` tokens.

    Returns:
        ``(T, H, Dv)`` in the dtype of ``q``.
    """
    _, end = geometry.token_interval()
    table = KeyBlocks(geometry.tokens, geometry.selection, geometry.config.select_block_size)
    attend = _token_attention if geometry.config.selection == "token" else _tile_attention
    return attend(q, k, v, block_indices, table, end, geometry)


def window_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Attention over the ``window_size`` last keys, the query's own included.

    Shapes as in :func:`selected_attention`.
    """
    first, end = geometry.window_interval()
    return _interval_attention(q, k, v, first, end, geometry)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """``softmax(scale * q k^T) v`` over keys where ``mask``; a row with no key gives 0.

    ``dtype`` is that of the operands of products; ``q``, ``k`` and ``v`` may be wider.
    """
    products = round_gradient(q @ k.transpose(-1, -2), dtype)
    scores = (products * scale).masked_fill(~mask, -torch.inf)
    if scores.shape[-1]:
        # A finite floor keeps -inf - top = -inf where a row has no key.
        top = scores.detach().amax(dim=-1, keepdim=True)
        scores = scores - top.clamp(min=torch.finfo(scores.dtype).min)
    weights = scores.exp()
    total = weights.sum(dim=-1, keepdim=True)
    probability = weights / torch.where(total > 0, total, 1)
    return round_operand(probability, dtype) @ v


def _interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, geometry: Geometry
) -> Tensor:
    """Attention of token ``t`` over the flat keys ``[first[t], end[t])``."""
    scale = geometry.config.softmax_scale(q.shape[-1])
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (T, H_kv, G, D)
    keys, values = k.to(dtype), v.to(dtype)

    def attend(grouped, keys, values, start, stop):
        low, high = covered_range(first, end, start, stop)
        rows = grouped[start:stop].transpose(0, 1)  # (H_kv, C, G, D)
        index = torch.arange(low, high, device=q.device)
        mask = (index >= first[start:stop, None]) & (index < end[start:stop, None])  # (C, K)
        out = _masked_attention(
            rows.flatten(1, 2),
            keys[low:high].transpose(0, 1),
            values[low:high].transpose(0, 1),
            mask.repeat_interleave(rows.shape[2], dim=0),
            scale,
            q.dtype,
        )
        return out.unflatten(1, rows.shape[1:3]).transpose(0, 1)  # (C, H_kv, G, Dv)

    chunks = query_chunks(first, end, q.shape[1])
    out = [recomputed(attend, grouped, keys, values, *chunk) for chunk in chunks]
    return torch.cat(out).flatten(1, 2).to(q.dtype)


def _token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    table: KeyBlocks,
    end: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Attention of each token and KV head over its own blocks; the group's heads are the rows."""
    rows = q.to(accumulation_dtype(q.dtype)).unflatten(1, (k.shape[1], -1))  # (T, H_kv, G, D)
    row_end = end[:, None].expand(-1, rows.shape[2])
    scale = geometry.config.softmax_scale(q.shape[-1])
    out = _listed_attention(rows, row_end, k, v, indices, table, geometry.tokens.owner, scale)
    return out.flatten(1, 2).to(q.dtype)


def _tile_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    table: KeyBlocks,
    end: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Attention of each tile and query head over its own blocks; the tile's tokens are the rows."""
    tiles, tokens = geometry.tiles, geometry.tokens
    height = min(geometry.config.q_tile_size, max(tokens.counts, default=0))
    position = geometry.tile_first[:, None] + torch.arange(height, device=q.device)
    real = position <= geometry.tile_last[:, None]  # (tiles, R)
    token = torch.where(real, tokens.offset[tiles.owner, None] + position, 0)
    rows = q.to(accumulation_dtype(q.dtype)).index_select(0, token.flatten())
    rows = rows.unflatten(0, token.shape).transpose(1, 2)  # (tiles, H, R, D)
    row_end = torch.where(real, end[token], 0)
    scale = geometry.config.softmax_scale(q.shape[-1])
    out = _listed_attention(rows, row_end, k, v, indices, table, tiles.owner, scale)
    return out.transpose(1, 2)[real].to(q.dtype)  # tiles lie in token order


def _listed_attention(
    rows: Tensor,
    row_end: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    table: KeyBlocks,
    owner: Tensor,
    scale: float,
) -> Tensor:
    """Attention of every unit (token or tile) over the keys of its listed blocks.

    Args:
        rows: queries ``(U, L, R, D)``; list ``i`` of ``L`` attends KV head ``i * H_kv // L``.
        row_end: flat key that ends what a row sees, ``(U, R)``.
        k, v: ``(T, H_kv, D)`` and ``(T, H_kv, Dv)``.
        indices: blocks ``(U, L, n)`` in their sequence, -1 in empty slots at the end.
        owner: each unit's sequence ``(U,)``, ascending.

    Returns:
        ``(U, L, R, Dv)``.
    """
    num_units, num_lists, num_rows, dim = rows.shape
    num_kv_heads, value_dim = v.shape[1:]
    keys = k.to(rows.dtype).flatten(0, 1)  # one row a key and KV head
    values = v.to(rows.dtype).flatten(0, 1)
    kv_head = torch.arange(num_lists, device=rows.device) * num_kv_heads // num_lists
    within = torch.arange(table.size, device=rows.device)

    def attend(rows, keys, values, start, stop):
        sequences = owner[start:stop]
        counts = table.blocks.counts[sequences[0] : sequences[-1] + 1] if stop > start else [0]
        width = min(indices.shape[-1], max(counts))  # slots beyond are empty
        block = indices[start:stop, :, :width, None].long()
        local = (block * table.size + within).flatten(2)  # (C, L, K)
        sequence = sequences[:, None, None]
        real = (local >= 0) & (local < table.keys.count[sequence])
        flat = torch.where(real, table.keys.offset[sequence] + local, 0)
        seen = flat[:, :, None] < row_end[start:stop, None, :, None]  # (C, L, R, K)
        index = flat * num_kv_heads + kv_head[:, None]
        gathered_k = keys.index_select(0, index.flatten()).unflatten(0, index.shape)
        gathered_v = values.index_select(0, index.flatten()).unflatten(0, index.shape)
        mask = real[:, :, None] & seen
        return _masked_attention(rows[start:stop], gathered_k, gathered_v, mask, scale, k.dtype)

    width = min(indices.shape[-1], max(table.blocks.counts, default=0)) * table.size
    per_unit = num_lists * width * (dim + value_dim + num_rows)
    step = max(1, CHUNK_ELEMENTS // max(1, per_unit))
    starts = range(0, max(1, num_units), step)
    chunks = [(start, min(start + step, num_units)) for start in starts]
    return torch.cat([recomputed(attend, rows, keys, values, *chunk) for chunk in chunks])
