"""All keys that the queries of a call attend: those in the cache, then the new ones, as one row.

It copies them, and the host reads the lengths. Kernels for decoding read the pages instead.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.cache.append import NewTokens, locate_new_tokens
from nsa.cache.places import CachePlaces, block_places, token_places, window_places
from nsa.cache.state import Cache, Pair
from nsa.segments import Segments, prefix_sum


class Context(NamedTuple):
    """Keys and values of the sequences that have new tokens; other sequences have none.

    Attributes:
        keys: the tokens of each sequence.
        selected: their keys ``(Tk, H_kv, D)`` and values ``(Tk, H_kv, Dv)``.
        window_keys, window: the same for the window branch, of the last tokens alone where the
            branch has keys of its own.
        compressed: of each complete block, ``(sum of N_cmp, H_kv, D)`` and so on.
    """

    keys: Segments
    selected: Pair
    window_keys: Segments
    window: Pair
    compressed: Pair


def locate_in_cache(
    cache: Cache, x: Tensor, boundaries: Boundaries | None, compressed_kv: Pair | None = None
) -> NewTokens:
    """Where the new tokens of batched ``x (B, N, ...)`` or packed ``(T, ...)`` go. The caller's
    ``compressed_kv``, if given, sets the number of candidates.
    """
    if boundaries is None:
        batch, length = x.shape[:2]
        offset = torch.arange(batch + 1, device=x.device) * length
        return locate_new_tokens(cache, offset, batch * length, [length] * batch)
    candidates = None if compressed_kv is None else compressed_kv[0].shape[0]
    offset, counts = boundaries.cu_seqlens.long(), boundaries.lengths
    return locate_new_tokens(cache, offset, x.shape[0], counts, candidates)


def check_all_stored(cache: Cache, tokens: NewTokens):
    """Check that every new token has a place, for which the host waits for a GPU."""
    wanted = tokens.start + tokens.offset.diff()
    for at, (end, wish) in enumerate(zip(tokens.end.tolist(), wanted.tolist(), strict=True)):
        if end < wish:
            raise ValueError(
                f"cache must have a page for each new token and max_length={cache.max_length} of "
                f"at least {wish}, got no place for token {end} of sequence {at}"
            )


def gather_context(
    cache: Cache,
    tokens: NewTokens,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    compressed: Pair,
    whole_window: bool = False,
) -> Context:
    """The context of new tokens, which are not in the cache yet.

    Arguments as of :func:`nsa.cache.append.append`. With ``whole_window``, the window branch has as
    many keys as the others. Those before the window, which no query sees, may belong to other
    tokens.
    """
    nothing = torch.zeros_like(tokens.start)
    has_new = tokens.offset.diff() > 0
    end = torch.where(has_new, tokens.end, 0)
    keys = segments_of(end)
    pages = cache.k_pages, cache.v_pages
    selected = _join(pages, partial(token_places, cache), (k[1], v[1]), tokens, nothing, keys)
    window_keys, window = keys, selected
    if cache.window_rings is not None:
        # The first query sees this many keys before its own.
        before = min(cache.config.window_size - 1, cache.max_length)
        first = nothing if whole_window else (tokens.start - before).clamp(min=0)
        window_keys = segments_of((end - first).clamp(min=0))
        new, places_of = (k[2], v[2]), partial(window_places, cache)
        window = _join(cache.window_rings, places_of, new, tokens, first, window_keys)
    stores = cache.k_cmp_pages, cache.v_cmp_pages
    k_cmp, v_cmp = (
        gather_compressed(cache, tokens, store, x, end)
        for store, x in zip(stores, compressed, strict=True)
    )
    return Context(keys, selected, window_keys, window, (k_cmp, v_cmp))


def gather_compressed(
    cache: Cache, tokens: NewTokens, store: Tensor, new: Tensor, end: Tensor
) -> Tensor:
    """Compressed keys or values of sequences of ``end`` tokens: ``(sum of N_cmp, H_kv, C)``.

    Args:
        store: those of the cache, ``k_cmp_pages`` or ``v_cmp_pages``.
        new: those of the candidates, ``(M, H_kv, C)``.
        end: int64 ``(B,)``. Blocks past those that the new tokens complete are 0.
    """
    config = cache.config
    blocks = segments_of(num_compressed_blocks(end, config))
    old = blocks.local < num_compressed_blocks(tokens.start, config)[blocks.owner]
    places = block_places(cache, blocks.owner, blocks.local)
    _check_pages(places.valid, old)
    done = tokens.completed.nonzero()[:, 0]
    row = blocks.offset[tokens.block_sequence[done]] + tokens.block[done]
    return torch.where(old[:, None, None], places.read(store), 0).index_copy_(0, row, new[done])


def segments_of(count: Tensor) -> Segments:
    """``count`` items of each sequence, int64 ``(B,)``, which the host reads."""
    offset = prefix_sum(count)
    return Segments(offset, int(offset[-1]))


def _join(
    stores: Pair,
    places_of: Callable[[Tensor, Tensor], CachePlaces],
    new: Pair,
    tokens: NewTokens,
    first: Tensor,
    keys: Segments,
) -> Pair:
    """``keys``, which begin at position ``first`` of each sequence, from stores and new tokens."""
    position = first[keys.owner] + keys.local
    places = places_of(keys.owner, position)
    _check_pages(places.valid, position < tokens.start[keys.owner])
    row = keys.offset[tokens.sequence] + tokens.position - first[tokens.sequence]
    k, v = (places.read(s).index_copy_(0, row, x) for s, x in zip(stores, new, strict=True))
    return k, v


def _check_pages(valid: Tensor, old: Tensor):
    if bool((old & ~valid).any()):
        raise ValueError(
            "page_table must name a page for every token that lengths counts, got a token without"
        )
