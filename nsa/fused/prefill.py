"""Prompts and chunks into a cache, with the kernels of training.

These kernels read keys from one row of tokens. Pages that lie in order are such rows: new tokens
are written to them first, and all that the queries attend is read where it lies, by a prompt or by
a chunk. Packed chunks, and entries of a batch that do not follow each other, are copied once.

Other pages, and rings, are gathered token by token, and so written: a server's, and those that
sequences share after :meth:`nsa.Cache.reorder`.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nsa.blocks import most_completed_blocks, num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.cache.append import NewTokens, append, flat_branches, new_blocks
from nsa.cache.context import check_all_stored, gather_context, locate_in_cache
from nsa.cache.new_tile_lists import NewTileLists, keep_lists, open_lists
from nsa.cache.spans import Spans, find_spans, ordered_rows, write_blocks, write_tokens
from nsa.cache.state import Pair
from nsa.fused.compression import compress_in_order
from nsa.host import is_capturing
from nsa.segments import locate_items, prefix_sum

Branches = tuple[Tensor, Tensor, Tensor]


_REMEDY = "use backend='reference' or 'auto'"


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


class NewKeys(NamedTuple):
    """Keys and values of new tokens, what compresses them, and where each sequence has its own."""

    k: Branches
    v: Branches
    weights: tuple[Tensor | None, Tensor | None]
    compressed_kv: Pair | None
    boundaries: Boundaries | None


class Prompt(Protocol):
    """A call with a cache that has begun.

    Attributes:
        call: what its tokens attend.
        block_indices: the caller's, as ``call`` takes them; None to select.
    """

    call: UncachedCall
    block_indices: Tensor | None

    def end(self, block_indices: Tensor | None) -> None:
        """Take the new tokens into the cache.

        In tile mode, ``block_indices`` are what they have attended, which the cache keeps.
        """


def begin(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    compress_weights: tuple[Tensor | None, Tensor | None],
    compressed_kv: Pair | None,
    block_indices: Tensor | None,
    boundaries: Boundaries | None,
) -> Prompt:
    """The call without a cache that a call of :func:`nsa.forward` is.

    :func:`unsupported_reason` has no objection. An error before :meth:`Prompt.end` leaves the cache
    as it was.
    """
    new = NewKeys(k, v, compress_weights, compressed_kv, boundaries)
    spans = _find_spans(q, new, cache)
    if spans is None:
        return _PromptAnywhere(q, new, cache, block_indices)
    return _PromptInOrder(q, new, cache, spans, block_indices)


def _find_spans(q: Tensor, new: NewKeys, cache: Cache) -> Spans | None:
    """The spans of new tokens that slices of the pages take, and whose keys lie in slices."""
    bounds = new.boundaries
    counts = [q.shape[1]] * q.shape[0] if bounds is None else bounds.lengths
    spans = find_spans(cache, counts, batched=bounds is None)
    if spans is None or (cache.separate_kv and any(spans.starts)):
        # Keys that are in rings, not in pages.
        return None
    return spans


class _PromptInOrder:
    """Attends keys where they lie in the pages, where the new ones are written first.

    Tokens past the lengths of a cache are none, so an error leaves it as it was.
    """

    def __init__(
        self,
        q: Tensor,
        new: NewKeys,
        cache: Cache,
        spans: Spans,
        block_indices: Tensor | None,
    ):
        self._cache, self._spans = cache, spans
        bounds = new.boundaries
        self._end = cache.lengths + (
            spans.counts[0] if bounds is None else bounds.cu_seqlens.diff()
        )
        write_tokens(cache, spans, new.k, new.v)
        compressed = _compress(new, cache, spans, self._end)
        write_blocks(cache, spans, compressed)
        if any(spans.starts):
            self.call = _in_pages(q, cache, spans, self._end, bounds)
        else:
            if bounds is None:
                k_cmp, v_cmp = (x.unflatten(0, (q.shape[0], -1)) for x in compressed)
                compressed = k_cmp, v_cmp
            self.call = UncachedCall(q, new.k, new.v, compressed, bounds)
        if block_indices is not None and cache.config.selection == "token":
            block_indices = _in_token_order(block_indices, self.call.q)
        elif block_indices is not None and self.call.q.ndim < block_indices.ndim:
            block_indices = block_indices.transpose(0, 1).flatten(1, 2)
        self.block_indices = block_indices

    def end(self, block_indices: Tensor | None) -> None:
        if self._cache.config.selection == "tile":
            assert block_indices is not None
            lists = block_indices.transpose(-3, -2).flatten(0, -3)
            keep_lists(self._cache, self._spans, self._end, lists)
        self._cache.advance(self._end, self._spans.counts)


def _in_token_order(block_indices: Tensor, q: Tensor) -> Tensor:
    """Token mode's ``block_indices`` with the leading dimensions of ``q``."""
    return block_indices.reshape(*q.shape[:-2], *block_indices.shape[-2:])


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
    compressed = k_cmp, v_cmp
    if spans.whole:
        return UncachedCall(q, (k, k, k), (v, v, v), compressed, None)
    if boundaries is None:
        cu_seqlens = torch.arange(len(lengths) + 1, dtype=torch.int32, device=q.device) * lengths[0]
    else:
        cu_seqlens = boundaries.cu_seqlens
    cu_seqlens_k = prefix_sum(torch.where(end > cache.lengths, end, 0)).int()
    if lengths == lengths_k:
        cu_seqlens_k = cu_seqlens
    most, most_k = max(lengths), max(lengths_k)
    bounds = Boundaries(cu_seqlens, lengths, most, None, cu_seqlens_k, lengths_k, most_k)
    return UncachedCall(q.flatten(0, -3), (k, k, k), (v, v, v), compressed, bounds)


