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
    with pytest.raises(AssertionError, match=r"x: root mean square error .* exceeds 1\.4.*e-03"):
        assert_as_accurate("x", torch.tensor(wrong), SAME_DTYPE, EXACT)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_fails_on_another_shape_or_dtype(wrong):
    with pytest.raises(AssertionError, match=r"expected \(2,\) torch.float32"):
        assert_as_accurate("x", wrong, SAME_DTYPE, EXACT)


def test_fails_on_one_large_error_among_many():
    exact = torch.linspace(1, 2, 10_000, dtype=torch.float64)
    same_dtype = exact.to(torch.bfloat16)
    wrong = same_dtype.clone()
    wrong[5000] += 0.05
    with pytest.raises(AssertionError, match="x: largest error 4"):
        assert_as_accurate("x", wrong, same_dtype, exact)
