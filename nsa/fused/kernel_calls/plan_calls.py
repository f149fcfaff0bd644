"""Index tensors that follow from boundaries and block lists."""

from torch import Tensor

from nsa.fused import kernels
from nsa.fused.plan_tables import TableRule, Tables
from nsa.host import launches_of_plan


def sequence_bounds(cu_seqlens: Tensor, cu_seqlens_k: Tensor, rule: TableRule) -> Tensor:
    """Where the items of each packed sequence start, then where the last end, for several kinds.

    Args:
        cu_seqlens, cu_seqlens_k: int32 ``(S + 1,)``, boundaries of queries and of keys. Each
            sequence has at most as many queries as keys. Neither is checked.
        rule: what items there are.

    Returns:
        int32 ``(7, S + 1)``: a row for each of :data:`nsa.fused.plan_tables.BOUNDS`.
    """
    given = locals()
    with launches_of_plan():
        return kernels.load("sequence_tables").sequence_bounds(**given)


def plan_tables(
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, bounds: Tensor, rule: TableRule, means: bool
) -> Tables:
    """The tables of :func:`nsa.fused.plan_tables.table_shapes`.

    Args:
        cu_seqlens, cu_seqlens_k: see :func:`sequence_bounds`.
        bounds: its result.
        rule: what the tables depend on.
        means: whether the tables for means of blocks are wanted, or all others.
    """
    given = locals()
    with launches_of_plan():
        return kernels.load("sequence_tables").plan_tables(**given)


def list_key_blocks(
    indices: Tensor,
    first: Tensor,
    num_blocks: Tensor,
    num_full: Tensor | None,
    parts: int,
    entry_blocks: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Cut each listed block into key blocks of the row, and drop those past its sequence.

    Args:
        indices: int32 ``(B, tiles, H, n)``, blocks in the tile's sequence; negative ones are
            dropped. Copied if it is not contiguous.
        first: int32 ``(tiles,)``, where the key blocks of the tile's sequence start in the row of
            an entry of the batch.
        num_blocks: int32 ``(tiles,)``, how many there are; 0 for a tile of no sequence.
        num_full: int32 ``(tiles,)`` or None, how many of them, from the first, are full.
        parts: key blocks in a block.
        entry_blocks: key blocks in the row of an entry of the batch.

    Returns:
        partial_count: int32 ``(1, H, B * tiles)``; full blocks are in the other list.
        partial_index: int32 ``(1, H, B * tiles, width)``, in the order of ``indices``, with ``width
            = min(n * parts, B * entry_blocks)``: the most that can be listed. Entries past the
            count are not written.
        full_count: like ``partial_count``; None without ``num_full``.
        full_index: like ``partial_index``; None without ``num_full``.
    """
    return kernels.load("key_block_lists").list_key_blocks(**locals())


def count_query_tiles(count: Tensor, index: Tensor, num_blocks: int) -> Tensor:
    """Only the counts of :func:`list_query_tiles`: int32 ``(1, H, num_blocks)``."""
    return kernels.load("key_block_lists").count_query_tiles(**locals())


def list_query_tiles(
    count: Tensor, index: Tensor, num_blocks: int, width: int
) -> tuple[Tensor, Tensor]:
    """Transpose lists of key blocks into lists of query tiles; the same bits each time.

    Args:
        count: int32 ``(1, H, tiles)``.
        index: int32 ``(1, H, tiles, W)``, key blocks below ``num_blocks`` in any order, that do not
            repeat in a list. Entries past the count are ignored.
        num_blocks: key blocks.
        width: at least the longest of the new lists. Not checked.

    Returns:
        count: int32 ``(1, H, num_blocks)``.
        index: int32 ``(1, H, num_blocks, width)``, query tiles in ascending order. Entries past
            the count are not written.
    """
    return kernels.load("key_block_lists").list_query_tiles(**locals())
