"""On the GPU: the rows of the compressor and their gradient, against emulation."""

import pytest
import torch

from nsa.blocks import BlockPlaces
from nsa.fused import kernel_calls
from nsa.testing import make_cu_seqlens
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

LENGTHS = [70, 0, 31, 1, 200, 64]
SPARE = 9  # tokens past the last packed sequence


def make_places(size: int, stride: int, packed: bool) -> tuple[tuple[int, ...], BlockPlaces]:
    """Leading dimensions of the tokens, and their blocks; some rows of packed ones are none."""
    counts = [max(0, (length - size) // stride + 1) for length in LENGTHS]
    if not packed:
        return (2, 200), BlockPlaces(size, stride, 2 * counts[4], 200, counts[4], None, None)
    total, rows = sum(LENGTHS) + SPARE, sum(counts) + 3
    bounds = (make_cu_seqlens(x, "cuda") for x in (LENGTHS, counts))
    return (total,), BlockPlaces(size, stride, rows, total, rows, *bounds)


@pytest.mark.parametrize("parts", [(), (2,)], ids=["one position", "two positions"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize(("size", "stride"), [(16, 16), (32, 16), (64, 16), (64, 64)])
@pytest.mark.parametrize("head_dim", [8, 64, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_and_their_gradient(dtype, head_dim, size, stride, packed, parts):
    leading, places = make_places(size, stride, packed)
    x = torch.randn(*leading, 6, head_dim, device="cuda").to(dtype)
    position = torch.randn(*parts, size, head_dim, device="cuda").to(dtype)
    wanted = emulated_kernels.gather_blocks(x.double(), position.double(), places)
    eps = torch.finfo(dtype).eps
    for given in (x, slice_of_heads(x[None])[0] if packed else slice_of_heads(x)):
        rows = kernel_calls.gather_blocks(given, position, places)
        torch.testing.assert_close(rows.double(), wanted, rtol=eps, atol=1e-5)
    drows = torch.randn_like(rows)
    wanted = emulated_kernels.scatter_blocks(drows.double(), x.shape, places)
    dx = kernel_calls.scatter_blocks(drows, x.shape, places)
    torch.testing.assert_close(dx.double(), wanted, rtol=eps, atol=1e-5)


def test_no_blocks():
    places = BlockPlaces(32, 16, 0, 20, 0, None, None)
    x = torch.randn(2, 20, 1, 64, device="cuda")
    rows = kernel_calls.gather_blocks(x, torch.zeros(32, 64, device="cuda"), places)
    assert rows.shape == (0, 1, 32, 64)
    assert torch.equal(kernel_calls.scatter_blocks(rows, x.shape, places), torch.zeros_like(x))
