"""Prompts and chunks into a cache, with the kernels of training.

These kernels read keys from one row of tokens. Pages that lie in order are such rows: new tokens
are written to them first, and all that the queries attend is read where it lies, by a prompt or by
a chunk. Packed chunks, and entries of a batch that do not follow each other, are copied once.

Other pages, and rings, are gathered token by token, and so written: a server's, and those that
sequences share after :meth:`nsa.Cache.reorder`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks, num_compressed_blocks
from nsa.cache import Cache
from nsa.cache.append import NewTokens, append, new_blocks
from nsa.cache.context import check_all_stored, gather_context, locate_in_cache
from nsa.cache.new_tile_lists import NewTileLists, keep_lists, open_lists
from nsa.cache.spans import Spans, find_spans, ordered_rows, write_blocks, write_tokens
from nsa.cache.state import Pair
from nsa.fused.compression import compress_in_order
from nsa.host import is_capturing
from nsa.packing import Boundaries
from nsa.segments import locate_items, prefix_sum

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


class UncachedCall(NamedTuple):
    """What the new tokens attend as a call without a cache: rows of queries and of all keys."""

    q: Tensor
    k: Branches
    v: Branches
    compressed_kv: Pair
    boundaries: Boundaries | None


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
    compressed_kv: Pair | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
) -> Tensor:
    """See :func:`nsa.forward`; :func:`unsupported_reason` has no objection."""

    def attend(call: UncachedCall, block_indices: Tensor | None) -> Tensor:
        out = backend.forward(
            **call._asdict(),
            config=cache.config,
            gate_proj_weight=gate_proj_weight,
            gates=None if gates is None else gates.reshape(*call.q.shape[:-1], 3),
            block_indices=block_indices,
            max_workspace_bytes=max_workspace_bytes,
        )
        return out.reshape(*q.shape[:-1], out.shape[-1])

    new = NewKeys(k, v, (compress_k_weight, compress_v_weight), compressed_kv, boundaries)
    spans = _find_spans(q, new, cache)
    if spans is not None:
        return _forward_in_order(q, new, cache, spans, backend, attend, block_indices)
    return _forward_anywhere(q, new, cache, backend, attend, block_indices)


class NewKeys(NamedTuple):
    """Keys and values of new tokens, what compresses them, and where each sequence has its own."""

    k: Branches
    v: Branches
    weights: tuple[Tensor | None, Tensor | None]
    compressed_kv: Pair | None
    boundaries: Boundaries | None


Attend = Callable[[UncachedCall, Tensor | None], Tensor]
"""The output for a call and the blocks that it attends, None to select."""


def _find_spans(q: Tensor, new: NewKeys, cache: Cache) -> Spans | None:
    """The spans of new tokens that slices of the pages take, and whose keys lie in slices."""
    bounds = new.boundaries
    counts = [q.shape[1]] * q.shape[0] if bounds is None else bounds.lengths
    spans = find_spans(cache, counts, batched=bounds is None)
    if spans is None or (cache.separate_kv and any(spans.starts)):
        # Keys that are in rings, not in pages.
        return None
    return spans


def _forward_in_order(
    q: Tensor,
    new: NewKeys,
    cache: Cache,
    spans: Spans,
    backend: Backend,
    attend: Attend,
    block_indices: Tensor | None,
) -> Tensor:
    """Write the new tokens into the pages, and attend keys where they lie.

    An error leaves the cache as it was, because tokens past its lengths are none.
    """
    bounds = new.boundaries
    added = spans.counts[0] if bounds is None else bounds.cu_seqlens.diff()
    end = cache.lengths + added
    write_tokens(cache, spans, new.k, new.v)
    compressed = _compress(new, cache, spans, end)
    write_blocks(cache, spans, compressed)
    if any(spans.starts):
        call = _in_pages(q, cache, spans, end, bounds)
    else:
        if bounds is None:
            k_cmp, v_cmp = (x.unflatten(0, (q.shape[0], -1)) for x in compressed)
            compressed = k_cmp, v_cmp
        call = UncachedCall(q, new.k, new.v, compressed, bounds)
    if cache.config.selection == "token":
        if block_indices is not None:
            block_indices = block_indices.reshape(*call.q.shape[:-2], *block_indices.shape[-2:])
        out = attend(call, block_indices)
    else:
        if block_indices is None:
            block_indices = _select(call, cache, backend)
        elif call.q.ndim < block_indices.ndim:
            block_indices = block_indices.transpose(0, 1).flatten(1, 2)
        out = attend(call, block_indices)
        keep_lists(cache, spans, end, block_indices.transpose(-3, -2).flatten(0, -3))
    cache.advance(end, spans.counts)
    return out


def _compress(new: NewKeys, cache: Cache, spans: Spans, end: Tensor) -> Pair:
    """Compressed keys and values of the blocks that are completed, ``(M, H_kv, C)``."""
    before, after = spans.blocks(cache.config)
    counts = [past - first for first, past in zip(before, after, strict=True)]
    if new.compressed_kv is not None:
        most = [most_completed_blocks(count, cache.config) for count in spans.counts]
        k_cmp, v_cmp = (_first_rows(x, most, counts) for x in new.compressed_kv)
        return k_cmp, v_cmp
    k, v = new.k[0], new.v[0]
    if not sum(counts):
        return k.flatten(0, -3)[:0], v.flatten(0, -3)[:0]
    if any(spans.starts):
        # A block may begin with tokens of earlier calls.
        k, v = (ordered_rows(cache, x) for x in (cache.k_pages, cache.v_pages))
    start = _block_rows(cache, spans, before, counts, end, k, new.boundaries)
    if not spans.whole:
        # Sequences may complete different numbers of blocks.
        k, v = k.flatten(0, -3), v.flatten(0, -3)
    return compress_in_order(k, v, start, cache.config.compress_block_size, new.weights)


def _first_rows(x: Tensor, rows: list[int], counts: list[int]) -> Tensor:
    """The first ``counts`` of the ``rows`` that each sequence has in a batch or a packed row."""
    parts = list(x.unbind()) if x.ndim == 4 else x.split([*rows, x.shape[0] - sum(rows)])
    parts = [part[:count] for part, count in zip(parts, counts, strict=False)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _block_rows(
    cache: Cache,
    spans: Spans,
    before: list[int],
    counts: list[int],
    end: Tensor,
    k: Tensor,
    boundaries: Boundaries | None,
) -> Tensor:
    """The first row of each completed block among all rows of ``k``, int32 ``(M,)``."""
    config, stride = cache.config, cache.config.compress_stride
    if spans.whole:
        first, count = before[0], counts[0]
        rows = torch.arange(first, first + count, dtype=torch.int32, device=k.device) * stride
        return rows if k.shape[0] == 1 else (_bases(k)[:, None] + rows).flatten()
    base = _bases(k) if boundaries is None or k.ndim == 4 else boundaries.cu_seqlens
    old, past = (num_compressed_blocks(x, config) for x in (cache.lengths, end))
    sequence, nth = locate_items(prefix_sum(past - old), sum(counts))
    return (base[sequence] + (old[sequence] + nth) * stride).int()


def _bases(x: Tensor) -> Tensor:
    """The first row of each entry of ``x (B, T, ...)``, int32."""
    batch, rows = x.shape[:2]
    return torch.arange(0, batch * rows, rows, dtype=torch.int32, device=x.device)


def _in_pages(
    q: Tensor, cache: Cache, spans: Spans, end: Tensor, boundaries: Boundaries | None
) -> UncachedCall:
    """A call that attends keys in the pages, which have the new ones; copied if in many pieces."""
    config, lengths = cache.config, spans.counts
    shift = config.compress_block_size // config.compress_stride - 1
    # Sequences without new tokens need no keys.
    lengths_k = [most if new else 0 for most, new in zip(spans.ends, lengths, strict=True)]
    blocks = [num_compressed_blocks(length, config) for length in lengths_k]
    k, v = (_rows(cache, x, 0, lengths_k, spans) for x in (cache.k_pages, cache.v_pages))
    k_cmp, v_cmp = (
        _rows(cache, x, shift, blocks, spans) for x in (cache.k_cmp_pages, cache.v_cmp_pages)
    )
    branches, compressed = ((k, k, k), (v, v, v)), (k_cmp, v_cmp)
    if spans.whole:
        return UncachedCall(q, *branches, compressed, None)
    if boundaries is None:
        cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=q.device) * lengths[0]
    else:
        cu_seqlens = boundaries.cu_seqlens
    cu_seqlens_k = prefix_sum(torch.where(end > cache.lengths, end, 0)).int()
    if lengths == lengths_k:
        cu_seqlens_k = cu_seqlens
    most, most_k = max(lengths), max(lengths_k)
    bounds = Boundaries(cu_seqlens, lengths, most, None, cu_seqlens_k, lengths_k, most_k)
    return UncachedCall(q.flatten(0, -3), *branches, compressed, bounds)


def _rows(cache: Cache, pool: Tensor, first: int, counts: list[int], spans: Spans) -> Tensor:
    """``counts`` rows of each sequence from row ``first`` on: ``(B, count, H_kv, C)`` in place, or
    packed ``(sum of counts, H_kv, C)`` in a copy."""
    rows = ordered_rows(cache, pool)
    if spans.whole:
        return rows[:, first : first + counts[0]]
    parts = zip(rows, counts, strict=True)
    return torch.cat([part[first : first + count] for part, count in parts])


def _forward_anywhere(
    q: Tensor,
    new: NewKeys,
    cache: Cache,
    backend: Backend,
    attend: Attend,
    block_indices: Tensor | None,
) -> Tensor:
    """Attend a copy of the keys, which may be in any pages or in rings."""
    tokens = locate_in_cache(cache, q, new.boundaries, new.compressed_kv)
    check_all_stored(cache, tokens)
    k, v = _flatten(new.k), _flatten(new.v)
    given = new.compressed_kv
    if given is not None:
        given = given[0].flatten(0, -3), given[1].flatten(0, -3)
    k_new, v_new = (
        new_blocks(cache, tokens, kind, x[0], new.weights[kind], given)
        for kind, x in enumerate((k, v))
    )
    compressed = k_new, v_new
    call = _behind_context(q, cache, tokens, k, v, compressed)
    lists = None
    if cache.config.selection == "tile":
        block_indices, lists = _lists(call, cache, tokens, backend, block_indices)
    elif block_indices is not None:
        block_indices = block_indices.reshape(*call.q.shape[:-2], *block_indices.shape[-2:])
    out = attend(call, block_indices)
    append(cache, tokens, k, v, compressed)
    if lists is not None:
        lists.store()
    return out


def _flatten(x: Branches) -> Branches:
    first, second, third = (part.flatten(0, -3) for part in x)
    return first, second, third


def _behind_context(
    q: Tensor,
    cache: Cache,
    tokens: NewTokens,
    k: Branches,
    v: Branches,
    compressed: Pair,
) -> UncachedCall:
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
    return UncachedCall(q.flatten(0, -3), *branches, context.compressed, bounds)


def _lists(
    call: UncachedCall,
    cache: Cache,
    tokens: NewTokens,
    backend: Backend,
    block_indices: Tensor | None,
) -> tuple[Tensor, NewTileLists]:
    """Blocks of each tile, as the kernels and as the cache take them."""
    lists = open_lists(cache, tokens, call.q.shape[-2])
    if block_indices is None:
        block_indices = _select(call, cache, backend)
        return block_indices, lists.with_blocks(block_indices).with_later_blocks()
    lists = lists.with_blocks(block_indices).with_later_blocks()
    return lists.in_layout_of(call.q), lists


def _select(call: UncachedCall, cache: Cache, backend: Backend) -> Tensor:
    return backend.select_blocks(
        call.q,
        call.k[0],
        config=cache.config,
        compressed_kv=call.compressed_kv,
        boundaries=call.boundaries,
    )
