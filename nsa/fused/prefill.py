"""Prompts and chunks into a cache, with the kernels of training.

These kernels read keys from one row of tokens. So a chunk first copies the keys and values of its
sequences out of their pages: each is read and written once more. A prompt copies nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.cache import Cache
from nsa.cache.append import NewTokens, append, new_blocks
from nsa.cache.context import check_all_stored, gather_context, locate_in_cache
from nsa.host import is_capturing
from nsa.packing import Boundaries

Branches = tuple[Tensor, Tensor, Tensor]


def unsupported_reason(q: Tensor, cache: Cache) -> str | None:
    """Why this cannot run, with the remedy; None if it can."""
    if cache.config.selection == "tile":
        return (
            "it needs selection='token' with a cache, got 'tile'; use backend='reference' or 'auto'"
        )
    if not _all_empty(cache):
        return (
            "it needs as many queries as keys, so a cache must be empty, as far as the host knows; "
            "use backend='reference' or 'auto'"
        )
    if is_capturing(q):
        return "it reads lengths on the host, which a CUDA graph cannot; call it before the capture"
    return None


@torch.compiler.disable(reason="a cache is read on the host")
@torch.no_grad()
def forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    attend: Callable[..., Tensor],
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """See :func:`nsa.forward`; :func:`unsupported_reason` has no objection.

    ``attend`` is :func:`nsa.fused.entry.forward`.
    """
    tokens = locate_in_cache(cache, q, boundaries, compressed_kv)
    if cache.known_lengths() is None or tokens.counts is None:
        check_all_stored(cache, tokens)
    flat_k, flat_v = _flatten(k), _flatten(v)
    given = None
    if compressed_kv is not None:
        given = compressed_kv[0].flatten(0, -3), compressed_kv[1].flatten(0, -3)
    weights = compress_k_weight, compress_v_weight
    k_new, v_new = (
        new_blocks(cache, tokens, kind, x[0], weights[kind], given)
        for kind, x in enumerate((flat_k, flat_v))
    )
    compressed = k_new, v_new
    rest: dict[str, Any] = dict(
        config=cache.config,
        gate_proj_weight=gate_proj_weight,
        max_workspace_bytes=max_workspace_bytes,
    )
    if _all_empty(cache):
        out = attend(
            q, k, v, gates=gates, block_indices=block_indices, boundaries=boundaries,
            compressed_kv=_of_prompts(compressed, tokens, q, cache), **rest,
        )  # fmt: skip
    else:
        context = gather_context(cache, tokens, flat_k, flat_v, compressed, whole_window=True)
        (k_slc, v_slc), (k_win, v_win) = context.selected, context.window
        out = attend(
            q.flatten(0, -3),
            (k_slc, k_slc, k_win),
            (v_slc, v_slc, v_win),
            gates=None if gates is None else gates.flatten(0, -3),
            block_indices=None if block_indices is None else block_indices.flatten(0, -3),
            boundaries=_boundaries(tokens, context.keys.offset),
            compressed_kv=context.compressed,
            **rest,
        )
    append(cache, tokens, flat_k, flat_v, compressed)
    return out.reshape(*q.shape[:-1], out.shape[-1])


def _flatten(x: Branches) -> Branches:
    first, second, third = (part.flatten(0, -3) for part in x)
    return first, second, third


def _all_empty(cache: Cache) -> bool:
    """Whether the host knows that there is nothing in the cache."""
    lengths = cache.known_lengths()
    return lengths is not None and not any(lengths)


def _of_prompts(
    compressed: tuple[Tensor, ...], tokens: NewTokens, q: Tensor, cache: Cache
) -> tuple[Tensor, Tensor]:
    """The completed blocks of prompts, as :func:`nsa.forward` takes them without a cache."""
    if q.ndim == 3:
        k_cmp, v_cmp = (x[tokens.completed] for x in compressed)
        return k_cmp, v_cmp
    batch, count = q.shape[0], num_compressed_blocks(q.shape[1], cache.config)
    k_cmp, v_cmp = (
        x.unflatten(0, (batch, tokens.num_candidates // batch))[:, :count] for x in compressed
    )
    return k_cmp, v_cmp


def _boundaries(tokens: NewTokens, offset_k: Tensor) -> Boundaries:
    """Boundaries of the new tokens and of all keys, read on the host."""
    cu_seqlens, cu_seqlens_k = tokens.offset.int(), offset_k.int()
    lengths, lengths_k = (x.diff().tolist() for x in (cu_seqlens, cu_seqlens_k))
    if lengths == lengths_k:
        cu_seqlens_k = cu_seqlens
    most, most_k = max(lengths), max(lengths_k)
    return Boundaries(cu_seqlens, lengths, most, None, cu_seqlens_k, lengths_k, most_k)
