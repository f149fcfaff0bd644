"""What token mode's kernels know of tokens and blocks, and how much of them is done at a time."""

import pytest
import torch

import nsa
from nsa.fused.token_inputs import make_token_blocks
from nsa.fused.waves import (
    GRADIENT_BYTES,
    WORKSPACE_BYTES,
    choose_chunk_tokens,
    gradient_wave_bytes,
    partial_gradient_bytes,
    partial_words,
    units_of_gradient_wave,
    units_of_wave,
)
from nsa.geometry import Geometry
from nsa.segments import QuerySegments, Segments, SingleSegment
from nsa.testing import make_cu_seqlens
from tests.helpers.token_cases import LENGTHS, SEGMENTS, make_geometry

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
    assert (blocks.segments, blocks.earlier) == (len(lengths), 0)
    # Nothing is computed twice if each sequence has as many queries as keys.
    assert blocks.row is blocks.run_first is blocks.first
    assert blocks.run_base is blocks.base


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


@pytest.mark.parametrize(("chunk_tokens", "units"), [(4096, 8), (1024, 35), (1 << 16, 1)])
def test_a_wave_fits_the_workspace_but_is_a_unit_at_least(chunk_tokens, units):
    words = partial_words(128, is_packed=True)
    assert units_of_wave(chunk_tokens, 16, 16, words) == units
    unit_bytes = chunk_tokens * 16 * 16 * (128 * 3 // 2 + 4)
    assert units == 1 or units * unit_bytes <= WORKSPACE_BYTES < (units + 1) * unit_bytes


@pytest.mark.parametrize(
    ("query_bytes", "room"),
    [
        (GRADIENT_BYTES // 2, GRADIENT_BYTES),
        (1000 << 20, 2000 << 20),
        (1500 << 20, 2048 << 20),
        (3 << 30, 3 << 30),
    ],
)
@pytest.mark.parametrize(
    ("chunk_tokens", "tiles", "units"), [(2048, 1, 8), (2048, 2, 4), (1 << 20, 1, 1)]
)
def test_a_wave_of_partial_gradients_fits_too(chunk_tokens, tiles, units, query_bytes, room):
    unit_bytes = chunk_tokens * partial_gradient_bytes(16, 16, 128, tiles)
    assert unit_bytes >= chunk_tokens * 16 * 16 * tiles * (128 * 2 + 4 * 2)
    actual = units_of_gradient_wave(unit_bytes, query_bytes)
    assert gradient_wave_bytes(query_bytes) == room
    assert actual == 1 or actual * unit_bytes <= room < (actual + 1) * unit_bytes
    if room == GRADIENT_BYTES:
        assert actual == units


@pytest.mark.parametrize("lengths", [[70, 1, 1, 1, 32, 33], [1] * 40, [300], [31, 65, 64, 33]])
@pytest.mark.parametrize("tokens", [16, 64])
def test_no_more_runs_have_tokens_in_a_range(lengths, tokens):
    config = nsa.NSAConfig.paper(select_block_size=SIZE)
    packed = torch.zeros(sum(lengths), 1, 8)
    blocks = make_token_blocks(Geometry.of(packed, packed, config, make_cu_seqlens(lengths)), 1)
    numbers = [i for i, keys in enumerate(blocks.keys.tolist()) for _ in range(keys)]
    assert len(numbers) == sum(lengths)
    seen = [len(set(numbers[start : start + tokens])) for start in range(len(numbers))]
    assert max(seen) <= blocks.most_runs(tokens, SIZE) <= tokens


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", SEGMENTS)
@pytest.mark.parametrize("size", [32, 64])
def test_blocks_of_segments(form, size, causal):
    """Each token's rows and blocks, one by one."""
    config = nsa.NSAConfig.paper(select_block_size=size, causal=causal)
    blocks = make_token_blocks(make_geometry(form, config), 1)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    token, runs = 0, []
    for sequence, first, count in SEGMENTS[form]:
        for position in range(first, first + count):
            base, own = int(blocks.base[token]), position // size
            number = -(-LENGTHS[sequence] // size)
            assert blocks.limit[token] == (own + 1 if causal else number)
            for block in range(number):
                key = starts[sequence] + block * size
                assert blocks.first[base + block] == key
                assert blocks.keys[base + block] == min(size, LENGTHS[sequence] - block * size)
                # Of a token at the block's first key.
                assert blocks.row[base + block] == token - position + block * size
            if position == first or position % size == 0:
                runs.append(token)
            assert blocks.run_first[blocks.run_base[token] + own] == runs[-1]
            token += 1
    assert blocks.run_first.tolist()[: len(runs)] == runs
    if form != "whole":
        rest = blocks.run_first.tolist()[len(runs) :]
        assert rest == [token] * len(rest)
        assert rest, "the last run has an end"


def test_blocks_of_a_batch_of_segments():
    """Two segments over the keys of each entry."""
    config = nsa.NSAConfig.paper(select_block_size=SIZE)
    rows, keys = Segments(torch.tensor([0, 10, 50]), 50), SingleSegment(100, torch.device("cpu"))
    first, sequence = torch.tensor([20, 60]), torch.tensor([0, 0])
    geometry = Geometry(QuerySegments(rows, first, sequence), keys, config)
    blocks = make_token_blocks(geometry, 2)
    one = make_token_blocks(geometry, 1)
    tokens = slice(50, 100)
    assert torch.equal(blocks.base[tokens], one.base + 8)
    assert torch.equal(blocks.first[8:], one.first + 100)
    assert torch.equal(blocks.row[8:], one.row + 50)
    assert torch.equal(blocks.limit, one.limit.repeat(2))
    position = torch.cat((torch.arange(20, 30), torch.arange(60, 100)))
    own = (position // SIZE).repeat(2)
    first_of_run = blocks.run_first[blocks.run_base + own].tolist()
    # Positions 20 to 29 are one run; 60 to 63, 64 to 95 and 96 to 99 are three.
    runs = [0] * 10 + [10] * 4 + [14] * 32 + [46] * 4
    assert first_of_run == runs + [token + 50 for token in runs]
