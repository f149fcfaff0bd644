"""The product of all projections, split and its gradient, by emulation against plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings

from tests.helpers.product_cases import check_gradient, check_split, product_cases
from tests.helpers.profiles import WITH_FIXTURES

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@settings(**WITH_FIXTURES)
@given(case=product_cases())
def test_heads_of_any_product(case):
    for dtype in (torch.float64, torch.bfloat16):
        check_split(case, dtype, "cpu")


@settings(**WITH_FIXTURES)
@given(case=product_cases())
def test_gradients_of_any_product(case):
    for dtype in (torch.float64, torch.bfloat16):
        check_gradient(case, dtype, "cpu")
