"""What tests of the adapters in nsa/integrations share: configurations, gradients, comparison."""

import pytest
import torch
from torch import Tensor

from tests.helpers.small_configs import SMALL

CONFIGS = {name: SMALL[name] for name in ("token", "tile")}
each_mode = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of ``out``; the graph stays."""
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad(out, inputs, weights, retain_graph=True))


def assert_same(out: Tensor, expected: Tensor, *inputs: Tensor):
    """Assert that two results of the same inputs are equal, and their gradients too."""
    torch.testing.assert_close(out, expected)
    pairs = zip(gradients(out, *inputs), gradients(expected, *inputs), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other)
