"""On the GPU: the rotary embedding against float64, its inverse and its gradient."""

import pytest
import torch

from nsa.fused import kernel_calls, layer_ops
from nsa.rope import Positions, apply_rope
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test, slice_of_heads

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]

THETA = 10000.0
LENGTHS = [5, 0, 30, 1, 64]


def assert_rotated(found: torch.Tensor, x: torch.Tensor, positions: torch.Tensor, theta=THETA):
    """``found`` is ``x``, turned in float64 and rounded once, but for errors of the sines."""
    wanted = apply_rope(x.double(), positions, theta)
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=1e-5)


def turn(x, start=0, step=1, *, theta=THETA, inverse=False, bounds=None, origin=None):
    return kernel_calls.rotate(x, None, bounds, origin, start, step, theta, inverse)[0]


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_turned_by_their_positions(dtype, heads, head_dim):
    x = torch.randn(2, 50, heads, head_dim, device="cuda").to(dtype)
    positions = torch.arange(50, device="cuda")
    for given in (x, slice_of_heads(x)):
        assert_rotated(turn(given), x, positions)
        centres = turn(given, 15.5, 16)
        assert_rotated(centres, x, 15.5 + 16 * positions)
        assert_rotated(turn(given, inverse=True), x, -positions)
    keys = torch.randn(2, 50, 3, head_dim, device="cuda").to(dtype)
    both = kernel_calls.rotate(x, slice_of_heads(keys), None, None, 0, 1, THETA, False)
    for found, given in zip(both, (x, keys), strict=True):
        assert_rotated(found, given, positions)
    packed = torch.randn(100, heads, head_dim, device="cuda").to(dtype)
    bounds = make_cu_seqlens(LENGTHS, "cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS])
    assert_rotated(turn(packed, bounds=bounds), packed, positions)
    # Sequences of which there are rows from further on.
    first = torch.tensor([7, 3, 100000, 0, 64], dtype=torch.int32, device="cuda")
    positions = positions + first.long().repeat_interleave(bounds.diff())
    origin = bounds[:-1] - first
    assert_rotated(turn(packed, bounds=bounds, origin=origin), packed, positions)


@pytest.mark.parametrize("theta", [1.0, 500000.0])
@pytest.mark.parametrize("start", [0, 10**6, 2**27 + 0.5])
def test_far_positions_are_as_exact(start, theta):
    x = torch.randn(1, 300, 1, 128, device="cuda", dtype=torch.float16)
    positions = start + torch.arange(300, device="cuda").double()
    assert_rotated(turn(x, start, theta=theta), x, positions, theta)


def test_gradient_is_the_inverse():
    x = torch.randn(1, 70, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(x)
    layer_ops.rotate([x], Positions(), THETA)[0].backward(dout)
    assert_rotated(x.grad, dout, -torch.arange(70, device="cuda"))


def test_no_rows():
    x = torch.empty(2, 0, 4, 64, device="cuda", dtype=torch.bfloat16)
    assert turn(x).shape == x.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 1, 24)}, "must be .* D a multiple of 16 up to 256"),
        ({"x": torch.zeros(3, 1, 16, dtype=torch.float64)}, "it must be one of .* on a GPU"),
        ({"other": torch.zeros(4, 1, 16).bfloat16()}, "other is"),
        ({"start": 0.25}, "start must be a multiple of 1/2"),
        ({"theta": 0.5}, "theta at least 1"),
        ({"bounds": torch.zeros(2)}, "bounds is"),
        ({"origin": torch.zeros(1).int()}, "origin is"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(change, message):
    call = dict(
        x=torch.zeros(3, 1, 16),
        other=None,
        bounds=None,
        origin=None,
        start=0,
        step=1,
        theta=THETA,
        inverse=False,
    )
    call |= change
    if call["x"].dtype == torch.float32:
        call["x"] = call["x"].bfloat16()
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=message):
        kernel_calls.rotate(**call)
