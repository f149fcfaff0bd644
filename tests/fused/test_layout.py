"""The plan of one sequence, in closed form, equals that of packed sequences with one in them."""

import pytest
import torch

import nsa
from nsa.blocks import Geometry, Segments
from nsa.fused.layout import Plan

CONFIGS = {
    "default": nsa.NSAConfig(),
    "overlapping": nsa.NSAConfig(selection="token", compress_block_size=32, compress_stride=16),
    "not causal": nsa.NSAConfig(causal=False),
    "started": nsa.NSAConfig(compressed_visibility="started"),
    "first query": nsa.NSAConfig(tile_summary="first"),
    "sparse compressed": nsa.NSAConfig(num_cmp_selected_blocks=2),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("length", [1, 63, 64, 300, 512, 1024])
def test_single_sequence(length, config):
    config, device = CONFIGS[config], torch.device("cpu")
    single = Plan(Geometry.single(length, device, config), 64, None, None)
    tokens = Segments(torch.tensor([0, length]), length)
    packed = Plan(Geometry(tokens, config), 64, None, None)

    for name in ("tokens", "compressed", "selection", "tiles", "groups"):
        actual, expected = getattr(single.geometry, name), getattr(packed.geometry, name)
        assert (actual.total, actual.num_sequences) == (expected.total, expected.num_sequences)
        for values in ("offset", "count", "owner", "local", "real"):
            assert_equal(getattr(actual, values), getattr(expected, values))
    for name in ("first", "visible", "candidates", "own"):
        assert_equal(getattr(single.scoring, name), getattr(packed.scoring, name))
    for name in ("block_start", "blocks_of_token"):
        assert_equal(getattr(single, name), getattr(packed, name))
    for name in ("tile_key_blocks", "tile_cmp_key_blocks", "token_candidates"):
        for actual, expected in zip(getattr(single, name), getattr(packed, name), strict=True):
            assert_equal(actual, expected)
    filled = single.scoring.filled
    assert_equal(torch.ones(len(packed.scoring.filled)) if filled is None else filled,
                 packed.scoring.filled)  # fmt: skip


def assert_equal(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
