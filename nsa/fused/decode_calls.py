"""The kernels of decoding, in the order of a step. :mod:`nsa.fused.kernel_calls` has the others.

A step appends, attends compressed keys, and finishes: it selects, attends selected blocks and the
window, and adds the branches up. Grids and workspace follow from the shapes alone, never from
lengths; what depends on lengths is found out on the device, so a step can be captured in a CUDA
graph and replayed as lengths grow. :mod:`nsa.fused.decode_inputs` defines units, parts, slots and
records.

New tokens lie one sequence after another. ``cu_seqlens`` int32 ``(B + 1,)`` says where each
sequence starts; None if each has ``shape.tokens``. Page tables are int32 ``(B, max_pages)``.
"""

from torch import Tensor

from nsa.fused import kernels
from nsa.fused.decode_inputs import (
    DecodeRule,
    DecodeShape,
    Parts,
    Pool,
    Records,
    Schedule,
    TileLists,
    TileRule,
)


def decode_append(
    k: Tensor,
    v: Tensor,
    pool: Pool,
    compressed: Pool,
    table: Tensor,
    lengths: Tensor,
    overflowed: Tensor,
    max_length: int,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
) -> Schedule:
    """Write new tokens, and the means of the blocks that they complete, into the pages.

    A sequence ends before its first token at or past ``max_length`` or without a page in the table;
    then ``overflowed`` is set. ``lengths`` is only read; :func:`decode_finish` writes it.

    Args:
        k: ``(T, H_kv, D)``, bfloat16 or float16.
        v: ``(T, H_kv, Dv)``.
        pool: pages of tokens.
        compressed: pages of compressed blocks. Block ``j`` lies in the page of its last token
            ``e = j * d + l - 1``, at slot ``e % page_size // d``.
        lengths: int32 ``(B,)``.
        overflowed: bool ``()``.
    """
    return kernels.load("decode_append").decode_append(**locals())


def decode_compressed(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    scale: float,
    records: bool,
    lengths: Tensor | None,
    limit: int,
) -> tuple[Parts, Records | None]:
    """Attention over compressed keys, in parts; with ``records`` also what selection needs.

    Args:
        q: ``(T, H, D)``. A slice of heads is read where it is.
        pool: pages of compressed blocks.
        scale: positive.
        lengths: int32 ``(B,)``, if the kernel before this one is :func:`decode_append`, which reads
            them: this one then need not wait for it. ``schedule`` must be the one that it makes.
        limit: tokens for which a sequence has a place at most.

    Returns:
        Parts of ``shape.part_slots`` slots and ``shape.rows`` rows; parts that no CTA has, and rows
        of tokens that a sequence does not have, are not written. Records of the slots in the tiles
        of a sequence; the rest is not written.
    """
    return kernels.load("decode_compressed").decode_compressed(**locals())


def decode_tile_select(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: TileRule,
    scale: float,
    tile_size: int,
    lists: Tensor,
    count: int,
    limit: int,
    num_initial: int,
    num_local: int,
) -> None:
    """Tile mode: write the lists of the tiles that begin in the step, at most one of a sequence.

    A block scores the largest ``scale * q . k_cmp`` of its compressed blocks that are complete by
    the tile's first query, ``q`` being that query. Forced blocks are those up to the tile's end,
    also where the sequence does not reach it.

    Args:
        q: ``(T, H, D)``. A slice of heads is read where it is.
        pool: pages of compressed blocks; ``l = d``.
        scale: positive.
        tile_size: queries of a tile, at least the new tokens of a sequence.
        lists: int32 ``(B, tile_slots, H, width)``, contiguous; tile ``u`` is at slot
            ``u % tile_slots``. Ascending, -1 at the end.
        count: blocks that are taken, forced ones included, up to ``MAX_LISTED``.
        limit: forced blocks from this one on are taken, but not listed.
        num_initial, num_local: forced blocks.
    """
    kernels.load("decode_tile_select").decode_tile_select(**locals())


def decode_select(
    parts: Parts,
    records: Records,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor,
    num_initial: int,
    num_local: int,
) -> None:
    """Write the best blocks of each token and KV head to ``lists``: see :func:`decode_finish`."""
    kernels.load("decode_select").decode_select(**locals())


