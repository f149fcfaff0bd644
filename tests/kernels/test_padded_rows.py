"""On the GPU: row statistics in whole tiles, as FlashAttention-4's backward loads them."""

import pytest
import torch

from nsa.fused.kernel_inputs import RowStatistics
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.poison import poisoned_memory

pytestmark = gpu_test


def padded(statistics, rows, tile, bounds=None):
    from nsa.fused.kernels.padded_rows import pad_statistics

    with poisoned_memory():
        return pad_statistics(statistics, rows, tile, bounds)


def numbers(*shape) -> RowStatistics:
    return RowStatistics(*torch.randn(2, *shape, device="cuda"))


@pytest.mark.parametrize("folded", [False, True])
def test_a_batch(folded):
    given = numbers(3, 5, 2, 100)
    if folded:
        # Heads are neighbours, rows are not.
        given = [x[:, 0, 1].unflatten(1, (-1, 4)).mT for x in given]
    else:
        given = [x[:, :, 1] for x in given]
    length = given[0].shape[2]
    found = padded(RowStatistics(*given), 192, 64)
    for x, y, padding in zip(found, given, (torch.inf, 0), strict=True):
        assert torch.equal(x[..., :length], y)
        assert (x[..., length:] == padding).all()


@pytest.mark.parametrize("tile", [64, 80])
def test_packed_sequences(tile):
    lengths = [0, 1, 100, 0, 64, 300, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    given, rows = numbers(700, 6), (700 + (len(lengths) + 1) * tile - 1) // tile * tile
    given = RowStatistics(*(x.mT for x in given))
    found = padded(given, rows, tile, bounds.int().cuda())
    expected = [torch.full((6, rows), x, device="cuda") for x in (torch.inf, 0.0)]
    for i, length in enumerate(lengths):
        start = (int(bounds[i]) + i * tile) // tile * tile
        for x, y in zip(expected, given, strict=True):
            x[:, start : start + length] = y[:, bounds[i] : bounds[i + 1]]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
