"""A call of FlashAttention-4's kernels: tensors, options, and the float32 sums of a backward."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.fused.fa4_variants import BackwardTile, Mask, Variant, Window, sums_order
from nsa.precision import accumulation_dtype

LARGEST_TILE = 128
"""Queries, or keys, of a tile of the backward, at most."""

MANY_SEQUENCES = 256
"""Above this number, kernels look up the first tile of each sequence in a table, as FA4 does."""

MOST_HEADS_PER_CTA = 8
"""Heads that a CTA of the backward passes through, at most: a power of 2.

With more, a causal call would have too few CTAs of too different lengths.
"""

SEGMENT_QUERIES, SHORT_SEGMENT = 8192, 2048
"""Queries of a head that a CTA of the backward of blocks passes, at most and at least. L2 holds so
many of each head that CTAs work on at a time, with their gradients."""

ORDERED_SEGMENTS = 8
"""Segments of a head's queries, at most, if gradients have a fixed order: each segment has float32
sums of all keys then, so more segments would take memory by the square of the length."""

SEGMENT_CTAS = 1024
"""CTAs of that backward up to which segments are shortened."""

FEWEST_CTAS = 256
"""CTAs of the backward that must be left for heads to share one: some two for each processor."""


class Call(NamedTuple):
    """The arguments that forward and backward share, as tensors or as fakes to compile with.

    Attributes:
        q, k, v: ``(B, S, H, D)``, or ``(T, H, D)`` with ``bounds``.
        scale: multiplies ``q @ k^T``.
        mask: the mask.
        window: bounds of the window, (left, right).
        bounds: boundaries of packed sequences, of queries and of keys.
        lists: count and index of partial blocks, then of full ones.
        blocks: (queries, keys) of a block of ``lists``.
        limit: int32, the keys that each query sees; its length is a multiple of the query block.
        deterministic: the backward gives the same bits each time.
        near_block: keys of a block if statistics of the backward are by kind of key, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Mask
    window: Window = (None, None)
    bounds: tuple[Tensor | None, Tensor | None] = (None, None)
    lists: tuple[Tensor, ...] | None = None
    blocks: tuple[int, int] | None = None
    limit: Tensor | None = None
    deterministic: bool = False
    near_block: int | None = None

    def variant(self, *dout: Tensor) -> Variant:
        """The kernels that the call needs; pass ``dout`` for backward."""
        (heads, head_dim), (kv_heads, value_dim) = self.q.shape[-2:], self.v.shape[-2:]
        bounds = self.bounds[0]
        repeated = tuple(map(_repeated, (self.q, self.k, self.v, *dout)))
        variant = Variant(
            dtype=self.q.dtype,
            head_dim=head_dim,
            value_dim=value_dim,
            group=heads // kv_heads,
            mask=self.mask,
            packed=bounds is not None,
            many=bounds is not None and bounds.shape[0] > MANY_SEQUENCES + 1,
            blocks=self.blocks,
            repeated=repeated if any(repeated) else (),
            deterministic=self.deterministic,
            near_block=self.near_block,
        )
        if not dout:
            return variant
        return variant._replace(heads_per_cta=self._heads_per_cta(variant, *dout))

    def _heads_per_cta(self, variant: Variant, dout: Tensor) -> int:
        """The heads of a CTA of the backward."""
        heads, head_dim = self.q.shape[-2:]
        shared = math.gcd(variant.group, MOST_HEADS_PER_CTA)
        tiles = math.prod(self.k.shape[:-2]) // LARGEST_TILE
        # In a fixed order only a window's, which go through heads one after the other.
        ordered = variant.deterministic and (variant.packed or not variant.mask.left)
        alone = ordered or variant.blocks is not None or variant.repeated
        if variant.mask.block_stride is not None:
            return 1
        if alone or shared == 1 or tiles * (heads // shared) < FEWEST_CTAS:
            return 1
        # The heads lie whole rows apart, and their sums and padded statistics are indexed by int32.
        apart = all(x.stride(-2) % head_dim == 0 for x in (self.q, dout))
        rows = padded_rows(math.prod(self.q.shape[:-2]), _sequences(self.bounds[0]), LARGEST_TILE)
        return shared if apart and rows * head_dim * shared < 1 << 31 else 1


def segment_tiles(q: Tensor, k: Tensor, deterministic: bool) -> int:
    """Tiles of queries that a CTA of the backward of blocks passes: fewer where CTAs are few."""
    tile = sums_order(q.shape[-1]).rows
    tiles = -(-q.shape[1] // tile)
    key_tiles = -(-k.shape[1] // LARGEST_TILE)
    of_segment = SEGMENT_QUERIES // tile
    while of_segment > SHORT_SEGMENT // tile and (
        q.shape[2] * key_tiles * -(-tiles // of_segment) < SEGMENT_CTAS
    ):
        of_segment //= 2
    return max(of_segment, -(-tiles // ORDERED_SEGMENTS)) if deterministic else of_segment


def in_segments(call: Call) -> Call:
    """A call with an entry of keys and values for each segment of its queries, in one memory."""
    tiles = -(-call.q.shape[1] // sums_order(call.q.shape[-1]).rows)
    of_segment, _ = call.window
    assert of_segment is not None  # as of all masks with a stride
    segments = -(-tiles // of_segment)
    k, v = (x.expand(segments, -1, -1, -1) for x in (call.k, call.v))
    return call._replace(k=k, v=v)


def side_by_side(x: Tensor, heads: int, size: int) -> Tensor:
    """A view of ``x (..., H, S)`` as ``(..., H // heads, extent)``: heads after one another.

    Each begins a multiple of ``size`` after the one before it; ``extent`` ends ``size`` after the
    last begins.
    """
    *leading, count, _ = x.shape
    *strides, apart, _ = x.stride()
    shape = (*leading, count // heads, (heads - 1) * apart + size)
    return x.as_strided(shape, (*strides, heads * apart, 1))


def _repeated(x: Tensor) -> tuple[int, ...]:
    """Dimensions of stride 0. Kernels compiled for them leave these out of TMA descriptors."""
    strides = x.stride()
    if 0 not in strides:
        return ()
    return tuple(dim for dim, stride in enumerate(strides) if stride == 0 and x.shape[dim] > 1)


class Sums(NamedTuple):
    """Float32 sums of a backward; ``dk`` and ``dv`` only if heads share a KV head."""

    dq: Tensor
    dk: Tensor | None = None
    dv: Tensor | None = None

    @classmethod
    def new(
        cls, call: Call, variant: Variant, tile: BackwardTile, dq: Tensor | None = None
    ) -> "Sums":
        """Zeros in FA4's rows and channels, filled at once; ``dq`` if that is given."""
        channels = rounded_up(variant.head_dim, tile.channels)
        shapes = []
        if dq is None:
            leading, rows = rounded_rows(call.q, call.bounds[0], tile.queries)
            shapes.append((*leading, rows * channels))
        if variant.adds_keys:
            # The kernels use one head dimension for both if heads share a KV head.
            k = call.k
            if variant.mask.block_stride is not None and not variant.deterministic:
                k = k[:1]  # which all segments add to
            leading, rows = rounded_rows(k, call.bounds[1], tile.keys)
            shapes += [(*leading, rows * channels)] * 2
        given = [] if dq is None else [dq]
        if not shapes:
            return cls(*given)
        return cls(*given, *_zeros(shapes, torch.float32, call.q.device))


def new_query_sums(q: Tensor) -> Tensor:
    """Zeros to which backwards of a batch ``q (B, T, H, D)`` add: ``(B, H, rows * D)``.

    They lie as :class:`nsa.fused.fa4_variants.SumsOrder` says, in whole tiles.
    """
    batch, length, heads, head_dim = q.shape
    rows = rounded_up(length, sums_order(head_dim).rows)
    dtype = accumulation_dtype(q.dtype)
    return torch.zeros(batch, heads, rows * head_dim, dtype=dtype, device=q.device)


class Semaphores(NamedTuple):
    """Of a deterministic backward: int32, how many CTAs have added to each tile of the sums.

    ``(B, heads, tiles, 1)``, with the tiles of all packed sequences in one row, as in
    :class:`Sums`. They are small beside these, so the memory estimate leaves them out.
    """

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None

    @classmethod
    def new(cls, call: Call, variant: Variant, tile: BackwardTile) -> "Semaphores":
        """Zeros, or None where no CTA waits for another."""
        if not variant.deterministic:
            return cls()
        shapes = [_tiles_shape(*rounded_rows(call.q, call.bounds[0], tile.queries), tile.queries)]
        if variant.adds_keys:
            rows = rounded_rows(call.k, call.bounds[1], tile.keys)
            shapes += [_tiles_shape(*rows, tile.keys)] * 2
        return cls(*_zeros(shapes, torch.int32, call.q.device))


def _tiles_shape(leading: tuple[int, ...], rows: int, tile: int) -> tuple[int, ...]:
    return (*(1,) * (2 - len(leading)), *leading, rows // tile, 1)


def _zeros(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Tensors of these shapes, filled at once."""
    sizes = list(map(math.prod, shapes))
    zeros = torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes)
    return (x.view(shape) for x, shape in zip(zeros, shapes, strict=True))


def rounded_rows(x: Tensor, bounds: Tensor | None, tile: int) -> tuple[tuple[int, ...], int]:
    """Leading dimensions, and the rows of a head if each sequence starts at a new tile."""
    length, heads = x.shape[-3:-1]
    leading = (x.shape[0], heads) if bounds is None else (heads,)
    return leading, padded_rows(length, _sequences(bounds), tile)


def _sequences(bounds: Tensor | None) -> int | None:
    return None if bounds is None else bounds.shape[0] - 1


def padded_rows(length: int, sequences: int | None, tile: int) -> int:
    """Rows of the buffers. Each of several packed ``sequences`` has a tile more."""
    if sequences is None:
        return rounded_up(length, tile)
    return (length + (sequences + 1) * tile - 1) // tile * tile


def sums_bytes(
    heads: int, kv_heads: int, head_dim: int, queries: int, keys: int, sequences: int | None = None
) -> int:
    """Bytes of :class:`Sums` and of padded statistics, at most, for so many queries and keys in one
    entry of a batch."""
    numbers = heads * padded_rows(queries, sequences, LARGEST_TILE) * (head_dim + 2)
    shared = heads > kv_heads
    return 4 * numbers + shared * key_sums_bytes(kv_heads, head_dim, keys, sequences)


def key_sums_bytes(kv_heads: int, head_dim: int, keys: int, sequences: int | None = None) -> int:
    """Bytes of the sums of keys and values in :class:`Sums`, at most."""
    return 8 * kv_heads * padded_rows(keys, sequences, LARGEST_TILE) * head_dim


def more_segments_bytes(kv_heads: int, head_dim: int, queries: int, keys: int) -> int:
    """Bytes, at most, of the sums of keys of all segments but the first, in a fixed order."""
    segments = min(ORDERED_SEGMENTS, -(-queries // SHORT_SEGMENT))
    return (segments - 1) * key_sums_bytes(kv_heads, head_dim, keys)


def query_sums_bytes(batch: int, heads: int, head_dim: int, queries: int) -> int:
    """Bytes of :func:`new_query_sums` at most."""
    return 4 * batch * heads * padded_rows(queries, None, LARGEST_TILE) * head_dim


def rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
