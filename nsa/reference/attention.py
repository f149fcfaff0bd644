"""The three attention branches (paper section 3.3), in chunks of queries with recomputation."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.geometry import Geometry
from nsa.precision import accumulation_dtype
from nsa.reference.chunks import covered_range, fitting_chunks, query_chunks, recomputed
from nsa.reference.operands import round_gradient, round_operand
from nsa.reference.products import inner_products, weighted_sum
from nsa.segments import Segments


class KeyBlocks(NamedTuple):
    """The keys of all sequences, and the blocks of ``size`` keys that a list can name."""

    keys: Segments
    blocks: Segments
    size: int


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, groups: Tensor | None, geometry: Geometry
) -> Tensor:
    """Attention over all visible compressed tokens, or those in each tile's selected groups.

    Args:
        q: ``(T, H, D)``.
        k_cmp, v_cmp: ``(sum of N_cmp, H_kv, D)`` and ``(sum of N_cmp, H_kv, Dv)``.
        groups: ``(tiles, H, m)`` group indices with -1 in empty slots, or None for all.
        geometry: where the ``T`` queries and the keys lie.

    Returns:
        ``(T, H, Dv)`` in the dtype of ``q``; 0 for a query that sees no compressed token.
    """
    first, end = geometry.compressed_interval()
    if groups is None:
        return _interval_attention(q, k_cmp, v_cmp, first, end, geometry)
    table = KeyBlocks(geometry.compressed, geometry.groups, geometry.config.cmp_group_size)
    out, _ = _listed_attention(q, k_cmp, v_cmp, groups, table, end, geometry)
    return out


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected blocks.

    Args:
        q: ``(T, H, D)``.
        k, v: ``(Tk, H_kv, D)`` and ``(Tk, H_kv, Dv)``.
        block_indices: ``(T, H_kv, n)`` in token mode, ``(tiles, H, n)`` in tile mode; indices of
            blocks in their sequence, -1 in empty slots at the end.
        geometry: where the ``T`` queries and the ``Tk`` keys lie.

    Returns:
        The output ``(T, H, Dv)`` in the dtype of ``q``, and the log-sum-exp of the scores in the
        dtype of sums, ``(T, H)``; 0 and -inf for a query that sees no key.
    """
    _, end = geometry.key_interval()
    table = KeyBlocks(geometry.keys, geometry.selection, geometry.config.select_block_size)
    return _listed_attention(q, k, v, block_indices, table, end, geometry)


