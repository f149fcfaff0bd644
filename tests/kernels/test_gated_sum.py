"""On the GPU: the gated sum and the gradient of the queries against float64 emulation."""

import pytest
import torch

from nsa.fused import kernel_calls
from nsa.fused.kernel_inputs import multiplies_gates
from tests.helpers import emulated_kernels
from tests.helpers.gating_cases import (
    FORMS,
    in_order,
    make_placements,
    make_problem,
    make_statistics,
    place,
    results,
)
from tests.helpers.gpu_cases import gpu_test, slice_of_heads
from tests.helpers.poison import poisoned_memory

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

    by_head, by_row, _ = in_order(1000, 3)
    # Rows of padding after those of each head.
    padded = by_head._replace(head_stride=1024)
    statistics = make_statistics((1000, 3, dim), (by_row, padded, by_head))
    *branches, q, dout = (slice_of_heads(x)[0] for x in tensors)
    with poisoned_memory():
        actual = results(kernel_calls, branches, q, gates, weight, dout, statistics)
    if multiplies_gates(dtype, gates, weight):
        # The kernel rounds branch gradients before it multiplies them.
        exact, tensors = (gates, weight), [x.clone() for x in tensors]
    else:
        tensors = [x.double() for x in tensors]
    *branches, q, dout = (x[0] for x in tensors)
    expected = results(emulated_kernels, branches, q, *exact, dout, statistics)
    assert_close(actual, expected)


def assert_close(actual, expected):
    for x, y in zip(actual, expected, strict=True):
        largest = y[y.isfinite()].abs().max().item()
        tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * largest)
        torch.testing.assert_close(x.double(), y.double(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_0_give_no_gradient(dtype):
    """Those that underflow, and those that are given."""
    branches, q, _, weight, dout = make_problem("weight", (1, 100, 2, 64), dtype, "cuda")
    branches, q, dout = [x[0] for x in branches], q[0].abs() + 1, dout[0]
    statistics = make_statistics((100, 2, 64), in_order(100, 2))
    found = results(kernel_calls, branches, q, None, -60 * weight.abs() - 10, dout, statistics)
    assert all(x.isfinite().all() for x in found[:-6])
    if multiplies_gates(dtype, None, weight):
        assert not any(x.any() for x in (*found[2:5], *found[-5::2]))
    else:
        assert all((x == torch.inf).all() for x in found[-6::2])
        assert all(x.isfinite().all() for x in found[-5::2])
    gates = torch.zeros(100, 2, 3, dtype=dtype, device="cuda")
    found = results(kernel_calls, branches, q, gates, None, dout, statistics)
    assert all(x.isfinite().all() for x in found[:-6])
    assert not any(x.any() for x in (found[0], *found[2:5], *found[-5::2]))


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2)])
@pytest.mark.parametrize("cmp_placed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equal_float64_with_placements(form, cmp_placed, heads, kv_heads, dim):
    lengths = [0, 1, 63, 65, 15, 64, 3]
    (folded, aligned), sizes, plan = make_placements(lengths, heads, kv_heads, "complete", "cuda")
    placements = (folded if cmp_placed else None, aligned)
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
    exact = [*branches, q, gates, weight, dout]
    if form != "gates":
        # The kernel rounds branch gradients of given gates before it multiplies them.
        exact = [None if x is None else x.double() for x in exact]
    # By row of the kernel in the compressed branch, by head in the selected one.
    selected = placements[1]._replace(unit=1, head_stride=plan.queries.rows)
    by_head = in_order(sum(lengths), heads)[0]
    for compressed in (folded,) if cmp_placed else (None, by_head, folded):
        statistics = make_statistics(shape[1:], (compressed, selected, by_head), sizes)
        expected = results(
            emulated_kernels, [*exact[:2], exact[2].clone()], *exact[3:], statistics, placements
        )
        inputs = ([*branches[:2], branches[2].clone()], q, gates, weight, dout)
        with poisoned_memory():
            actual = results(kernel_calls, *inputs, statistics, placements)
        assert_close(actual, expected)
