"""On the GPU: delta from the keys of queries that see a few, against float64 emulation."""

import pytest
import torch

from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import RowStatistics
from tests.helpers import emulated_kernels
from tests.helpers.gating_cases import in_order, make_placements, place
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = gpu_test


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1)])
@pytest.mark.parametrize("placed", ["none", "statistics", "both"])
def test_equal_float64(placed, heads, kv_heads, dim, dtype):
    lengths = [0, 1, 63, 65, 15, 64, 3, 40]
    rows = sum(lengths)
    (folded, _), (size, _), plan = make_placements(lengths, heads, kv_heads, "complete", "cuda")
    blocks = plan.geometry.compressed.total
    q, dout = (torch.randn(1, rows, heads, dim, device="cuda", dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, blocks, kv_heads, dim, device="cuda", dtype=dtype) for _ in range(2))
    numbers = size if placed != "none" else rows * heads
    # Gates, of which some are 0; and what is not written is seen.
    lse_log2 = torch.randn(numbers, device="cuda").masked_fill(
        torch.rand(numbers, device="cuda") < 0.2, torch.inf
    )
    delta = torch.randn(numbers, device="cuda")
    statistics_placement = in_order(rows, heads)[0] if placed == "none" else folded
    placement = folded if placed == "both" else None

    def result(kernels, dtype):
        statistics = RowStatistics(*(x.to(dtype, copy=True) for x in (lse_log2, delta)))
        wide = torch.float64 if dtype == torch.float64 else q.dtype
        own = dout.to(wide)[0]
        own = own if placement is None else place(own, folded, size).nan_to_num(0)
        rest = (slice_of_heads(x.to(wide))[0] for x in (q, k, v))
        options = (plan.few_keys, dim**-0.5, statistics_placement, placement)
        kernels.few_key_deltas(own, *rest, statistics, *options)
        return statistics.delta

    expected = result(emulated_kernels, torch.float64)
    assert (expected != delta).any()
    actual = result(kernel_calls, torch.float32).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
