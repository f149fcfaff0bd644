"""On the GPU: the kernels of block lists against their emulation, past the sizes of a warp and of a
CTA's counters."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.requirements import import_fused

rank_query_tiles = import_fused("nsa.fused.kernels.key_block_lists").rank_query_tiles

pytestmark = gpu_test


def assert_same_lists(actual, expected):
    for (count, index), (wanted_count, wanted_index) in zip(actual, expected, strict=True):
        assert torch.equal(count, wanted_count)
        assert index.shape == wanted_index.shape
        used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
        assert torch.equal(index[used], wanted_index[used])


@pytest.mark.parametrize("has_full", [False, True], ids=["partial", "partial and full"])
@pytest.mark.parametrize(
    ("batch", "tiles", "heads", "listed", "parts", "entry_blocks"),
    [(1, 1, 1, 1, 1, 1), (2, 5, 3, 16, 1, 99), (3, 7, 5, 31, 3, 200), (1, 9, 2, 40, 2, 37)],
)
def test_list_key_blocks(batch, tiles, heads, listed, parts, entry_blocks, has_full):
    first = torch.randint(0, 5, (tiles,), dtype=torch.int32)
    num_blocks = torch.randint(0, entry_blocks + 1, (tiles,), dtype=torch.int32)
    num_full = (num_blocks * torch.rand(tiles)).int() if has_full else None
    blocks = -(-entry_blocks // parts)
    order = torch.rand(batch, tiles, heads, max(listed, blocks)).argsort(-1)[..., :listed]
    order = torch.where(order * parts < num_blocks[:, None, None], order, 10**9)
    indices = order.sort(-1).values
    indices = torch.where(indices < 10**9, indices, -1).int()
    arguments = (indices, first, num_blocks, num_full)
    device = [x if x is None else x.cuda() for x in arguments]
    actual = kernel_calls.list_key_blocks(*device, parts, entry_blocks)
    expected = emulated_kernels.list_key_blocks(*device, parts, entry_blocks)
    pairs = ((0, 1), (2, 3)) if has_full else ((0, 1),)
    assert_same_lists(*([(x[i], x[j]) for i, j in pairs] for x in (actual, expected)))


@pytest.mark.parametrize(
    ("heads", "tiles", "width", "num_blocks"),
    [(1, 1, 1, 1), (3, 31, 16, 1024), (2, 300, 33, 1025), (5, 17, 70, 5000), (2, 9, 3, 4)],
)
def test_list_query_tiles(heads, tiles, width, num_blocks):
    count = torch.randint(width + 1, (1, heads, tiles), device="cuda").int()
    order = torch.rand(1, heads, tiles, num_blocks, device="cuda").argsort(-1)
    index = order[..., :width].int().contiguous()
    expected = emulated_kernels.list_query_tiles(count, index, num_blocks, tiles)
    longest = max(1, int(expected[0].max()))
    for new_width in (longest, tiles):
        actual = kernel_calls.list_query_tiles(count, index, num_blocks, new_width)
        wanted = (expected[0], expected[1][..., :new_width])
        assert_same_lists([actual], [wanted])
    assert torch.equal(kernel_calls.count_query_tiles(count, index, num_blocks), expected[0])


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(
    ("heads", "tiles", "width", "num_blocks"),
    [(1, 1, 1, 1), (3, 31, 16, 1024), (2, 300, 33, 1025), (5, 17, 70, 5000), (2, 9, 3, 4)],
)
def test_ranks_of_entries(heads, tiles, width, num_blocks, repeats):
    """Those of each block of a head go up by one, from tile to tile."""
    count = torch.randint(width + 1, (1, heads, tiles)).int()
    order = torch.rand(1, heads, tiles, max(num_blocks, width)).argsort(-1)[..., :width]
    if repeats:
        order = order // 3
    index = (order % num_blocks).int()
    rank = rank_query_tiles(count.cuda(), index.cuda(), num_blocks).cpu()
    for head in range(heads):
        added = {}
        for tile in range(tiles):
            entries = int(count[0, head, tile])
            found = {}
            for block, place in zip(
                index[0, head, tile, :entries].tolist(),
                rank[0, head, tile, :entries].tolist(),
                strict=True,
            ):
                found.setdefault(block, []).append(place)
            for block, places in found.items():
                first = added.get(block, 0)
                assert sorted(places) == list(range(first, first + len(places)))
                added[block] = first + len(places)
