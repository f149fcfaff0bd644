"""Block lists in the form that the sparse kernels read, and their transpose for the backward.

A list names, for each head and query tile, key blocks of one row of keys (see
:class:`nsa.fused.layout.AlignedRows`) in ascending order.
"""

import torch
from torch import Tensor

from nsa.fused.layout import AlignedRows, Plan
from nsa.fused.seam import BlockLists


def selected_lists(block_indices: Tensor, plan: Plan) -> BlockLists:
    """Lists of the selected branch from ``block_indices (B, tiles, H, n)`` of each sequence."""
    block, _, real = _key_blocks(
        block_indices, plan.config.select_block_size, plan.key_block, plan.tokens, plan
    )
    # The blocks that exist come first, so the entries to drop are at the end.
    return BlockLists(
        partial_count=_per_head(real.sum(-1)),
        partial_index=_per_head(block),
        full_count=None,
        full_index=None,
        query_block=plan.config.q_tile_size,
        key_block=plan.key_block,
    )


def compressed_lists(groups: Tensor, plan: Plan) -> BlockLists:
    """Lists of the sparse compressed branch from ``groups (B, tiles, H, m)`` of each sequence.

    Blocks that the first query of a tile sees whole are full; they come first in each list.
    """
    geometry, key_block = plan.geometry, plan.cmp_key_block
    block, local, real = _key_blocks(
        groups, plan.config.cmp_group_size, key_block, plan.compressed, plan
    )
    visibility = plan.config.compressed_visibility
    seen = geometry.num_visible(geometry.tile_first, geometry.tiles.owner, visibility)
    full = (real & ((local + 1) * key_block <= seen[:, None, None])).sum(-1)
    # Entries past the full ones, moved to the front.
    slot = torch.arange(block.shape[-1], device=block.device) + full[..., None]
    partial = block.gather(-1, slot.clamp(max=block.shape[-1] - 1))
    return BlockLists(
        partial_count=_per_head(real.sum(-1) - full),
        partial_index=_per_head(partial),
        full_count=_per_head(full),
        full_index=_per_head(block),
        query_block=plan.config.q_tile_size,
        key_block=key_block,
    )


def transpose_lists(lists: BlockLists, num_keys: int) -> BlockLists:
    """For each key block the query tiles that attend it, in time and space of the entries.

    The result's last dimension is the longest list, whose length is read on the host.
    """
    num_blocks = num_keys // lists.key_block
    partial = _transpose(lists.partial_count, lists.partial_index, num_blocks)
    full = (None, None)
    if lists.full_count is not None:
        full = _transpose(lists.full_count, lists.full_index, num_blocks)
    return BlockLists(*partial, *full, lists.query_block, lists.key_block)


def _key_blocks(
    indices: Tensor, block_size: int, key_block: int, keys: AlignedRows, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each listed block into key blocks: in the row, in their sequence, and whether they are.

    Each ``(B, tiles, H, n * parts)``. Parts that start past the end of the sequence are dropped.
    """
    parts = block_size // key_block
    part = torch.arange(parts, device=indices.device)
    tiles = plan.geometry.tiles
    local = indices[..., None].long() * parts + part  # (B, tiles, H, n, parts)
    count = -(-keys.items.count[tiles.owner] // key_block)
    real = (indices[..., None] >= 0) & (local < count[:, None, None, None])
    real &= tiles.real[:, None, None, None]
    block = local + (keys.segments.offset[tiles.owner] // key_block)[:, None, None, None]
    batch = torch.arange(len(indices), device=indices.device) * (keys.rows // key_block)
    block = torch.where(real, block + batch.view(-1, 1, 1, 1, 1), 0)
    # At most all blocks of the row are listed, and the kernels take no longer lists.
    width = keys.rows * block.shape[0] // key_block
    block, local, real = (x.flatten(-2)[..., :width] for x in (block, local, real))
    return block, local, real


def _per_head(x: Tensor) -> Tensor:
    """``(B, tiles, H, ...)`` to int32 ``(1, H, B * tiles, ...)``."""
    return x.int().flatten(0, 1).transpose(0, 1).contiguous()[None]


def _transpose(count: Tensor, index: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Counting sort of the entries by key block; query tiles stay in ascending order."""
    num_heads, _, width = index.shape[1:]
    entry = torch.arange(width, device=index.device)
    real = entry < count[0, :, :, None]
    # Entries that do not exist go to one block past the last.
    block = torch.where(real, index[0], num_blocks).flatten(1)  # (H, tiles * width)
    block, order = block.sort(dim=1, stable=True)
    block = block.long()
    counts = index.new_zeros(num_heads, num_blocks + 1)
    counts.scatter_add_(1, block, torch.ones_like(block, dtype=counts.dtype))
    start = counts.cumsum(1) - counts
    rank = torch.arange(block.shape[1], device=index.device) - start.gather(1, block)
    counts = counts[:, :num_blocks].contiguous()
    longest = max(1, int(counts.max())) if counts.numel() else 1
    # One spare row takes the entries that do not exist.
    lists = index.new_zeros(num_heads, num_blocks + 1, longest)
    head = torch.arange(num_heads, device=index.device)[:, None].expand_as(block)
    lists[head, block, rank.clamp(max=longest - 1)] = (order // width).int()
    return counts[None], lists[None, :, :num_blocks].contiguous()
