"""Prompts and chunks into a cache, with the kernels of training.

These kernels read keys from one row of tokens. So a chunk first copies the keys and values of its
sequences out of their pages: each is read and written once more. A prompt copies nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.cache import Cache
from nsa.cache.append import NewTokens, append, new_blocks
from nsa.cache.context import check_all_stored, gather_context, locate_in_cache
from nsa.cache.lists import TileLists, open_lists
from nsa.host import is_capturing
from nsa.packing import Boundaries

Branches = tuple[Tensor, Tensor, Tensor]


_REMEDY = "use backend='reference' or 'auto'"


class Backend(NamedTuple):
    """:func:`nsa.fused.entry.forward` and ``select_blocks``, for calls without a cache."""

    forward: Callable[..., Tensor]
    select_blocks: Callable[..., Tensor]


def unsupported_reason(q: Tensor, cache: Cache, boundaries: Boundaries | None) -> str | None:
    """Why this cannot run, with the remedy; None if it can. The host may wait for a GPU."""
    if is_capturing(q):
        return "it reads lengths on the host, which a CUDA graph cannot; call it before the capture"
    if cache.config.selection == "token":
        return None
    if cache.config.num_cmp_selected_blocks is not None:
        return f"it needs num_cmp_selected_blocks=None with a cache; {_REMEDY}"
    if torch.compiler.is_compiling():
        return f"it reads lengths on the host, which torch.compile would guard; {_REMEDY}"
    starts = cache.known_lengths() or cache.lengths.tolist()
    new = [q.shape[1]] * len(starts) if boundaries is None else boundaries.lengths or starts
    size = cache.config.q_tile_size
    for start, count in zip(starts, new, strict=True):
        if count and start % size:
            return (
                f"it needs new tokens to start at a multiple of q_tile_size={size} with "
                f"selection='tile' and a cache, got {start}; {_REMEDY}"
            )
    return None


class Call(NamedTuple):
    """What the new tokens attend as a call without a cache: rows of queries and of all keys."""

    q: Tensor
    k: Branches
    v: Branches
    compressed_kv: tuple[Tensor, Tensor]
    boundaries: Boundaries | None


def _is_known_to_fit(cache: Cache, tokens: NewTokens) -> bool:
    """Whether the host knows that every new token has a place; not in a server's pages."""
    starts = cache.known_lengths()
    if not cache.owns_pages or starts is None or tokens.counts is None:
        return False
    return all(
        start + count <= cache.max_length
        for start, count in zip(starts, tokens.counts, strict=True)
    )


@torch.compiler.disable(reason="a cache is read on the host")
@torch.no_grad()
def forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    backend: Backend,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """See :func:`nsa.forward`; :func:`unsupported_reason` has no objection."""
    tokens = locate_in_cache(cache, q, boundaries, compressed_kv)
    if not _is_known_to_fit(cache, tokens):
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
    if _all_empty(cache):
        call = Call(q, k, v, _of_prompts(compressed, tokens, q, cache), boundaries)
    else:
        call = _behind_context(q, cache, tokens, flat_k, flat_v, compressed)
    lists = None
    if cache.config.selection == "tile":
        block_indices, lists = _lists(call, cache, tokens, backend, block_indices)
    elif block_indices is not None:
        block_indices = block_indices.reshape(*call.q.shape[:-2], *block_indices.shape[-2:])
    out = backend.forward(
        **call._asdict(),
        config=cache.config,
        gate_proj_weight=gate_proj_weight,
        gates=None if gates is None else gates.reshape(*call.q.shape[:-1], 3),
        block_indices=block_indices,
        max_workspace_bytes=max_workspace_bytes,
    )
    append(cache, tokens, flat_k, flat_v, compressed)
    if lists is not None:
        lists.store()
    return out.reshape(*q.shape[:-1], out.shape[-1])


def _flatten(x: Branches) -> Branches:
    first, second, third = (part.flatten(0, -3) for part in x)
    return first, second, third


def _all_empty(cache: Cache) -> bool:
    """Whether the host knows that there is nothing in the cache."""
    lengths = cache.known_lengths()
    return lengths is not None and not any(lengths)


def _of_prompts(
    compressed: tuple[Tensor, Tensor], tokens: NewTokens, q: Tensor, cache: Cache
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


def _behind_context(
    q: Tensor,
    cache: Cache,
    tokens: NewTokens,
    k: Branches,
    v: Branches,
    compressed: tuple[Tensor, Tensor],
) -> Call:
    """A call of packed sequences, with the keys in the cache before the new ones."""
    context = gather_context(cache, tokens, k, v, compressed, whole_window=True)
    (k_slc, v_slc), (k_win, v_win) = context.selected, context.window
    cu_seqlens, cu_seqlens_k = tokens.offset.int(), context.keys.offset.int()
    lengths, lengths_k = (x.diff().tolist() for x in (cu_seqlens, cu_seqlens_k))
    if lengths == lengths_k:
        cu_seqlens_k = cu_seqlens
    most, most_k = max(lengths), max(lengths_k)
    bounds = Boundaries(cu_seqlens, lengths, most, None, cu_seqlens_k, lengths_k, most_k)
    # Its own compressed tokens are given, so the first branch is not read.
    branches = (k_slc, k_slc, k_win), (v_slc, v_slc, v_win)
    return Call(q.flatten(0, -3), *branches, context.compressed, bounds)


def _lists(
    call: Call,
    cache: Cache,
    tokens: NewTokens,
    backend: Backend,
    block_indices: Tensor | None,
) -> tuple[Tensor, TileLists]:
    """Blocks of each tile, as the kernels and as the cache take them."""
    lists = open_lists(cache, tokens, call.q.shape[-2])
    if block_indices is None:
        block_indices = backend.select_blocks(
            call.q,
            call.k[0],
            config=cache.config,
            compressed_kv=call.compressed_kv,
            boundaries=call.boundaries,
        )
        return block_indices, lists.with_blocks(block_indices).with_later_blocks()
    lists = lists.with_blocks(block_indices).with_later_blocks()
    return lists.in_layout_of(call.q), lists
