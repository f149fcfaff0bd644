"""What token mode's kernels know of tokens and blocks, and how much of them is done at a time."""

import pytest
import torch

import nsa
from nsa.fused.kernel_inputs import (
    WORKSPACE_BYTES,
    choose_chunk_tokens,
    make_token_blocks,
    units_of_wave,
)
from nsa.geometry import Geometry
from nsa.testing import make_cu_seqlens

SIZE = 32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "batch"), [([70, 0, 1, 32, 33], None), ([70], 2), ([64], 1), ([1], 3)]
)
def test_blocks_are_numbered_through(lengths, batch, causal):
    config = nsa.NSAConfig.paper(select_block_size=SIZE, causal=causal)
    if batch is None:
        packed = torch.zeros(sum(lengths), 1, 8)
        geometry = Geometry.of(packed, packed, config, make_cu_seqlens(lengths))
        blocks = make_token_blocks(geometry, 1)
    else:
        geometry = Geometry.equal(1, *lengths, *lengths, torch.device("cpu"), config)
        blocks = make_token_blocks(geometry, batch)
        lengths = lengths * batch
    base, limit, first, keys = [], [], [], []
    for length in lengths:
        start, count = len(base), -(-length // SIZE)
        for token in range(length):
            base.append(len(first))
            limit.append(token // SIZE + 1 if causal else count)
        first += [start + SIZE * block for block in range(count)]
        keys += [min(SIZE, length - SIZE * block) for block in range(count)]
    assert (blocks.base.tolist(), blocks.limit.tolist()) == (base, limit)
    # There may be room for more.
    assert blocks.first.tolist()[: len(first)] == first
    assert blocks.keys.tolist() == keys + [0] * (len(blocks.keys) - len(keys))
    assert blocks.sequences == len(lengths)


@pytest.mark.parametrize(
    ("total", "group", "blocks", "tokens"),
    [
        (65536, 16, 1024, 4096),
        (65536, 4, 1024, 16384),
        (1000, 16, 16, 1024),
        (1, 16, 1, 64),
        (1 << 22, 16, 1 << 16, 1 << 16),
    ],
)
def test_a_chunk_is_what_l2_holds_but_enough_for_a_block(total, group, blocks, tokens):
    assert choose_chunk_tokens(total, group, blocks, 16, 256) == tokens


@pytest.mark.parametrize(("chunk_tokens", "units"), [(4096, 7), (1024, 31), (1 << 16, 1)])
def test_a_wave_fits_the_workspace_but_is_a_unit_at_least(chunk_tokens, units):
    assert units_of_wave(chunk_tokens, 16, 16, 128) == units
    unit_bytes = chunk_tokens * 16 * 16 * (128 * 2 + 4)
    assert units == 1 or units * unit_bytes <= WORKSPACE_BYTES < (units + 1) * unit_bytes


@pytest.mark.parametrize("lengths", [[70, 1, 1, 1, 32, 33], [1] * 40, [300], [31, 65, 64, 33]])
@pytest.mark.parametrize("tokens", [16, 64])
def test_no_more_blocks_have_tokens_in_a_range(lengths, tokens):
    config = nsa.NSAConfig.paper(select_block_size=SIZE)
    packed = torch.zeros(sum(lengths), 1, 8)
    blocks = make_token_blocks(Geometry.of(packed, packed, config, make_cu_seqlens(lengths)), 1)
    numbers = [i for i, keys in enumerate(blocks.keys.tolist()) for _ in range(keys)]
    assert len(numbers) == sum(lengths)
    seen = [len(set(numbers[start : start + tokens])) for start in range(len(numbers))]
    assert max(seen) <= blocks.most_of_range(tokens, SIZE) <= tokens
