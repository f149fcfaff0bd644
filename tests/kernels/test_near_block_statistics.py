"""On the GPU: statistics with which a window's backward attends near blocks."""

import pytest
import torch

from nsa.fused.kernel_inputs import LEFT_OUT, RowStatistics
from tests.helpers import emulated_token_kernels
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.poison import poisoned_memory

pytestmark = gpu_test


def statistics(*shape) -> RowStatistics:
    """Of which the branches are far apart for some rows, and P is 0 for others."""
    lse, delta = 8 * torch.randn(2, *shape, device="cuda")
    lse *= torch.randint(0, 30, shape, device="cuda")
    return RowStatistics(lse.masked_fill(torch.rand_like(lse) < 0.1, torch.inf), delta)


def lists(batch: int, length: int, kv_heads: int, slots: int, first: int) -> torch.Tensor:
    """Different blocks, about half of which are near, in any order; -1 in some places."""
    own = (torch.arange(length, device="cuda") + first) // 64
    distance = torch.rand(batch, length, kv_heads, 2 * slots, device="cuda").argsort(-1)
    blocks = own[:, None, None] - distance[..., :slots]
    empty = (blocks < 0) | (torch.rand(blocks.shape, device="cuda") < 0.1)
    return blocks.masked_fill(empty, -1).int()


@pytest.mark.parametrize(
    ("group", "kv_heads", "slots", "batch", "length", "first"),
    [(16, 4, 16, 1, 1000, 0), (3, 2, 5, 2, 200, 192), (1, 3, 4, 2, 128, 64)],
    ids=str,
)
@pytest.mark.parametrize("strided", [False, True])
def test_equals_the_emulation(group, kv_heads, slots, batch, length, first, strided):
    from nsa.fused.kernels.near_block_statistics import join_near_blocks

    heads, tokens = group * kv_heads, batch * length
    window, selected = statistics(heads, tokens), statistics(tokens, heads)
    indices = lists(batch, length, kv_heads, slots, first).flatten(0, 1)
    if strided:
        indices = indices.transpose(0, 1).contiguous().transpose(0, 1)
    call = (indices, batch, first, 64)
    with poisoned_memory():
        joint, others = join_near_blocks(window, selected, *call)
    wide = (RowStatistics(*(x.double() for x in y)) for y in (window, selected))
    expected, expected_others = emulated_token_kernels.join_near_blocks(*wide, *call)
    assert torch.equal(others, expected_others)
    assert (others == LEFT_OUT).any()
    assert (others >= 0).any()
    for x, y in zip(joint, expected, strict=True):
        assert x.shape == y.shape
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
