"""Sequences of a cache that continue from others, as beams do."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nsa.cache.state import Cache

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def reorder(cache: "Cache", index: Tensor, host: Pair | None) -> Pair | None:
    """What :meth:`nsa.Cache.reorder` does.

    Args:
        index: int64 ``(B,)``.
        host: lengths and floors on the host, if it knows them.

    Returns:
        These after the call, if the host knows them.
    """
    page_size = cache.layout.page_size
    _share_pages(cache, index)
    rings = (*(cache.window_rings or ()), *(cache.open_rings or ()))
    lists = (x for x in (cache.block_lists, cache.group_lists) if x is not None)
    for x in (*rings, *lists):
        x.copy_(x[index])
    if host is not None:
        if index.device.type == "cpu":
            host = _reordered(*host, index, page_size)
        elif all(bool((x == x[0]).all()) for x in host):
            # Sequences of one length, such as beams, have it in any order.
            same = torch.arange(cache.batch_size, device="cpu")
            host = _reordered(*host, same, page_size)
        else:
            host = None
    lengths, floors = _reordered(cache.lengths, cache.floors, index, page_size)
    cache.lengths.copy_(lengths)
    cache.floors.copy_(floors)
    return host


def _reordered(lengths: Tensor, floors: Tensor, index: Tensor, page_size: int) -> Pair:
    """Lengths and floors after sequences share full pages, which stay shared."""
    lengths = lengths[index]
    return lengths, torch.maximum(floors[index], lengths // page_size * page_size)


def _share_pages(cache: "Cache", index: Tensor):
    """Share full pages, and give each sequence pages of its own from its open page on."""
    former = cache.page_table[index].long()
    full = cache.lengths[index].long() // cache.layout.page_size
    table = _shared_table(former, full, cache.k_pages.shape[0])
    cache.page_table.copy_(table)
    at = full.clamp(max=cache.layout.max_pages - 1)[:, None]
    source, target = former.gather(1, at)[:, 0], table.gather(1, at)[:, 0]
    for pool in (cache.k_pages, cache.v_pages, cache.k_cmp_pages, cache.v_cmp_pages):
        # Read all before the first write. A sequence of full pages copies one onto itself.
        pool[target] = pool[source]


def _shared_table(former: Tensor, full: Tensor, num_pages: int) -> Tensor:
    """A page table that keeps some pages and has pages of its own for the rest.

    There are enough pages: a pool has as many as the table has entries.

    Args:
        former: int64 ``(B, max_pages)``, the pages that each sequence may keep.
        full: int64 ``(B,)``; a sequence keeps its first ``full`` pages.
        num_pages: pages of the pool, ``B * max_pages``.
    """
    kept = torch.arange(former.shape[1], device=former.device) < full[:, None]
    used = torch.zeros(num_pages, dtype=torch.int32, device=former.device)
    used.scatter_reduce_(0, former.flatten(), kept.flatten().int(), reduce="amax")
    free = used.argsort(stable=True)  # pages that no sequence keeps come first
    rank = (~kept).flatten().cumsum(0) - 1
    return torch.where(kept, former, free[rank.clamp(min=0)].view_as(former))
