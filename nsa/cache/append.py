"""The new tokens of a call: where they go in a cache, and the compressed blocks they complete.

Plain tensor code of static shapes, which reads nothing on the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks, num_compressed_blocks
from nsa.cache.places import (
    CachePlaces,
    block_places,
    open_places,
    token_places,
    window_places,
    write,
)
from nsa.cache.state import Cache, Pair
from nsa.precision import accumulation_dtype, without_autocast
from nsa.segments import locate_items, prefix_sum

Branches = tuple[Tensor, Tensor, Tensor]


def flat_branches(x: Branches) -> Branches:
    """Keys or values of each branch, batched or packed, as ``(T, H_kv, C)``."""
    first, second, third = (part.flatten(0, -3) for part in x)
    return first, second, third


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New tokens of each sequence of a cache, one sequence after another.

    A block that the call may complete is a candidate; there are ``ceil(new / d)`` of each sequence.

    Attributes:
        offset: the first token of each sequence, then the end of the last; int64 ``(B + 1,)``.
        start, end: lengths before and after the call, int64 ``(B,)``. ``end`` is less than
            ``start`` and the new tokens where some have no place in the cache.
        sequence, position: of each token, int64 ``(T,)``.
        places: where each token goes in the pages; not valid if it is dropped.
        block_sequence, block: sequence of each candidate, and its index there, int64 ``(M,)``.
        completed: which candidates the call completes, bool ``(M,)``.
        counts: new tokens of each sequence, if the host knows.
    """

    offset: Tensor
    start: Tensor
    end: Tensor
    sequence: Tensor
    position: Tensor
    places: CachePlaces
    block_sequence: Tensor
    block: Tensor
    completed: Tensor
    counts: list[int] | None

    @property
    def num_candidates(self) -> int:
        return self.block.shape[0]


