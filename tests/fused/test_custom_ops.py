"""The short way of calls of custom ops, here for tensors of a CPU."""

from functools import partial

import pytest
import torch
from torch import _C
from torch._library.autograd import make_autograd_impl
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa
from nsa.fused.custom_ops import call_directly, custom_op

CALLS: list[str] = []


@custom_op("test_tripled")
def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@custom_op("test_doubled", "(Tensor x, Tensor? other, Tensor[] more, int n) -> Tensor")
def doubled(x, other, more, n):
    CALLS.append("function")
    return x * 2


@doubled.register_fake
def _(x, other, more, n):
    return torch.empty_like(x)


doubled.register_autograd(lambda ctx, dout: (dout * 2, None, [], None))


def call(x):
    return torch.ops.nsa.test_doubled(x, None, [], 3)


@pytest.fixture(autouse=True, scope="module")
def _short_on_a_cpu():
    def function(*arguments):
        CALLS.append("directly")
        return doubled._init_fn(*arguments)

    differentiable = make_autograd_impl(doubled._opoverload, doubled)
    library = torch.library.Library("nsa", "FRAGMENT")
    short = partial(call_directly, function, differentiable, _C.DispatchKey.CPU)
    library.impl("test_doubled", short, "AutogradCPU", with_keyset=True)
    yield
    library._destroy()


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def test_without_gradients_the_function_is_called_at_once():
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(call(x), x * 2)
    assert CALLS == ["directly", "function"]


def test_an_op_without_a_derivative_refuses_it():
    """As those of backward do, which are so differentiated twice."""
    with pytest.raises(nsa.UnsupportedError, match="differentiated once, not twice"):
        tripled(torch.randn(3, requires_grad=True)).sum().backward()


def test_with_gradients_it_is_an_op_as_any():
    x = torch.randn(3, requires_grad=True)
    y = call(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    assert CALLS == ["function"]


@pytest.mark.parametrize("inside", [False, True])
def test_fake_tensors_have_no_values(inside):
    with FakeTensorMode() as mode, torch.no_grad():
        x = mode.from_tensor(torch.empty(3))
        y = call(x)
    if not inside:
        with torch.no_grad():
            y = call(x)
    assert y.shape == (3,)
    assert not CALLS


def test_of_batches_of_vmap_it_says_what_any_op_says():
    with torch.no_grad(), pytest.raises(Exception, match=r"(?i)vmap|batching"):
        torch.vmap(call)(torch.randn(2, 3))
    assert not CALLS


@pytest.mark.parametrize("gradients", [False, True])
def test_compiled(gradients):
    x = torch.randn(3, requires_grad=gradients)
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, x * 2)
    assert CALLS.count("function") == 1
    if gradients:
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3,), 2.0))
