"""Which blocks each query attends (paper section 3.3.2). No gradient passes through here."""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from nsa.blocks import overlap_weights
from nsa.geometry import UNLIMITED, Geometry
from nsa.precision import accumulation_dtype
from nsa.reference.chunks import covered_range, query_chunks
from nsa.segments import Segments


@torch.no_grad()
def select_blocks(q: Tensor, k_cmp: Tensor, geometry: Geometry) -> Tensor:
    """Select blocks for each query and KV head (token mode) or each tile and head (tile mode).

    Args:
        q: ``(T, H, D)``.
        k_cmp: ``(sum of N_cmp, H_kv, D)``.
        geometry: where the ``T`` queries and the keys lie.

    Returns:
        int32 ``(T, H_kv, n)`` or ``(tiles, H, n)``: indices in the sequence, ascending, -1 at the
        end of the row if fewer exist. ``n`` is at most the blocks of the longest sequence.
    """
    if geometry.config.selection == "token":
        chunks = _token_block_scores(q, k_cmp, geometry)
    else:
        blocks = geometry.selection
        size = geometry.config.select_block_size // geometry.config.compress_block_size
        chunks = _tile_block_scores(q, k_cmp, blocks, size, geometry)
    position, owner = geometry.unit_position, geometry.unit_owner
    taken = []
    for start, stop, scores, low in chunks:
        found = _take_blocks(scores, position[start:stop], owner[start:stop], low, geometry)
        taken.append(found.transpose(0, 1))
    return torch.cat(taken)


@torch.no_grad()
def select_groups(q: Tensor, k_cmp: Tensor, geometry: Geometry) -> Tensor:
    """Select groups of compressed tokens for each tile and head (sparse compressed branch).

    Arguments as in :func:`select_blocks`.

    Returns:
        int32 ``(tiles, H, m)``, ascending, -1 at the end of the row if fewer exist. ``m`` is at
        most the groups of the longest sequence.
    """
    config, groups = geometry.config, geometry.groups
    count, wanted = max(groups.counts, default=0), config.num_cmp_selected_blocks
    if wanted is not None:
        count = min(count, wanted)
    taken = []
    for start, stop, scores, low in _tile_block_scores(
        q, k_cmp, groups, config.cmp_group_size, geometry
    ):
        best = _take_top(scores, count)
        offset = groups.offset[geometry.tile_owner[start:stop], None] - low
        taken.append(torch.where(best >= 0, best - offset, -1).int().transpose(0, 1))
    return torch.cat(taken)


