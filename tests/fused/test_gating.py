"""The gated sum and the gradient of the queries: as autograd has it, also on slices of heads."""

import emulated_own_kernels
import pytest
import torch
from gpu_cases import gpu_test

from nsa.fused import own_kernels
from nsa.fused.gating import combine_branches, combine_branches_backward, query_gradient

FORMS = ["weight", "gates", "mean"]


def make_problem(form: str, shape, dtype=torch.float64, device="cpu"):
    """(branches, q, gates, weight, dout) of ``shape (B, T, H, D)``."""
    x = torch.randn(5, *shape, dtype=dtype, device=device)
    gates = weight = None
    if form == "gates":
        gates = torch.randn(*shape[:3], 3, dtype=dtype, device=device)
    if form == "weight":
        weight = torch.randn(shape[2], 3, shape[3], dtype=dtype, device=device)
    return x[:3].unbind(), x[3], gates, weight, x[4]


def combine_plainly(branches, q, gates, weight):
    if weight is not None:
        gates = torch.einsum("bthd,hid->bthi", q, weight).sigmoid()
    elif gates is None:
        return sum(branches) / 3
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))


def slice_of_heads(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x (B, T, H, D)`` in a tensor that has more heads, NaN."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + 2, x.shape[3]), torch.nan)
    return wide[:, :, 1:-1].copy_(x)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("form", FORMS)
def test_equals_autograd(form):
    branches, q, gates, weight, dout = make_problem(form, (2, 5, 3, 8))
    leaves = [x for x in (*branches, q, gates, weight) if x is not None]
    leaves = [x.requires_grad_() for x in leaves]
    expected = combine_plainly(branches, q, gates, weight)
    grads = torch.autograd.grad(expected, leaves, dout, materialize_grads=True)
    *branches, q = (slice_of_heads(x.detach()) for x in (*branches, q))

    out = slice_of_heads(torch.zeros_like(q))
    assert combine_branches(branches, q, gates, weight, out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected)
    actual = combine_branches_backward(slice_of_heads(dout), branches, q, gates, weight)
    dq = query_gradient(branches, actual.logits, weight, out=branches[2])
    assert dq.data_ptr() == branches[2].data_ptr()
    # Of the branches' own gradients of q, which stand in for it here, one was written over.
    plain = sum(x.detach() for x in leaves[:3])
    own = [x for x in (actual.gates, actual.gate_proj_weight) if x is not None]
    torch.testing.assert_close([*actual.branches, dq - plain, *own], list(grads))


@pytest.mark.usefixtures("fused_on_cpu")
def test_output_that_would_be_lost_is_refused():
    """Rows of the output that are no view of it would be a copy, thrown away."""
    branches, q, *_ = make_problem("mean", (2, 5, 3, 8))
    out = torch.empty(2, 7, 3, 8, dtype=q.dtype)[:, :5]
    with pytest.raises(RuntimeError, match="view"):
        combine_branches(branches, q, None, None, out)


def results(kernels, branches, q, gates, weight, dout) -> list[torch.Tensor]:
    """Output, gradient of ``q`` in place of one of its terms, and the other gradients."""
    out = kernels.gating_forward(*branches, q, gates, weight, slice_of_heads(q[None])[0])
    *grads, dlogits, dgates, dweight = kernels.gating_backward(dout, *branches, q, gates, weight)
    dq = kernels.query_gradient(*branches, dlogits, weight, branches[2])
    return [x for x in (out, dq, *grads, dlogits, dgates, dweight) if x is not None]


class TestKernels:
    pytestmark = gpu_test

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [96, 128])
    @pytest.mark.parametrize("form", FORMS)
    def test_equal_float64_on_slices_of_heads(self, form, dim, dtype):
        branches, q, gates, weight, dout = make_problem(form, (1, 1000, 3, dim), dtype, "cuda")
        tensors = [*branches, q, dout]
        gates = None if gates is None else gates[0]
        weight = None if weight is None else weight / dim**0.5
        exact = [None if x is None else x.double() for x in (gates, weight)]

        *branches, q, dout = (slice_of_heads(x)[0] for x in tensors)
        actual = results(own_kernels, branches, q, gates, weight, dout)
        *branches, q, dout = (x[0].double() for x in tensors)
        expected = results(emulated_own_kernels, branches, q, *exact, dout)
        for x, y in zip(actual, expected, strict=True):
            tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * y.abs().max().item())
            torch.testing.assert_close(x.double(), y, **tolerance)
