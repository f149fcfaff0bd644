"""On the GPU: the kernel that selects blocks against its emulation, bit for bit."""

import math

import pytest
import torch

import nsa
from nsa.fused import kernel_calls, selection
from nsa.testing import make_inputs
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test

pytestmark = gpu_test

# Blocks taken and compressed tokens in a block: one to eight registers, each way to share lanes.
FORMS = [(1, 1), (16, 1), (16, 3), (16, 4), (33, 1), (64, 128), (200, 2), (256, 1)]
WIDTHS = [1, 31, 32, 33, 127, 128, 513, 1000, 16384, 40000]
KINDS = ["ties", "rising", "equal", "a lane", "NaN"]
BATCH, HEADS, TILES, TOTAL, TILE_OFFSET, COLUMN_OFFSET = 2, 3, 5, 8, 2, 7


def make_scores(width: int, kind: str) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(width)
    scores = torch.randn(BATCH, HEADS, TILES, width, device="cuda", generator=generator)
    if kind == "ties":
        return torch.where(scores < -1, -math.inf, scores.round())  # -0.0 among them
    if kind == "rising":
        return scores + torch.arange(width, device="cuda") * 0.01
    if kind == "equal":
        return scores.zero_()
    if kind == "a lane":  # has the best of all steps
        return scores + (torch.arange(width, device="cuda") % 32 == 5) * 10.0
    return torch.where(scores < -1, math.nan, scores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "per_block"), FORMS, ids=str)
def test_top_blocks(count, per_block, kind):
    generator = torch.Generator().manual_seed(0)

    def some(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    for width in WIDTHS:
        start = [some(0, min(width, 5)) for _ in range(TOTAL)]
        visible = [width - s if i % 3 == 2 else some(0, width - s) for i, s in enumerate(start)]
        visible[3] = 0
        candidates = [-(-x // per_block) + some(0, 3) for x in visible]
        candidates[4] = 0
        own = [x - 1 if kind == "ties" else some(0, max(0, x - 1)) for x in candidates]
        initial = some(0, min(2, count))
        first = [COLUMN_OFFSET + s for s in start]
        rules = dict(
            tile_offset=TILE_OFFSET,
            column_offset=COLUMN_OFFSET,
            scale=128**-0.5,
            per_block=per_block,
            num_initial=initial,
            num_local=some(0, min(3, count - initial)),
        )
        vectors = [
            torch.tensor(x, dtype=torch.int32, device="cuda")
            for x in (first, visible, candidates, own)
        ]
        scores = make_scores(width, kind)
        shape = (BATCH, TOTAL, HEADS, count)
        expected, actual = (
            torch.full(shape, -7, dtype=torch.int32, device="cuda") for _ in range(2)
        )
        emulated_kernels.top_blocks(scores, *vectors, expected, **rules)
        kernel_calls.top_blocks(scores, *vectors, actual, **rules)
        assert torch.equal(actual, expected), width


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [(16, 1, 16, 32), (5, 3, 40, 12)], ids=str)
def test_blocks_and_groups(form, kind):
    count, per_block, group_count, per_group = form
    rules = dict(tile_offset=TILE_OFFSET, column_offset=COLUMN_OFFSET, scale=128**-0.5)
    rules |= dict(per_block=per_block, per_group=per_group, num_initial=1, num_local=2)
    for width in WIDTHS:
        start = [i % (min(width, 5) + 1) for i in range(TOTAL)]
        visible = [0 if i == 3 else (width - s) // (1 + i % 2) for i, s in enumerate(start)]
        candidates = [0 if i == 4 else -(-x // per_block) + i % 3 for i, x in enumerate(visible)]
        own = [max(0, x - 1 - i % 2) for i, x in enumerate(candidates)]
        first = [COLUMN_OFFSET + s for s in start]
        vectors = [
            torch.tensor(x, dtype=torch.int32, device="cuda")
            for x in (first, visible, candidates, own)
        ]
        scores = make_scores(width, kind)
        expected, actual = (
            [
                torch.full((BATCH, TOTAL, HEADS, n), -7, dtype=torch.int32, device="cuda")
                for n in (count, group_count)
            ]
            for _ in range(2)
        )
        emulated_kernels.top_blocks_and_groups(scores, *vectors, *expected, **rules)
        kernel_calls.top_blocks_and_groups(scores, *vectors, *actual, **rules)
        for found, wanted in zip(actual, expected, strict=True):
            assert torch.equal(found, wanted), width


def test_bfloat16_parts_score_as_float32(monkeypatch):
    q, k, _ = make_inputs((2, 5000), 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    expected = nsa.select_blocks(q, k, backend="fused")
    monkeypatch.setattr(selection, "FEW_SCORES", 1)
    assert torch.equal(nsa.select_blocks(q, k, backend="fused"), expected)