def _token_block_scores(
    q: Tensor, k_cmp: Tensor, geometry: Geometry
) -> Iterator[tuple[int, int, Tensor, int]]:
    """Eq. 8 to 10: yield ``(start, stop, scores, low)`` for queries start to stop.

    ``scores`` is ``(H_kv, stop - start, blocks)`` of the flat selection blocks from ``low``.
    """
    scale = geometry.config.softmax_scale(q.shape[-1])
    dtype = accumulation_dtype(q.dtype)
    grouped = q.to(dtype).unflatten(1, (k_cmp.shape[1], -1))  # (T, H_kv, G, D)
    keys, first_equal = k_cmp.to(dtype), _first_equal_key(k_cmp, geometry.compressed)
    first, end = geometry.compressed_interval()
    owner = geometry.queries.owner
    for start, stop in _selection_chunks(first, end, owner, geometry.selection, q.shape[1]):
        low, high = covered_range(first, end, start, stop)
        rows = grouped[start:stop].transpose(0, 1)  # (H_kv, C, G, D)
        scores = scale * _dot_products(rows, keys, first_equal, low, high)  # (H_kv, C, G, K)
        index = torch.arange(low, high, device=q.device)
        seen = (index >= first[start:stop, None]) & (index < end[start:stop, None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        # A query that sees no compressed token has probability 0 everywhere.
        probability = torch.where(seen[:, None], scores.softmax(dim=-1), 0)
        # Add term by term, because Tensor.sum may round equal columns differently and break ties.
        probability = cast(Tensor, sum(probability.unbind(dim=2)))  # (H_kv, C, K)
        block_range = _block_range(owner[start:stop], geometry.selection)
        importance = _block_importance(probability, low, block_range, geometry)
        yield start, stop, importance, block_range.start


def _dot_products(
    rows: Tensor, keys: Tensor, first_equal: Tensor | None, low: int, high: int
) -> Tensor:
    """``rows . keys[low:high]``, with bitwise equal results for equal keys.

    ``rows`` is ``(H_kv, X, Y, D)`` and ``keys`` is ``(M, H_kv, D)``; returns
    ``(H_kv, X, Y, high - low)``.
    """
    products = rows.flatten(1, 2) @ keys[low:high].permute(1, 2, 0)
    if first_equal is not None:
        column = first_equal[:, None, low:high] - low
        products = products.gather(-1, column.expand_as(products))
    return products.unflatten(1, rows.shape[1:3])


def _first_equal_key(k_cmp: Tensor, compressed: Segments) -> Tensor | None:
    """For each compressed key, the first equal key of its sequence, ``(H_kv, M)``.

    A matrix product may round equal columns differently, which would break ties between repeated
    keys. Using one column for all of them avoids that. None if no key repeats.
    """
    index = torch.arange(k_cmp.shape[0], device=k_cmp.device)
    columns = []
    for head in range(k_cmp.shape[1] if len(index) else 0):
        # Compare bits, which also order NaN. Adding 0 turns -0 into 0.
        bits = (k_cmp[:, head].double() + 0.0).view(torch.int64)
        tagged = torch.cat([compressed.owner[:, None], bits], dim=1)
        _, group = tagged.unique(dim=0, return_inverse=True)
        first = torch.full_like(index, len(index)).scatter_reduce(0, group, index, reduce="amin")
        columns.append(first[group])
    if all((column == index).all() for column in columns):
        return None
    return torch.stack(columns)


def _block_importance(
    probability: Tensor, low: int, block_range: slice, geometry: Geometry
) -> Tensor:
    """Sum ``p[j] * |j ∩ J| / d`` over ``j`` for every flat selection block ``J`` of the range.

    ``probability`` is ``(..., K)`` of the flat compressed blocks from ``low``.
    """
    config = geometry.config
    per_select = config.select_block_size // config.compress_stride
    per_compress = config.compress_block_size // config.compress_stride
    outside = probability.shape[-1]
    padded = torch.nn.functional.pad(probability, (0, 1))  # the last slot reads 0
    owner = geometry.selection.owner[block_range]
    first = geometry.selection.local[block_range] * per_select - (per_compress - 1)
    count, offset = geometry.compressed.count[owner], geometry.compressed.offset[owner] - low
    importance = probability.new_zeros(*probability.shape[:-1], len(owner))
    # Add the terms in one order, so that equal probabilities give equal sums in every block.
    num_compressed = max(geometry.compressed.counts, default=0)
    for shift, weight in enumerate(overlap_weights(config, num_compressed)):
        local = first + shift
        slot = local + offset
        real = (local >= 0) & (local < count) & (slot >= 0) & (slot < outside)
        importance += weight * padded.index_select(-1, torch.where(real, slot, outside))
    return importance


def _tile_block_scores(
    q: Tensor, k_cmp: Tensor, blocks: Segments, size: int, geometry: Geometry
) -> Iterator[tuple[int, int, Tensor, int]]:
    """Yield ``(start, stop, scores, low)`` for tiles start to stop.

    ``scores`` is ``(H, stop - start, blocks)`` of the flat blocks of ``size`` compressed tokens
    from ``low``. A score is the largest ``scale * summary . k_cmp`` in the block, over compressed
    blocks complete by the tile's last query (``"first"``: its first query); -inf if there are none.
    """
    config, owner = geometry.config, geometry.tile_owner
    dtype = accumulation_dtype(q.dtype)
    summary = _tile_summary(q.to(dtype), geometry).unflatten(1, (k_cmp.shape[1], -1))
    keys, first_equal = k_cmp.to(dtype), _first_equal_key(k_cmp, geometry.compressed)
    scale = config.softmax_scale(q.shape[-1])
    position = geometry.tile_first if config.tile_summary == "first" else geometry.tile_last
    first = geometry.compressed.offset[owner]
    end = first + geometry.num_visible(position, owner, "complete")
    for start, stop in _selection_chunks(first, end, owner, blocks, q.shape[1]):
        low, high = covered_range(first, end, start, stop)
        rows = summary[start:stop].permute(1, 2, 0, 3)  # (H_kv, G, C, D)
        scores = scale * _dot_products(rows, keys, first_equal, low, high)
        flat = torch.arange(low, high, device=q.device)
        seen = (flat >= first[start:stop, None]) & (flat < end[start:stop, None])
        scores = scores.flatten(0, 1).masked_fill(~seen, -torch.inf)  # (H, C, K)
        block_range = _block_range(owner[start:stop], blocks)
        block = blocks.offset[geometry.compressed.owner[flat]] - block_range.start
        block = block + geometry.compressed.local[flat] // size
        width = block_range.stop - block_range.start
        best = scores.new_full((*scores.shape[:-1], width), -torch.inf)
        best = best.scatter_reduce(-1, block.expand_as(scores), scores, reduce="amax")
        yield start, stop, best, block_range.start


def _tile_summary(q: Tensor, geometry: Geometry) -> Tensor:
    """Mean of each tile's queries, or its first query: ``(tiles, H, D)``."""
    tiles = geometry.tiles
    if geometry.config.tile_summary == "first":
        return q.index_select(0, geometry.tile_row)
    size = geometry.tile_last - geometry.tile_first + 1
    tile = torch.arange(tiles.total, device=q.device)
    tile = torch.repeat_interleave(tile, size, output_size=q.shape[0])
    total = q.new_zeros(tiles.total, *q.shape[1:]).index_add_(0, tile, q)
    return total / size[:, None, None]


def _selection_chunks(
    first: Tensor, end: Tensor, owner: Tensor, blocks: Segments, num_heads: int
) -> list[tuple[int, int]]:
    """Chunks whose compressed scores and block scores fit the memory bound together."""
    return query_chunks(first + blocks.offset[owner], end + blocks.offset[owner + 1], num_heads)


def _block_range(owner: Tensor, blocks: Segments) -> slice:
    """The flat blocks of the sequences of all units, and of those between."""
    if not len(owner):
        return slice(0, 0)
    return slice(blocks.offsets[int(owner.min())], blocks.offsets[int(owner.max()) + 1])


def _take_blocks(
    scores: Tensor, position: Tensor, owner: Tensor, low: int, geometry: Geometry
) -> Tensor:
    """Forced blocks and the best candidates, ascending: int32 ``(heads, C, n)``.

    ``scores`` is ``(heads, C, blocks)`` of the flat selection blocks from ``low``. ``position`` and
    ``owner`` (a sequence of keys) are the units', ``(C,)`` each.
    """
    first, _ = geometry.candidate_interval(position, owner)
    blocks = low + torch.arange(scores.shape[-1], device=scores.device)
    candidate, forced = geometry.block_rules(position, owner, blocks)
    scores = scores.masked_fill(~candidate, -torch.inf).masked_fill(forced, torch.inf)
    config = geometry.config
    count = min(config.num_selected_blocks, max(geometry.selection.counts, default=0))
    # Forced blocks past the end of the sequence keep their slots.
    slots = geometry.num_forced_past_end(position, owner)
    slots = min(config.num_selected_blocks, UNLIMITED) - slots[:, None]
    taken = _take_top(scores, count, slots)
    return torch.where(taken >= 0, taken + low - first[:, None], -1).int()


def _take_top(scores: Tensor, count: int, slots: Tensor | None = None) -> Tensor:
    """Indices of the ``count`` best scores above -inf, ascending, then -1.

    ``slots``, which broadcasts to ``scores``, limits each row further. The sort is stable, so the
    lower index wins among equal scores.
    """
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    none = scores.shape[-1]
    taken = ranked.values > -torch.inf
    if slots is not None:
        taken &= torch.arange(none, device=scores.device) < slots
    best = torch.where(taken, ranked.indices, none)[..., :count]
    best = best.sort(dim=-1).values
    best = torch.where(best < none, best, -1)
    return torch.nn.functional.pad(best, (0, count - best.shape[-1]), value=-1)
