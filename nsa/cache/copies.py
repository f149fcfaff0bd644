"""Copies of sequences of a cache into a cache of another size."""

import torch
from torch import Tensor

from nsa.cache.state import Cache


def copy_sequences(cache: Cache, index: Tensor, max_length: int) -> Cache:
    """A cache whose sequence ``i`` is a copy of sequence ``index[i]``, on pages of its own.

    Args:
        cache: has its own pages, and one ``k`` and ``v`` for all branches.
        index: int64 ``(B,)``, any number of sequences in any order, on any device.
        max_length: of the new cache, at least that of ``cache``; in tile mode a multiple of
            ``q_tile_size``, so that no open tile would list blocks that ``cache`` has no place for.
    """
    assert cache.owns_pages
    assert not cache.separate_kv
    source = index.to(cache.device)
    new = Cache(
        cache.config,
        len(index),
        max_length,
        cache.num_kv_heads,
        cache.head_dim,
        cache.value_head_dim,
        dtype=cache.dtype,
        device=cache.device,
        num_heads=cache.num_heads,
        page_size=cache.layout.page_size,
    )
    with torch.no_grad():
        pages = cache.page_table[source].long()
        for name in ("k_pages", "v_pages", "k_cmp_pages", "v_cmp_pages"):
            pool = getattr(new, name).unflatten(0, (len(index), -1))
            pool[:, : pages.shape[1]] = getattr(cache, name)[pages]
        for name in ("block_lists", "group_lists"):
            lists = getattr(cache, name)
            if lists is not None:
                getattr(new, name)[..., : lists.shape[-1]] = lists[source]
    new.take_lengths(cache, index)
    return new
