"""nsa.testing.assert_as_accurate: what it lets pass and what it does not."""

import pytest
import torch

from nsa.testing import assert_as_accurate

EXACT = torch.tensor([1.0, -2.0], dtype=torch.float64)
SAME_DTYPE = torch.tensor([1.001, -2.0])


def test_passes_within_twice_the_error_of_the_reference():
    assert_as_accurate("x", torch.tensor([1.0, -2.0019]), SAME_DTYPE, EXACT)
    assert_as_accurate("x", torch.empty(0), torch.empty(0), torch.empty(0, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [[1.0, -2.01], [1.0, torch.nan]])
def test_fails_beyond_it(wrong):
    with pytest.raises(AssertionError, match=r"x: largest error .* exceeds 2.0.*e-03"):
        assert_as_accurate("x", torch.tensor(wrong), SAME_DTYPE, EXACT)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_fails_on_another_shape_or_dtype(wrong):
    with pytest.raises(AssertionError, match=r"expected \(2,\) torch.float32"):
        assert_as_accurate("x", wrong, SAME_DTYPE, EXACT)
