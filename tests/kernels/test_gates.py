"""On the GPU: the gated sum and the gradient of the queries against float64 emulation."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gating_cases import FORMS, make_placements, make_problem, place, results
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = gpu_test


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [96, 128])
@pytest.mark.parametrize("form", FORMS)
def test_equal_float64_on_slices_of_heads(form, dim, dtype):
    branches, q, gates, weight, dout = make_problem(form, (1, 1000, 3, dim), dtype, "cuda")
    tensors = [*branches, q, dout]
    gates = None if gates is None else gates[0]
    weight = None if weight is None else weight / dim**0.5
    exact = [None if x is None else x.double() for x in (gates, weight)]

    *branches, q, dout = (slice_of_heads(x)[0] for x in tensors)
    actual = results(kernel_calls, branches, q, gates, weight, dout)
    *branches, q, dout = (x[0].double() for x in tensors)
    expected = results(emulated_kernels, branches, q, *exact, dout)
    for x, y in zip(actual, expected, strict=True):
        tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * y.abs().max().item())
        torch.testing.assert_close(x.double(), y, **tolerance)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2)])
@pytest.mark.parametrize("cmp_placed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equal_float64_with_placements(form, cmp_placed, heads, kv_heads, dim):
    lengths = [0, 1, 63, 65, 15, 64, 3]
    placements, sizes, _ = make_placements(lengths, heads, kv_heads, "complete", "cuda")
    placements = (placements[0] if cmp_placed else None, placements[1])
    shape = (1, sum(lengths), heads, dim)
    problem = make_problem(form, shape, torch.bfloat16, "cuda")
    branches, q, gates, weight, dout = problem
    branches = [x[0].clone() for x in branches]
    for i, (placement, size) in enumerate(zip(placements, sizes, strict=True)):
        if placement is not None:
            branches[i] = place(branches[i], placement, size)
    q, dout = q[0], dout[0]
    gates = None if gates is None else gates[0]
    weight = None if weight is None else weight / dim**0.5
    exact = [None if x is None else x.double() for x in (*branches, q, gates, weight, dout)]

    expected = results(emulated_kernels, exact[:3], *exact[3:], placements)
    actual = results(kernel_calls, branches, q, gates, weight, dout, placements)
    for x, y in zip(actual, expected, strict=True):
        tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * y.abs().max().item())
        torch.testing.assert_close(x.double(), y, **tolerance)
