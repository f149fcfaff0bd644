"""On the GPU: what rounds sums of rows of keys, against float64, rounded once."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

HEADS = 3


def as_added(x: torch.Tensor) -> torch.Tensor:
    """``x (..., D)`` in the layout of the sums: see :mod:`nsa.fused.kernels.float_sums`."""
    # 16 columns, one of two 8, lane of a quad, column of a lane.
    parts = x.unflatten(-1, (-1, 2, 4, 2))
    return parts.transpose(-3, -2).reshape(x.shape).contiguous()


@pytest.mark.parametrize("last", [None, 1, 71, 193])
@pytest.mark.parametrize("dims", [(64,), (128, 128), (96, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_with_what_is_added(dtype, dims, last):
    """Of two entries; values may have more channels than keys."""
    kind, factors = dict(device="cuda"), (0.3, 1.0)[: len(dims)]
    sums = [torch.randn(2, 193, HEADS, dim, **kind) for dim in dims]
    added = exact = None
    if last is not None:
        rows = [torch.randn(2, last, HEADS, dim, **kind).to(dtype) for dim in dims]
        added, exact = [slice_of_heads(x) for x in rows], [x.double() for x in rows]
    outs = [torch.full(x.shape, torch.nan, dtype=dtype, **kind) for x in sums]
    kernel_calls.round_sums([as_added(x) for x in sums], outs, factors, added)
    expected = [torch.empty_like(x, dtype=torch.float64) for x in sums]
    emulated_kernels.round_sums([x.double() for x in sums], expected, factors, exact)
    for out, total in zip(outs, expected, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), total, rtol=eps, atol=1e-5)


def test_no_last_keys_add_nothing():
    sums = [torch.randn(2, 5, HEADS, 64, device="cuda") for _ in "kv"]
    outs, others = ([torch.empty_like(x, dtype=torch.float16) for x in sums] for _ in range(2))
    kernel_calls.round_sums(sums, outs, (0.3, 1.0))
    kernel_calls.round_sums(sums, others, (0.3, 1.0), [x[:, :0] for x in outs])
    assert all(map(torch.equal, outs, others))


def test_other_shapes_are_refused():
    sums, out = (torch.zeros(64, 2, 64, dtype=x, device="cuda") for x in (None, torch.float16))
    for wrong in (out[:, :1], out[None], out.float(), torch.cat((out, out))):
        with pytest.raises(ValueError, match="last is"):
            kernel_calls.round_sums((sums, sums), (out, out), (1.0, 1.0), (out, wrong))
