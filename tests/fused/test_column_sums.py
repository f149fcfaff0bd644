"""The emulated gradients of activations and sums of columns, against PyTorch's."""

import pytest
import torch
from torch.nn.functional import silu

from nsa.fused import kernel_calls

pytestmark = pytest.mark.usefixtures("fused_on_cpu")
SHAPES = [(0, 3), (1, 9), (65, 48), (2, 0, 4), (2, 63, 10)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["sigmoid", "silu"])
def test_gradients_of_activations(kind, shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = {"sigmoid": torch.sigmoid, "silu": silu}[kind](x)
    dy = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, dy)
    given = y if kind == "sigmoid" else x
    sums = dy.new_full((*shape[:-2], shape[-1]), torch.nan)
    active = kernel_calls.activation_gradient(kind, dy, given.detach(), sums)
    torch.testing.assert_close(dy, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums, wanted.sum(-2), rtol=1e-12, atol=1e-12)
    if kind == "silu":
        torch.testing.assert_close(active, y.detach(), rtol=1e-12, atol=1e-12)
    else:
        assert active is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_two_tensors(shape):
    x = torch.randn(shape, dtype=torch.float64)
    other = torch.randn(2, 5, 7, dtype=torch.float64)
    wanted = x.sum(-2), other.sum(1)
    sums = [torch.full_like(w, torch.nan) for w in wanted]
    kernel_calls.column_sums(x, sums[0], other, sums[1])
    for found, expected in zip(sums, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    alone = torch.full_like(wanted[0], torch.nan)
    kernel_calls.column_sums(x, alone, None, None)
    assert torch.equal(alone, sums[0])
