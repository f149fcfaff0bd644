"""On the GPU: what rounds sums of blocks of keys, against float64, rounded once."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


def as_added(x: torch.Tensor) -> torch.Tensor:
    """``x (..., T, H, D)`` in the layout of the sums: see :mod:`nsa.fused.kernels.block_sums`."""
    heads, dim = x.shape[-2:]
    # Block, warp, one of two rows, row, head, vector, lane of a quad, column of a lane.
    parts = x.reshape(-1, 4, 2, 8, heads, dim // 8, 4, 2)
    return parts.permute(0, 4, 1, 5, 3, 6, 2, 7).reshape(x.shape).contiguous()


@pytest.mark.parametrize("last", [None, 1, 71, 192])
@pytest.mark.parametrize("mean_dtype", [None, torch.float32, "own"], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_with_what_is_added(dtype, dim, mean_dtype, last):
    """Of two entries, and blocks of means that end before the keys do."""
    shape, factors = (2, 2, 192, 3, dim), (0.3, 1.0)
    sums = torch.randn(shape, device="cuda")
    added, exact = {}, {}
    if last is not None:
        rows = torch.randn(2, 2, last, 3, dim, device="cuda").to(dtype)
        added["last"], exact["last"] = [slice_of_heads(x) for x in rows], rows.double()
    if mean_dtype is not None:
        dmean_dtype = dtype if mean_dtype == "own" else mean_dtype
        dmeans = torch.randn(2, 2, 5, 3, dim, device="cuda").to(dmean_dtype)
        added |= dict(dmeans=dmeans.unbind(), block_size=32)
        exact |= dict(dmeans=dmeans.double(), block_size=32)
    out = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    kernel_calls.round_listed_sums([as_added(x) for x in sums], out.unbind(), factors, **added)
    expected = torch.empty(shape, dtype=torch.float64, device="cuda")
    emulated_kernels.round_listed_sums(sums.double(), expected, factors, **exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("last", [None, 71])
def test_those_of_keys_alone_are_the_same(last):
    sums = torch.randn(2, 192, 3, 128, device="cuda")
    both, alone, other = torch.full((3, *sums.shape), torch.nan, device="cuda").half()
    added = [] if last is None else [both.new_ones(2, last, 3, 128)]
    kernel_calls.round_listed_sums((sums,), (alone,), (0.3,), added or None)
    kernel_calls.round_listed_sums((sums, sums), (both, other), (0.3, 1.0), 2 * added or None)
    assert both.isfinite().all()
    assert torch.equal(alone, both)


def test_other_shapes_are_refused():
    sums, out = (torch.zeros(64, 2, 64, dtype=x, device="cuda") for x in (None, torch.float16))
    for wrong in (out[:, :1], out[None], out.float(), torch.cat((out, out))):
        with pytest.raises(ValueError, match="last is"):
            kernel_calls.round_listed_sums((sums, sums), (out, out), (1.0, 1.0), (out, wrong))
