"""On the GPU: gradients of activations and sums of columns, against float64."""

import pytest
import torch

from nsa.fused import kernel_calls
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

_TINY = 2e-6  # errors of float32 where the gradient of silu is about 0
DTYPES = [torch.bfloat16, torch.float16]
# No row, fewer than CTAs share, and one more than threads load at once. Columns of each vector, of
# less than a tile, and of each width of tiles.
ROWS = [0, 1, 63, 65, 1000, 5000]
COLUMNS = [1, 3, 6, 9, 12, 48, 64, 200, 520, 1024]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def unwritten_sums(x: torch.Tensor, before: int = 0) -> torch.Tensor:
    """NaN; not aligned if there are numbers ``before``."""
    shape = torch.Size((*x.shape[:-2], x.shape[-1]))
    return x.new_full((before + shape[:-1].numel() * shape[-1],), torch.nan)[before:].view(shape)


def assert_sums(found: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor, errors: float = 0.0):
    """Rounded once, but for ``errors`` of what is added, and those of float32."""
    eps = torch.finfo(found.dtype).eps
    allowed = eps / 2 * wanted.abs() + (2.0**-20 + errors) * x.double().abs().sum(-2) + _TINY
    assert bool(((found.double() - wanted).abs() <= allowed).all())


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("parts", [(), (2,)], ids=["one part", "two parts"])
@pytest.mark.parametrize("kind", ["sigmoid", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_activations(dtype, kind, parts, columns):
    for rows in ROWS:
        shape = (*parts, rows, columns)
        x = draw(shape, dtype) * 4
        x = x.sigmoid() if kind == "sigmoid" else x
        dy = draw(shape, dtype)
        sums, exact = unwritten_sums(x, before=1), dy.double()
        exact_sums = unwritten_sums(exact)
        found, dx = [], [dy.clone(), dy.clone()]
        found.append(kernel_calls.activation_gradient(kind, dx[0], x, sums))
        active = emulated_kernels.activation_gradient(kind, exact, x.double(), exact_sums)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dx[0].double(), exact, rtol=eps, atol=_TINY)
        assert_sums(sums, exact, exact_sums, errors=2.0**-18)
        again = unwritten_sums(x)
        found.append(kernel_calls.activation_gradient(kind, dx[1], x, again))
        assert torch.equal(dx[0], dx[1])
        assert torch.equal(sums, again)
        if kind == "sigmoid":
            assert found == [None, None]
            continue
        torch.testing.assert_close(found[0].double(), active, rtol=eps, atol=_TINY)
        assert torch.equal(*found)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("parts", [(), (2,)], ids=["one part", "two parts"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_one_tensor_and_of_two(dtype, parts, columns):
    other = draw((2, 300, 72), dtype)
    for rows in ROWS:
        x = draw((*parts, rows, columns), dtype) + 0.25
        alone, first = (unwritten_sums(x, before) for before in (1, 0))
        second = unwritten_sums(other, before=3)
        kernel_calls.column_sums(x, alone, None, None)
        assert_sums(alone, x, x.double().sum(-2))
        results = []
        for _ in range(2):
            first.fill_(torch.nan)
            second.fill_(torch.nan)
            kernel_calls.column_sums(x, first, other, second)
            assert_sums(first, x, x.double().sum(-2))
            assert_sums(second, other, other.double().sum(-2))
            results.append((first.clone(), second.clone()))
        assert all(map(torch.equal, *results))


def test_extreme_numbers():
    """Where powers overflow, the gradient and the output are 0 or those of the identity."""
    x = torch.tensor([[-3e4, -300.0, -90.0, 90.0, 300.0, 3e4, 0.0, 1.0]], device="cuda").half()
    dy, sums = torch.ones_like(x), torch.empty_like(x[0])
    active = kernel_calls.activation_gradient("silu", dy, x, sums)
    assert dy[0, :7].tolist() == [0, 0, 0, 1, 1, 1, 0.5]
    assert active[0, :7].tolist() == [0, 0, 0, 90, 300, x[0, 5].item(), 0]
    assert torch.equal(sums, dy[0])


def test_rows_that_lie_apart_are_copied():
    x, dy = draw((70, 2, 24), torch.bfloat16), draw((70, 24), torch.bfloat16)
    results = []
    for given in (x[:, 1], x[:, 1].contiguous()):
        sums, dx = unwritten_sums(dy), dy.clone()
        active = kernel_calls.activation_gradient("silu", dx, given, sums)
        alone = unwritten_sums(dy)
        kernel_calls.column_sums(given, alone, None, None)
        results.append((dx, sums, active, alone))
    assert all(map(torch.equal, *results))


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"kind": "relu"}, "kind is 'relu'"),
        (lambda: {"x": _zeros(3, 8).float()}, "x is .* of one of .* on a GPU"),
        (lambda: {"x": _zeros(3, 8).cpu()}, "x is .* of one of .* on a GPU"),
        (lambda: {"x": _zeros(8)}, "x is .* rows, columns"),
        (lambda: {"dy": _zeros(4, 8)}, "dy is"),
        (lambda: {"dy": _zeros(8, 3).T}, "dy has strides"),
        (lambda: {"dy": _zeros(25)[1:].view(3, 8)}, "dy has strides"),
        (lambda: {"sums": _zeros(8).float()}, "sums of x is"),
        (lambda: {"sums": _zeros(16)[::2]}, "sums of x have strides"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(change, message):
    call = dict(kind="silu", dy=_zeros(3, 8), x=_zeros(3, 8), sums=_zeros(8)) | change()
    with pytest.raises(ValueError, match=message):
        kernel_calls.activation_gradient(**call)
