"""Block lists as the sparse kernels read them, and their transpose for the backward.

For each head and query tile, a list names key blocks in ascending order. All keys lie in one row
(see :class:`nsa.fused.row_layouts.AlignedRows`).
"""

import torch
from torch import Tensor

from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import BlockLists
from nsa.fused.plan import Plan
from nsa.fused.sizes import Sizes
from nsa.host import is_capturing

BOUNDED_BYTES = 256 << 20
"""The most bytes for which a transposed list gets the largest width that it can need."""


def selected_lists(block_indices: Tensor, plan: Plan) -> BlockLists:
    """Lists of the selected branch, from ``block_indices (B, tiles, H, n)`` of each sequence.

    Key blocks that start past the end of the sequence are left out. Where rows of queries have
    limits of their own, a key block is full if the first query of the tile sees all of it.
    """
    config, key_block = plan.config, plan.key_block
    lists = kernel_calls.list_key_blocks(
        block_indices,
        *plan.tile_key_blocks,
        config.select_block_size // key_block,
        plan.keys.rows // key_block,
    )
    return BlockLists(*lists, config.q_tile_size, key_block)


def compressed_lists(groups: Tensor, plan: Plan) -> BlockLists:
    """Lists of the sparse compressed branch, from ``groups (B, tiles, H, m)`` of each sequence.

    A key block is full if the first query of the tile sees all of it.
    """
    config, key_block = plan.config, plan.cmp_key_block
    lists = kernel_calls.list_key_blocks(
        groups,
        *plan.tile_cmp_key_blocks,
        config.cmp_group_size // key_block,
        plan.compressed.rows // key_block,
    )
    return BlockLists(*lists, config.q_tile_size, key_block)


def goes_by_query(key_block: int, head_dim: int) -> bool:
    """Whether backward uses our own kernel, which goes by query tile and needs no transpose.

    FA4's backward goes by key block. Up to 128 channels it has no key blocks of 64 keys.
    """
    return key_block == 64 and head_dim <= 128


def split_key_blocks(lists: BlockLists) -> BlockLists:
    """The same lists in key blocks of 64 keys."""
    parts = lists.key_block // 64
    if parts == 1:
        return lists
    part = torch.arange(parts, dtype=torch.int32, device=lists.partial_index.device)
    full_count, full_index = lists.full_count, lists.full_index
    if full_count is not None and full_index is not None:
        full_count, full_index = full_count * parts, _split(full_index, part)
    return BlockLists(
        lists.partial_count * parts,
        _split(lists.partial_index, part),
        full_count,
        full_index,
        lists.query_block,
        64,
    )


def _split(index: Tensor, part: Tensor) -> Tensor:
    return (index[..., None] * len(part) + part).flatten(-2)


def transpose_lists(lists: BlockLists, num_keys: int) -> BlockLists:
    """For each key block, the query tiles that attend it, in ascending order.

    The new index is ``(1, H, num_keys / key_block, width)``. ``width`` is the number of query tiles
    if the index then takes at most ``BOUNDED_BYTES``, or while a CUDA graph is captured. Otherwise
    it is the longest list, which is counted first and read on the host. If every tile attends one
    block, that is also the number of query tiles.
    """
    num_blocks = num_keys // lists.key_block
    given = [(lists.partial_count, lists.partial_index)]
    if lists.full_count is not None and lists.full_index is not None:
        given.append((lists.full_count, lists.full_index))
    transposed = [
        kernel_calls.list_query_tiles(*pair, num_blocks, max(1, width))
        for pair, width in zip(given, _widths(given, num_blocks), strict=True)
    ]
    full_count, full_index = transposed[1] if len(given) == 2 else (None, None)
    return BlockLists(*transposed[0], full_count, full_index, lists.query_block, lists.key_block)


def _widths(lists: list[tuple[Tensor, Tensor]], num_blocks: int) -> list[int]:
    """For each ``(count, index)``, an upper bound on the lists of its transpose."""
    count = lists[0][0]
    num_tiles = count.shape[-1]
    bounded = count.numel() * num_blocks * count.element_size() <= BOUNDED_BYTES
    if bounded or is_capturing(count):
        return [num_tiles] * len(lists)
    longest = [kernel_calls.count_query_tiles(*pair, num_blocks).amax() for pair in lists]
    return torch.stack(longest).tolist()


def list_bytes(sizes: Sizes) -> int:
    """Bytes of the lists of the forward. Token mode has none."""
    if sizes.token_mode:
        return 0
    # A second list has the full blocks.
    return sizes.indices if sizes.ends_align else 2 * sizes.indices