def locate_new_tokens(
    cache: Cache,
    offset: Tensor,
    total: int,
    counts: list[int] | None,
    num_candidates: int | None = None,
) -> NewTokens:
    """Where ``total`` new tokens go.

    Args:
        offset: int64 ``(B + 1,)``, the first new token of each sequence, then the end of the last;
            tokens past it belong to no sequence.
        counts: ``offset.diff()``, if the host knows it.
        num_candidates: at least the candidates of all sequences; by default their number if
            ``counts`` is known, else an upper bound.
    """
    config = cache.config
    start, count = cache.lengths.long(), offset.diff()
    sequence, local = locate_items(offset, total)
    position = start[sequence] + local
    places = token_places(cache, sequence, position)
    # A sequence ends before its first token without a place.
    lost = torch.where(places.valid, count[sequence], torch.minimum(local, count[sequence]))
    stored = count.scatter_reduce(0, sequence, lost, reduce="amin")
    places = places._replace(valid=places.valid & (local < stored[sequence]))
    end = start + stored
    if config.compress_block_size > cache.max_length:
        num_candidates = 0
    elif num_candidates is None:
        num_candidates = min(total, total // config.compress_stride + cache.batch_size)
        if counts is not None:
            num_candidates = sum(most_completed_blocks(n, config) for n in counts)
    candidates = prefix_sum(most_completed_blocks(count, config))
    block_sequence, nth = locate_items(candidates, num_candidates)
    block = num_compressed_blocks(start, config)[block_sequence] + nth
    completed = block < num_compressed_blocks(end, config)[block_sequence]
    completed &= nth < candidates.diff()[block_sequence]
    return NewTokens(
        offset, start, end, sequence, position, places, block_sequence, block, completed, counts
    )


def candidate_tokens(cache: Cache, tokens: NewTokens, kind: int, new: Tensor) -> Tensor:
    """Keys or values of each candidate's tokens, taken from the cache and from the new tokens.

    Args:
        kind: 0 for keys, 1 for values.
        new: those of the compressed branch's new tokens, ``(T, H_kv, C)``.

    Returns:
        ``(M, l, H_kv, C)``, any values where a candidate is not completed.
    """
    position, old = candidate_positions(cache, tokens)
    sequence = tokens.block_sequence[:, None].expand_as(position)
    row = tokens.offset[sequence] + position - tokens.start[sequence]
    row = row.clamp(min=0, max=max(0, new.shape[0] - 1))
    if cache.open_rings is None:
        store = (cache.k_pages, cache.v_pages)[kind]
        places = token_places(cache, sequence, position)
    else:
        store, places = cache.open_rings[kind], open_places(cache, sequence, position)
    return torch.where(old[..., None, None], places.read(store), new[row])


def candidate_positions(cache: Cache, tokens: NewTokens) -> tuple[Tensor, Tensor]:
    """Positions of each candidate's tokens, int64 ``(M, l)``, and which of them are in the cache,
    bool."""
    size = cache.config.compress_block_size if tokens.num_candidates else 0
    within = torch.arange(size, device=tokens.block.device)
    position = tokens.block[:, None] * cache.config.compress_stride + within
    return position, position < tokens.start[tokens.block_sequence, None]


def compress_candidates(
    cache: Cache, tokens: NewTokens, kind: int, new: Tensor, weight: Tensor | None
) -> Tensor:
    """Mean of the tokens of each candidate, then ``@ weight[kv]`` where given.

    Arguments as in :func:`candidate_tokens`; ``weight`` is ``(H_kv, C, C)``.

    Returns:
        ``(M, H_kv, C)``.
    """
    x = candidate_tokens(cache, tokens, kind, new)
    # Add token by token, so that a block does not depend on the call that completes it, and equal
    # blocks stay equal.
    total = x.new_zeros(x.shape[0], *x.shape[2:], dtype=accumulation_dtype(x.dtype))
    for part in x.unbind(1):
        total += part
    return transform_means(total / max(1, x.shape[1]), weight).to(x.dtype)


def transform_means(mean: Tensor, weight: Tensor | None) -> Tensor:
    """``mean (M, H_kv, C)``, ``@ weight[kv]`` where given."""
    if weight is None:
        return mean
    with without_autocast(mean.device):
        return (mean.transpose(0, 1) @ weight.to(mean.dtype)).transpose(0, 1)


def new_blocks(
    cache: Cache,
    tokens: NewTokens,
    kind: int,
    new: Tensor,
    weight: Tensor | None,
    compressed_kv: Pair | None,
) -> Tensor:
    """Compressed keys (``kind`` 0) or values (1) of the candidates: the caller's, where given.

    ``compressed_kv`` has at least ``M`` rows. The rest as in :func:`compress_candidates`.
    """
    if compressed_kv is not None:
        return compressed_kv[kind][: tokens.num_candidates]
    return compress_candidates(cache, tokens, kind, new, weight)


def append(
    cache: Cache,
    tokens: NewTokens,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    compressed: Pair,
):
    """Write new tokens and completed blocks into the cache, and advance its lengths."""
    write_new(cache, tokens, k, v, compressed)
    advance(cache, tokens)


def write_new(
    cache: Cache,
    tokens: NewTokens,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor],
    compressed: Pair,
):
    """Write new tokens and completed blocks, without overwriting a token that a later one needs.

    Args:
        k, v: new keys ``(T, H_kv, D)`` and values ``(T, H_kv, Dv)`` of each branch.
        compressed: keys and values of each candidate, ``(M, H_kv, D)`` and ``(M, H_kv, Dv)``.
    """
    sequence, position, stored = tokens.sequence, tokens.position, tokens.places.valid
    write(cache.k_pages, tokens.places, k[1])
    write(cache.v_pages, tokens.places, v[1])
    places = block_places(cache, tokens.block_sequence, tokens.block)
    places = places._replace(valid=places.valid & tokens.completed)
    write(cache.k_cmp_pages, places, compressed[0])
    write(cache.v_cmp_pages, places, compressed[1])
    left = tokens.end[sequence] - position
    for rings, at, branch in (
        (cache.open_rings, open_places(cache, sequence, position), 0),
        (cache.window_rings, window_places(cache, sequence, position), 2),
    ):
        if rings is not None:
            # A ring holds the last tokens only, so each slot is written once.
            at = at._replace(valid=stored & (left <= rings[0].shape[1]))
            write(rings[0], at, k[branch])
            write(rings[1], at, v[branch])


def advance(cache: Cache, tokens: NewTokens):
    """Count the new tokens, which are written."""
    dropped = tokens.end < tokens.start + tokens.offset.diff()
    cache.overflowed |= dropped.any()
    cache.advance(tokens.end, tokens.counts)
