"""Which blocks each token may attend, and which keys each block has, as the kernels of the selected
branch of token mode read it: all entries of the batch in one row of tokens. And how much of their
work they do at a time (:mod:`nsa.fused.kernels.inverted_index`)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import Geometry, Segments

WORKSPACE_BYTES = 2 << 30
"""What the partial results of a wave may take."""


class TokenBlocks(NamedTuple):
    """Blocks of consecutive sequences, numbered through, and the tokens of these.

    Block ``J`` of a token's sequence is block ``base + J`` of all, and the token may attend it if
    ``0 <= J < limit``. All tensors are int32.

    Args:
        base: ``(T,)``, the first block of each token's sequence.
        limit: ``(T,)``, how many of them it may attend; 0 for tokens of no sequence.
        first: ``(blocks,)``, the first token of each block.
        keys: ``(blocks,)``, how many it has; 0 for blocks of no sequence.
        sequences: how many there are.
    """

    base: Tensor
    limit: Tensor
    first: Tensor
    keys: Tensor
    sequences: int

    def most_of_range(self, tokens: int, block_size: int) -> int:
        """More blocks than this have no token among ``tokens`` consecutive ones."""
        # A sequence that starts there has one that is not full, the one before it two.
        return min(tokens, tokens // block_size + min(self.sequences, tokens) + 1)


def make_token_blocks(geometry: Geometry, batch: int) -> TokenBlocks:
    """The blocks of a batch of ``batch`` entries that ``geometry`` describes."""
    tokens, blocks = geometry.tokens, geometry.selection
    if batch > 1:
        # A batch has one sequence an entry.
        tokens, blocks = (_repeat(x, batch) for x in (tokens, blocks))
    size = geometry.config.select_block_size
    length = tokens.count[tokens.owner]
    limit = tokens.local // size + 1 if geometry.config.causal else (length + size - 1) // size
    done = blocks.local * size
    keys = (tokens.count[blocks.owner] - done).clamp(0, size)
    return TokenBlocks(
        base=blocks.offset[tokens.owner].int(),
        limit=torch.where(tokens.real, limit, 0).int(),
        first=(tokens.offset[blocks.owner] + done).int(),
        keys=keys.int(),
        sequences=len(tokens.count),
    )


def _repeat(items: Segments, times: int) -> Segments:
    offset = torch.arange(times + 1, device=items.device) * items.total
    return Segments(offset, times * items.total)


def choose_chunk_tokens(total: int, group: int, blocks: int, slots: int, row_bytes: int) -> int:
    """A power of two: queries of a KV head and chunk take 16 MiB of L2, beside what streams through
    it, but a block's keys are loaded for enough tokens."""
    fits = (16 << 20) // (group * row_bytes)
    enough = 16 * blocks // slots
    return 1 << min(max(fits, enough, 64) - 1, max(total - 1, 63)).bit_length()


def units_of_wave(chunk_tokens: int, slots: int, group: int, head_dim_v: int) -> int:
    """How many units' partial results fit the workspace."""
    pair_bytes = group * (2 * head_dim_v + 4)
    return max(1, WORKSPACE_BYTES // (chunk_tokens * slots * pair_bytes))