def window_attention(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
    """Attention over the last ``window_size`` keys, the query's own included.

    Shapes as in :func:`selected_attention`, whose first result this is like.
    """
    first, end = geometry.window_interval()
    return _interval_attention(q, k, v, first, end, geometry)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` over the keys in ``mask``, and the log-sum-exp ``(...)``.

    A row with no key gives 0 and -inf. ``dtype`` is the dtype of matrix operands; ``q``, ``k`` and
    ``v`` may be wider.
    """
    products = round_gradient(inner_products(q, k, mask), dtype)
    scores = (products * scale).masked_fill(~mask, -torch.inf)
    top = scores.new_zeros(*scores.shape[:-1], 1)
    if scores.shape[-1]:
        # The floor is finite, so -inf - top stays -inf in a row with no key.
        top = scores.detach().amax(dim=-1, keepdim=True)
        top = top.clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - top).exp()
    total = weights.sum(dim=-1, keepdim=True)
    # No gradient passes through a row with no key.
    divisor = torch.where(total == 0, 1, total)
    lse = torch.where(total == 0, -torch.inf, top + divisor.log()).squeeze(-1)
    # A row with NaN must be NaN only at its own keys.
    probability = (weights / divisor).masked_fill(~mask, 0)
    return weighted_sum(round_operand(probability, dtype), v, mask), lse


def _interval_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, end: Tensor, geometry: Geometry
) -> Tensor:
    """Attention of query ``i`` over the flat keys ``[first[i], end[i])``."""
    scale = geometry.config.softmax_scale(q.shape[-1])
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (T, H_kv, G, D)
    keys, values = k.to(dtype), v.to(dtype)

    def attend(piece, keys, values, start, stop):
        low, high = covered_range(first, end, start, stop)
        rows = piece.transpose(0, 1)  # (H_kv, C, G, D)
        index = torch.arange(low, high, device=q.device)
        mask = (index >= first[start:stop, None]) & (index < end[start:stop, None])  # (C, K)
        out, _ = _masked_attention(
            rows.flatten(1, 2),
            keys[low:high].transpose(0, 1),
            values[low:high].transpose(0, 1),
            mask.repeat_interleave(rows.shape[2], dim=0),
            scale,
            q.dtype,
        )
        return out.unflatten(1, rows.shape[1:3]).transpose(0, 1)  # (C, H_kv, G, Dv)

    chunks = query_chunks(first, end, q.shape[1])
    # One split makes all pieces, so that the gradient is one concatenation.
    pieces = grouped.split([stop - start for start, stop in chunks])
    out = [
        recomputed(attend, piece, keys, values, *chunk)
        for piece, chunk in zip(pieces, chunks, strict=True)
    ]
    return torch.cat(out).flatten(1, 2).to(q.dtype)


def _listed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    table: KeyBlocks,
    end: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Attention of every unit (a query or a tile) over the keys of its listed blocks.

    The rows of a list are the heads of a group in token mode, the queries of a tile in tile mode.

    Args:
        indices: blocks ``(units, L, n)`` in their sequence, -1 in empty slots at the end; list
            ``i`` of ``L`` attends KV head ``i * H_kv // L``.
        end: the flat key after the last one that each query sees, ``(T,)``.

    Returns:
        The output and the log-sum-exp, as in :func:`selected_attention`.
    """
    scale = geometry.config.softmax_scale(q.shape[-1])
    dtype = accumulation_dtype(q.dtype)
    num_kv_heads = k.shape[1]
    keys, values = k.to(dtype).flatten(0, 1), v.to(dtype).flatten(0, 1)  # (Tk * H_kv, D)
    arrange = _token_rows if geometry.config.selection == "token" else _tile_rows

    def attend(piece, keys, values, start, stop):
        owner = geometry.unit_owner[start:stop]
        rows, query, restore = arrange(piece, num_kv_heads, start, stop, geometry)
        seen_end = torch.where(query >= 0, end[query.clamp(min=0)], 0)  # (C, R)
        local = _listed_keys(indices[start:stop], owner, table)  # (C, L, K)
        real = (local >= 0) & (local < table.keys.count[owner, None, None])
        flat = torch.where(real, table.keys.offset[owner, None, None] + local, 0)
        mask = real[:, :, None] & (flat[:, :, None] < seen_end[:, None, :, None])
        kv_head = torch.arange(flat.shape[1], device=q.device) * num_kv_heads // flat.shape[1]
        index = flat * num_kv_heads + kv_head[:, None]
        listed_keys, listed_values = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape) for x in (keys, values)
        )
        out, lse = _masked_attention(rows, listed_keys, listed_values, mask, scale, q.dtype)
        return restore(out), restore(lse)

    chunks = _unit_chunks(q, v, indices, table, geometry)
    pieces = q.to(dtype).split(_num_queries(chunks, geometry))
    results = [
        recomputed(attend, piece, keys, values, *chunk)
        for piece, chunk in zip(pieces, chunks, strict=True)
    ]
    out, lse = zip(*results, strict=True)
    return torch.cat(out).to(q.dtype), torch.cat(lse)


def _num_queries(chunks: list[tuple[int, int]], geometry: Geometry) -> list[int]:
    """Queries in each range of units. The ranges are consecutive and cover all units."""
    if geometry.config.selection == "token" or not geometry.tiles.total:
        return [stop - start for start, stop in chunks]
    start = torch.tensor([start for start, _ in chunks], device=geometry.device)
    bounds = [*geometry.tile_row[start].tolist(), geometry.queries.rows.total]
    return [stop - start for start, stop in pairwise(bounds)]


def _listed_keys(indices: Tensor, owner: Tensor, table: KeyBlocks) -> Tensor:
    """Position of each key of the listed blocks, negative in empty slots: ``(C, L, K)``."""
    counts = table.blocks.counts[owner.min() : owner.max() + 1] if len(owner) else [0]
    block = indices[..., : max(counts), None].long()  # slots beyond are empty
    # A block is no longer than its sequence.
    size = min(table.size, max(table.keys.counts, default=0))
    return (block * table.size + torch.arange(size, device=indices.device)).flatten(2)


def _token_rows(piece: Tensor, num_kv_heads: int, start: int, stop: int, geometry: Geometry):
    """Rows ``(C, H_kv, G, D)`` of queries, the query of each row ``(C, R)``, and the inverse."""
    rows = piece.unflatten(1, (num_kv_heads, -1))
    query = torch.arange(start, stop, device=piece.device)[:, None]
    return rows, query, lambda out: out.flatten(1, 2)


def _tile_rows(piece: Tensor, num_kv_heads: int, start: int, stop: int, geometry: Geometry):
    """Rows ``(C, H, R, D)`` of tiles, the query of each row (-1 for none), and the inverse."""
    first, last = geometry.tile_first[start:stop], geometry.tile_last[start:stop]
    height = int((last - first).max()) + 1 if stop > start else 0
    row = torch.arange(height, device=piece.device)
    real = row <= (last - first)[:, None]  # (C, R)
    begin = geometry.tile_row[start:stop]
    query = torch.where(real, begin[:, None] + row, -1)
    inside = (query - begin[:1]).clamp(min=0)
    rows = piece.index_select(0, inside.flatten()).unflatten(0, inside.shape).transpose(1, 2)
    return rows, query, lambda out: out.transpose(1, 2)[real]  # tiles lie in the order of queries


def _unit_chunks(
    q: Tensor, v: Tensor, indices: Tensor, table: KeyBlocks, geometry: Geometry
) -> list[tuple[int, int]]:
    """Ranges of units whose scores and gathered keys fit a chunk."""
    num_units, num_lists, num_blocks = indices.shape
    owner, segment = geometry.unit_owner.tolist(), geometry.units.owner.tolist()
    heads_of_list = q.shape[1] // num_lists

    def elements(start: int, stop: int) -> int:
        sequences = slice(min(owner[start:stop]), max(owner[start:stop]) + 1)
        size = min(table.size, max(table.keys.counts[sequences]))
        width = min(num_blocks, max(table.blocks.counts[sequences])) * size
        rows = heads_of_list
        if geometry.config.selection == "tile":
            segments = slice(segment[start], segment[stop - 1] + 1)
            rows = max(geometry.queries.rows.counts[segments])
            rows = min(geometry.config.q_tile_size, rows)
        return (stop - start) * num_lists * width * (q.shape[-1] + v.shape[-1] + rows)

    return fitting_chunks(num_units, elements, q.device)