def decode_units(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    parts: Parts,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor,
    window: int,
    scale: float,
    gates: Tensor | None,
    weight: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    """:func:`decode_finish` with lists, for few tokens that attend much the same blocks.

    A CTA has all rows of a unit, so each block that any of its tokens selected is loaded once.
    :func:`nsa.fused.decode_inputs.can_unite` says for which sizes; blocks are of 64 or 128 tokens.
    """
    return kernels.load("decode_units").decode_units(**locals())


def decode_finish(
    q: Tensor,
    pool: Pool,
    rings: Pool | None,
    table: Tensor,
    parts: Parts,
    records: Records | None,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    shape: DecodeShape,
    rule: DecodeRule,
    lists: Tensor | TileLists,
    num_initial: int,
    num_local: int,
    window: int,
    scale: float,
    gates: Tensor | None,
    weight: Tensor | None,
    lengths: Tensor,
    floors: Tensor | None,
    cluster: int,
    of_tokens: bool,
) -> Tensor:
    """``g0 * o_cmp + g1 * o_slc + g2 * o_win``; sets ``lengths`` to ``ends``.

    With ``records``, first the best blocks of each token and KV head (Eq. 9 to 11) are written to
    ``lists``, else they are there. In tile mode ``floors`` rise to the first tile of which there is
    a list.

    Args:
        q: ``(T, H, D)``. A slice of heads is read where it is.
        pool: pages of tokens.
        rings: where the window has keys of its own: those of token ``p`` of sequence ``b`` are in
            page ``b`` at row ``p % rows``.
        parts, records: of :func:`decode_compressed`.
        lists: int32 ``(T, H_kv, n)``, contiguous, ascending, -1 in empty slots at the end; ``n`` up
            to ``MAX_LISTED``, and at least ``num_initial + num_local`` with ``records``. Keys after
            the token are left out. In tile mode the lists of tiles.
        num_initial, num_local: the first and last blocks up to the token's own that are always
            taken; used with ``records``.
        window: keys of the window, the token's own included.
        scale: positive.
        gates: ``(T, H, 3)`` or None.
        weight: ``(H, 3, D)`` or None: ``g_i = sigmoid(<q, weight[h, i]>)``. With neither gates nor
            weight each gate is 1/3.
        floors: int32 ``(B,)``, the shortest lengths that :meth:`nsa.Cache.truncate` can go back to;
            used in tile mode.
        cluster: CTAs of a list: 1, 2, 4 or 8.
        of_tokens: whether a cluster has a list of as many tokens instead, whose window its CTAs
            share; :func:`nsa.fused.decode_inputs.most_sharing` at most, and not in tile mode.

    Returns:
        ``(T, H, Dv)`` in the dtype of ``q``.
    """
    return kernels.load("decode_finish").decode_finish(**locals())


def decode_attend(
    q: Tensor,
    pool: Pool,
    table: Tensor,
    schedule: Schedule,
    cu_seqlens: Tensor | None,
    block_indices: Tensor,
    shape: DecodeShape,
    select_size: int,
    scale: float,
    splits: int,
) -> Parts:
    """Attention over selected blocks alone, in parts; no step of decoding needs it.

    Args:
        q: ``(T, H, D)``. A slice of heads is read where it is.
        pool: pages of tokens.
        schedule: of which only where sequences start and end.
        block_indices: int32 ``(T, H_kv, n)``, ascending, -1 in empty slots at the end; ``n`` up to
            ``MAX_LISTED``. Keys after the token are left out.
        select_size: tokens of a block, 32 or 64 or 128.
        scale: positive.
        splits: parts of a list.

    Returns:
        Parts of ``T * H_kv * splits`` slots: split ``s`` of a token and KV head is in slot
        ``(token * H_kv + kv_head) * splits + s``. The rows are the heads of the group. A part
        without keys has ``NO_REFERENCE`` and a total of 0, and its output is not written.
    """
    return kernels.load("decode_attend").decode_attend(**locals())
