"""nsa.rope: tables of consecutive positions equal angles that are computed one by one."""

import pytest
import torch

from nsa import rope
from nsa.rope import Positions, apply_rope, rotate
from nsa.testing import make_cu_seqlens
from tests.helpers.torch_defaults import DEFAULTS

THETA = 10000.0
LENGTHS = [30, 0, 1, 19]


@pytest.fixture(autouse=True)
def _no_tables():
    rope._kept_table.cache_clear()


@pytest.mark.parametrize("default", [None, *DEFAULTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tables_are_the_formula(dtype, default):
    x = torch.randn(2, 50, 3, 16, dtype=torch.float64).to(dtype)
    packed = x[0]
    index = torch.arange(50, device="cpu")
    local = torch.cat([torch.arange(n, device="cpu") for n in LENGTHS])
    wanted = [
        apply_rope(x, index, THETA),
        apply_rope(x, 15.5 + 16 * index.double(), THETA),
        apply_rope(packed, local, THETA),
        apply_rope(packed, 1.5 + 2.0 * (local + 7), THETA),
    ]
    bounds = make_cu_seqlens(LENGTHS)
    origin = bounds[:-1] - 7

    def call():
        return [
            rotate(x, Positions(), THETA),
            rotate(x, Positions(15.5, 16), THETA),
            rotate(packed, Positions(bounds=bounds), THETA),
            rotate(packed, Positions(1.5, 2, bounds, lambda: local + 7, origin, 37), THETA),
        ]

    if default is None:
        found = call()
    else:
        with DEFAULTS[default]():
            found = call()
    assert all(map(torch.equal, found, wanted))


def test_positions_past_a_million():
    x = torch.randn(1, 40, 1, 64)
    positions = 2**21 + torch.arange(40).double()
    found = rotate(x.double(), Positions(2**21), THETA)
    assert torch.equal(found, apply_rope(x.double(), positions, THETA))
    single = rotate(x, Positions(2**21), THETA)
    torch.testing.assert_close(single.double(), found, rtol=1e-6, atol=1e-6)


def test_a_table_is_made_once_for_layers_and_steps():
    x = torch.randn(1, 40, 1, 64)
    for _ in range(3):
        rotate(x, Positions(), THETA)
        rotate(x.bfloat16(), Positions(), THETA)
        rotate(x, Positions(1.5, 2), THETA)
    assert rope._kept_table.cache_info().misses == 2


def test_a_table_made_in_inference_mode_serves_training():
    x = torch.randn(1, 40, 1, 64, requires_grad=True)
    with torch.inference_mode():
        rotate(x, Positions(), THETA)
    rotate(x, Positions(), THETA).sum().backward()
    assert rope._kept_table.cache_info().misses == 1
    assert x.grad is not None
