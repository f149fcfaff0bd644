"""What the layer does with a cache: locate new tokens, and compress the blocks they complete."""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks
from nsa.cache import Cache
from nsa.cache.append import NewTokens, candidate_positions, candidate_tokens
from nsa.cache.calls import cache_config, check_cached_call
from nsa.cache.context import locate_in_cache
from nsa.config import NSAConfig
from nsa.packing import Boundaries
from nsa.rope import apply_rope
from nsa.validation import check_qkv, per_branch

Branches = tuple[Tensor, ...]
Compress = Callable[[Tensor], Tensor]


def locate_checked(
    cache: Cache,
    config: NSAConfig,
    q: Tensor,
    keys: Branches,
    values: Branches,
    boundaries: Boundaries | None,
) -> NewTokens:
    """Where new tokens go, once the cache is known to fit them.

    Args:
        q, keys, values: ``(B, N, H, D)`` or ``(T, H, D)`` and so on, of one branch or three.
    """
    cache_config(cache, config)
    k, v = (per_branch(n, x if len(x) == 3 else x[0]) for n, x in (("k", keys), ("v", values)))
    cu_seqlens = None if boundaries is None else boundaries.cu_seqlens
    problem = check_qkv(q, k, v, cache.config, cu_seqlens)
    check_cached_call(cache, k, v, {"q": q, "k": k, "v": v}, boundaries, problem)
    return locate_in_cache(cache, q, boundaries)


def compress_completed(
    cache: Cache,
    tokens: NewTokens,
    k: Tensor,
    v: Tensor,
    compressors: tuple[Compress, Compress],
    rope_theta: float | None,
) -> tuple[Tensor, Tensor]:
    """``compressed_kv`` of new tokens for :func:`nsa.forward` with a cache.

    Args:
        k, v: the compressed branch's new keys, not rotated, and values.
        compressors: from ``(M, l, H_kv, C)`` to ``(M, H_kv, C)``.
        rope_theta: base of the rotary embedding. A cache with rings keeps keys of the open block as
            they are; else the pages have rotated ones, which this rotates back.
    """
    batched = k.ndim == 4
    if batched:
        expected = k.shape[0] * most_completed_blocks(k.shape[1], cache.config)
    else:
        expected = tokens.num_candidates
        if tokens.counts is not None:
            expected = sum(most_completed_blocks(n, cache.config) for n in tokens.counts)
    found = []
    for kind, (x, compress) in enumerate(zip((k, v), compressors, strict=True)):
        if not tokens.num_candidates:
            # A block may be longer than the sequences can be.
            found.append(x.new_zeros(expected, *x.shape[-2:]))
            continue
        blocks = candidate_tokens(cache, tokens, kind, x.flatten(0, -3)).to(x.dtype)
        if kind == 0 and rope_theta is not None and not cache.separate_kv:
            position, old = candidate_positions(cache, tokens)
            unrotated = apply_rope(blocks, -position, rope_theta)
            blocks = torch.where(old[..., None, None], unrotated, blocks)
        found.append(compress(blocks))
    k_cmp, v_cmp = found
    if rope_theta is not None and tokens.num_candidates:
        start = tokens.block.double() * cache.config.compress_stride
        centre = start + (cache.config.compress_block_size - 1) / 2
        k_cmp = apply_rope(k_cmp, centre, rope_theta)
    if batched:
        counts = k.shape[0], expected // k.shape[0]
        k_cmp, v_cmp = k_cmp.unflatten(0, counts), v_cmp.unflatten(0, counts)
    return k_cmp, v_cmp
