"""How much work token mode's selected branch does at a time.

A unit is a KV head and a chunk of tokens; a wave is the units whose partial results fit the
workspace. See :mod:`nsa.fused.kernels.inverted_index`.
"""

import torch

from nsa.fused.hardware import WGMMA_ROWS

WORKSPACE_BYTES = 27 << 26
"""The most bytes of partial results in a wave. They hold two chunks of 4,096 tokens with 64 heads
of 128 channels and 16 blocks in bfloat16; with 1.5 GiB an eighth of those would need a second
wave."""


GRADIENT_BYTES = 9 << 27
"""Bytes of partial gradients of queries that a wave may have at any length: those of 4 chunks of
4,096 tokens with 16 heads of 128 channels and 16 blocks."""


def choose_chunk_tokens(total: int, group: int, blocks: int, slots: int, row_bytes: int) -> int:
    """Tokens of a chunk, a power of two. The queries of a KV head and chunk take about 16 MiB of
    L2, and so do output gradients, beside data that streams through. More if a block's keys would
    serve too few tokens. While torch.compile traces, an upper bound."""
    fits = (16 << 20) // (group * row_bytes)
    enough = 16 * blocks // slots
    most = min(max(fits, enough, 64) - 1, max(total - 1, 63))
    if torch.compiler.is_compiling():
        # Its bits would be guarded, so each length would compile again.
        return 2 * most
    return 1 << most.bit_length()


def partial_words(head_dim_v: int, is_packed: bool) -> int:
    """Words of 4 bytes in a row of partial results, which takes 3/4 of the bytes if it
    ``is_packed``. See
    :mod:`nsa.fused.kernels.partial_rows`."""
    return head_dim_v * (3 if is_packed else 4) // 8


def units_of_wave(chunk_tokens: int, slots: int, group: int, row_words: int) -> int:
    """Units in a wave: as many as have partial results that fit the workspace."""
    pair_bytes = group * 4 * (row_words + 1)
    return max(1, WORKSPACE_BYTES // (chunk_tokens * slots * pair_bytes))


def has_wide_rows(head_dim: int, head_dim_v: int) -> bool:
    """Whether dK and dV of 64 keys do not fit the registers of a warpgroup."""
    return head_dim + head_dim_v > 320


def key_tiles(head_dim: int, head_dim_v: int, block_size: int) -> int:
    """How many CTAs of the backward share a block. Each has partial gradients of the queries."""
    return 2 if block_size > WGMMA_ROWS and has_wide_rows(head_dim, head_dim_v) else 1


def partial_gradient_bytes(slots: int, group: int, head_dim: int, tiles: int) -> int:
    """Bytes, at most, of the partial gradients of a token's queries of one KV head: 2 a channel,
    and 4 a part of 32 channels or more. Packed ones have 1.5 a channel and no more."""
    return slots * tiles * group * (2 * head_dim + head_dim // 8)


def gradient_wave_bytes(query_bytes: int) -> int:
    """The most bytes of partial gradients in a wave: as many as the queries have, or up to 2 GiB
    twice as many. Larger waves help, because some processors are idle at the end of each."""
    return max(GRADIENT_BYTES, min(2 * query_bytes, 1 << 31), query_bytes)


def units_of_gradient_wave(unit_bytes: int, query_bytes: int) -> int:
    """Units in a wave of the backward, if each has so many bytes of partial gradients."""
    return max(1, gradient_wave_bytes(query_bytes) // unit_bytes)
