"""The order in which kernels add gradients of keys, for the same bits each time.

Without it CTAs add as they come, in float32, and the last bits differ from run to run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.fused.kernel_inputs import BlockLists
from nsa.fused.token_inputs import TokenBlocks


def order_pairs(
    block_indices: Tensor, blocks: TokenBlocks, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The pairs of each block, sorted by token and then by slot.

    :mod:`nsa.fused.kernels.inverted_index` places pairs by atomic counters instead, so which pairs
    of a block are summed first differs from run to run.

    Args:
        block_indices: int32 ``(T, H_kv, slots)``.
        blocks: those of the tokens.
        chunk_tokens: tokens of a chunk.

    Returns:
        ``tokens`` and ``position`` of :class:`nsa.fused.kernels.inverted_index.InvertedIndex`.
    """
    total, kv_heads, slots = block_indices.shape
    num_blocks, device = len(blocks.first), block_indices.device
    chunks, unit_pairs = -(-total // chunk_tokens), chunk_tokens * slots
    base, limit = (x[:, None, None] for x in (blocks.base, blocks.limit))
    listed = (block_indices >= 0) & (block_indices < limit)
    token, kv_head = (torch.arange(n, device=device) for n in (total, kv_heads))
    unit = (token // chunk_tokens * kv_heads)[:, None] + kv_head
    # Pairs that are none come last in their unit.
    key = unit[..., None] * (num_blocks + 1) + torch.where(listed, base + block_indices, num_blocks)
    if chunks * kv_heads * (num_blocks + 1) < 1 << 31:
        key = key.int()
    order = key.flatten().sort(stable=True).indices
    # The last chunk may have fewer tokens than places.
    place = torch.arange(total * kv_heads * slots, device=device)
    before = (chunks - 1) * kv_heads * unit_pairs
    of_last = (total - (chunks - 1) * chunk_tokens) * slots
    past = place - before
    place = torch.where(past < 0, place, before + past // of_last * unit_pairs + past % of_last)
    position = torch.empty_like(place)
    position[order] = torch.where(listed.flatten()[order], place, -1)
    tokens = torch.zeros(chunks * kv_heads * unit_pairs, dtype=torch.int32, device=device)
    tokens[place] = (order // (kv_heads * slots)).int()
    return tokens, position.int().view(block_indices.shape)


class Turns(NamedTuple):
    """Which sums each entry of block lists is added to, and when.

    Each KV head has ``blocks`` sums, one for each key block. Many lists name the same popular
    blocks, such as the first one of a sequence. So ``shared`` blocks of each KV head have a sum for
    each query head instead, after all others, and fewer CTAs wait for each other. If there are few
    keys, all blocks have such sums, a query head's after those of the one before.

    Attributes:
        partial_slot: int32, like the index of the partial blocks: which of the sums. That of a key
            block is ``kv_head * blocks + block``, or ``head * blocks + block``.
        partial_turn: how many entries are added to these sums before.
        full_slot, full_turn: the same for full blocks; None if there are none.
        popular: ``(H_kv, shared)``, the blocks with sums for each query head; those of query head
            ``g`` of ``popular[kv_head, i]`` are
            ``H_kv * blocks + (kv_head * shared + i) * G + g``.
    """

    partial_slot: Tensor
    partial_turn: Tensor
    full_slot: Tensor | None
    full_turn: Tensor | None
    popular: Tensor


OWN_SUMS_BYTES = 1 << 30
"""Bytes of sums up to which each query head has its own sums of all key blocks. Heads then do not
wait for each other: 0.80 ms instead of 1.28 at 8K tokens of 32 heads, and 3.5 instead of 3.9 at
32K, of which adding the sums up takes 0.5."""


def has_own_sums(num_blocks: int, heads: int, head_dim: int) -> bool:
    """Whether query heads have their own sums of all key blocks, of 64 keys and as many values."""
    return 2 * 64 * 4 * num_blocks * heads * head_dim <= OWN_SUMS_BYTES


TOGETHER = 16
"""The least number of query heads that run at a time. Each has its own sums of popular blocks."""


def heads_together(num_heads: int, group: int) -> int:
    """Query heads whose tiles run at a time and take turns: whole KV heads, in a number that
    divides all heads."""
    sizes = range(group, num_heads + 1, group)
    return next(n for n in sizes if num_heads % n == 0 and (n >= TOGETHER or n == num_heads))


def num_popular(num_blocks: int, group: int) -> int:
    """How many blocks of a KV head have a sum for each query head. These add a quarter to the
    memory, more if there are few keys."""
    return 0 if group == 1 else min(num_blocks, max(1, num_blocks // (4 * group)))


def take_turns(
    lists: BlockLists, num_blocks: int, kv_heads: int, *, own_sums: bool = False
) -> Turns:
    """An order of the entries of ``lists`` of key blocks below ``num_blocks``, for each sum.

    If ``own_sums``, each query head has its own sums of all blocks, and ``popular`` names none.
    Entries are in the order in which their CTAs are launched: the first :func:`heads_together`
    heads, tile after tile, then the next heads.
    """
    device, heads = lists.partial_count.device, lists.partial_count.shape[1]
    group = heads // kv_heads
    index, valid = _entries(lists)
    head = torch.arange(heads, device=device)[:, None, None]
    owner, owners = (head, heads) if own_sums else (head // group, kv_heads)
    slot = torch.where(valid, owner * num_blocks + index, owners * num_blocks)
    shared = 0 if own_sums else num_popular(num_blocks, group)
    popular = torch.empty(kv_heads, 0, dtype=torch.int64, device=device)
    if shared:
        ends = torch.arange(kv_heads * num_blocks + 1, device=device)
        bounds = torch.searchsorted(slot.flatten().sort().values, ends)
        count = bounds.diff().view(kv_heads, num_blocks)
        # Stable, so that equal counts give the same blocks each time.
        popular = count.sort(descending=True, stable=True).indices[:, :shared]
        kv_head = torch.arange(kv_heads, device=device)[:, None]
        first = torch.full((kv_heads * num_blocks + 1,), -1, device=device)
        own = kv_heads * num_blocks + group * torch.arange(kv_heads * shared, device=device)
        first[(kv_head * num_blocks + popular).flatten()] = own
        first = first[slot]
        slot = torch.where(first >= 0, first + head % group, slot)
        slot.masked_fill_(~valid, kv_heads * num_blocks * (1 + group))
    turn = _ranks(slot, heads_together(heads, group))
    width = lists.partial_index.shape[-1]
    slots, turns = (
        (x[None, ..., :width].contiguous(), x[None, ..., width:].contiguous())
        for x in (slot.int(), turn.int())
    )
    if lists.full_count is None:
        return Turns(slots[0], turns[0], None, None, popular)
    return Turns(slots[0], turns[0], slots[1], turns[1], popular)


def _entries(lists: BlockLists) -> tuple[Tensor, Tensor]:
    """The entries of both lists, ``(H, tiles, sum of widths)``, and which of them count."""
    pairs = [(lists.partial_count, lists.partial_index), (lists.full_count, lists.full_index)]
    index, valid = [], []
    for count, blocks in pairs:
        if count is not None and blocks is not None:
            index.append(blocks[0])
            valid.append(torch.arange(blocks.shape[-1], device=count.device) < count[0, ..., None])
    return torch.cat(index, -1), torch.cat(valid, -1)


def _ranks(slot: Tensor, together: int) -> Tensor:
    """How many entries of ``slot (H, tiles, width)`` with the same value come before each one."""
    heads, tiles, width = slot.shape
    launched = slot.view(-1, together, tiles, width).transpose(1, 2)
    ordered, order = launched.flatten().sort(stable=True)
    place = torch.arange(len(order), device=slot.device)
    rank = torch.empty_like(place)
    rank[order] = place - torch.searchsorted(ordered, ordered)
    return rank.view(-1, tiles, together, width).transpose(1, 2).reshape(heads, tiles, width)
