"""On the GPU: scores of few tiles, against emulation, and bits of equal keys."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


def spaced(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x (B, R, H, D)`` as the first of every 3 rows; the others are NaN."""
    wide = x.new_full((x.shape[0], 3 * x.shape[1], *x.shape[2:]), torch.nan)
    return wide[:, ::3].copy_(x)


@pytest.mark.parametrize(("tiles", "keys"), [(1, 1), (9, 127), (8, 129), (33, 300)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (16, 1)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [False, True], ids=["first", "mean"])
def test_scores(mean, dtype, head_dim, heads, kv_heads, tiles, keys):
    summary = torch.randn(2, tiles, heads, head_dim, device="cuda")
    summary = summary if mean else summary.to(dtype)
    k_cmp = torch.randn(2, keys, kv_heads, head_dim, device="cuda").to(dtype)
    k_cmp[:, keys // 2] = k_cmp[:, 0]
    wanted = emulated_kernels.tile_scores(summary, k_cmp)
    for given, given_keys in ((summary, k_cmp), (spaced(summary), slice_of_heads(k_cmp))):
        scores = kernel_calls.tile_scores(given, given_keys)
        assert scores.dtype == torch.float32
        # Products of float64 are added in another order.
        torch.testing.assert_close(scores, wanted, rtol=3e-7, atol=1e-6)
        assert torch.equal(scores[..., keys // 2], scores[..., 0])