def _rows(cache: Cache, pool: Tensor, first: int, counts: list[int], spans: Spans) -> Tensor:
    """``counts`` rows of each sequence from row ``first`` on: ``(B, count, H_kv, C)`` in place, or
    packed ``(sum of counts, H_kv, C)`` in a copy."""
    rows = ordered_rows(cache, pool)
    if spans.whole:
        return rows[:, first : first + counts[0]]
    parts = zip(rows, counts, strict=True)
    return torch.cat([part[first : first + count] for part, count in parts])


class _PromptAnywhere:
    """Attends a copy of the keys, which may be in any pages or in rings."""

    def __init__(self, q: Tensor, new: NewKeys, cache: Cache, block_indices: Tensor | None):
        self._cache = cache
        self._tokens = tokens = locate_in_cache(cache, q, new.boundaries, new.compressed_kv)
        check_all_stored(cache, tokens)
        self._k, self._v = flat_branches(new.k), flat_branches(new.v)
        given = new.compressed_kv
        if given is not None:
            given = given[0].flatten(0, -3), given[1].flatten(0, -3)
        k_cmp, v_cmp = (
            new_blocks(cache, tokens, kind, x[0], new.weights[kind], given)
            for kind, x in enumerate((self._k, self._v))
        )
        self._compressed = k_cmp, v_cmp
        self.call = _behind_context(q, cache, tokens, self._k, self._v, self._compressed)
        self._lists: NewTileLists | None = None
        if cache.config.selection == "tile":
            self._lists = open_lists(cache, tokens, q.shape[-2])
        self._given = block_indices is not None
        if block_indices is not None:
            block_indices = self._in_layout_of_call(block_indices)
        self.block_indices = block_indices

    def _in_layout_of_call(self, block_indices: Tensor) -> Tensor:
        if self._lists is None:
            return _in_token_order(block_indices, self.call.q)
        self._lists = self._lists.with_blocks(block_indices).with_later_blocks()
        return self._lists.in_layout_of(self.call.q)

    def end(self, block_indices: Tensor | None) -> None:
        lists = self._lists
        if lists is not None and not self._given:
            assert block_indices is not None
            lists = lists.with_blocks(block_indices).with_later_blocks()
        append(self._cache, self._tokens, self._k, self._v, self._compressed)
        if lists is not None:
            lists.store()


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
    k, v = (k_slc, k_slc, k_win), (v_slc, v_slc, v_win)
    return UncachedCall(q.flatten(0, -3), k, v, context.compressed, bounds)
