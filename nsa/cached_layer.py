"""What the layer does with a cache: locate new tokens, and compress the blocks they complete."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks, num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.cache.append import NewTokens, candidate_positions, candidate_tokens
from nsa.cache.calls import cache_config, check_cached_call
from nsa.cache.context import locate_in_cache
from nsa.config import NSAConfig
from nsa.host import is_capturing
from nsa.rope import apply_rope
from nsa.validation import check_qkv, per_branch

Branches = tuple[Tensor, ...]
Compress = Callable[[Tensor], Tensor]


def arguments_of_new_tokens(
    q: Tensor,
    keys: Branches,
    values: Branches,
    boundaries: Boundaries | None,
    cache: Cache,
    *,
    config: NSAConfig,
    compressors: Any,
    compressed_dtype: torch.dtype,
    rope_theta: float | None,
) -> tuple:
    """Arguments ``q``, ``k``, ``v`` and ``compressed_kv`` of :func:`nsa.forward` with a cache.

    Args:
        q, keys, values: not rotated, ``(B, N, H, D)`` or ``(T, H, D)`` and so on; keys and values
            of one branch or three.
        compressors: for keys and for values, or None if :func:`nsa.forward` takes means.
        compressed_dtype: what the compressors take.
    """
    tokens = locate_checked(cache, config, q, keys, values, boundaries)
    compressed_kv = None
    if compressors is not None:
        k, v = keys[0].to(compressed_dtype), values[0].to(compressed_dtype)
        found = compress_completed(cache, tokens, k, v, compressors, rope_theta)
        compressed_kv = tuple(x.to(q.dtype) for x in found)
    if rope_theta is not None:
        position = tokens.position.view(q.shape[:-2])
        q = apply_rope(q, position, rope_theta)
        rotated = tuple(apply_rope(x, position, rope_theta) for x in keys)
        keys = rotated if compressors is None else as_kept(rotated, keys[0], cache)
    return q, one_or_three(keys), one_or_three(values), compressed_kv


def as_kept(rotated: Branches, unrotated: Tensor, cache: Cache) -> Branches:
    """Keys of one branch or three as the cache keeps them for a compressor of the layer.

    Its ring, where it has one, keeps the keys of the open block as the compressor takes them.
    """
    if not cache.separate_kv:
        return rotated
    _, selected, window = per_branch("k", one_or_three(rotated))
    return unrotated, selected, window


def one_or_three(x: Branches) -> Tensor | Branches:
    """Keys or values of one branch or three in the form of :func:`nsa.forward`."""
    return x if len(x) == 3 else x[0]


def is_first_call(cache: Cache, boundaries: Boundaries | None) -> bool:
    """Whether the host knows that new tokens begin their sequences, and how many there are.

    Their arguments are then those of a call without a cache, but for :func:`as_candidates`.
    """
    if not isinstance(cache, Cache) or torch.compiler.is_compiling():
        return False
    # A captured graph is replayed as sequences grow.
    if is_capturing(cache.lengths):
        return False
    if boundaries is not None and len(boundaries.lengths or ()) != cache.batch_size:
        return False
    lengths = cache.known_lengths()
    return lengths is not None and not any(lengths)


def as_candidates(
    x: Tensor, tokens: int, boundaries: Boundaries | None, config: NSAConfig
) -> Tensor:
    """Compressed tokens of whole sequences, with the rows that a call with a cache has besides.

    Args:
        x: ``(B, N_cmp, H_kv, C)`` or ``(sum of N_cmp, H_kv, C)``.
        tokens: of a sequence of the batch.
    """
    lengths = [tokens] if boundaries is None else boundaries.lengths
    assert lengths is not None
    counts = [num_compressed_blocks(n, config) for n in lengths]
    missing = [
        most_completed_blocks(n, config) - count for n, count in zip(lengths, counts, strict=True)
    ]
    if len(lengths) == 1:
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing[0]))
    rest = x.new_zeros(max(missing), *x.shape[1:])
    parts = zip(x.split(counts), missing, strict=True)
    return torch.cat([piece for part, n in parts for piece in (part, rest[:n])])


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
    k, v = (per_branch(n, one_or_three(x)) for n, x in (("k", keys), ("v", values)))
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
