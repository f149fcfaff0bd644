"""The ranks of the tests themselves. Last in this folder, because the ranks end."""

import pytest

from tests.helpers import rank_cases


def test_a_rank_that_hangs_ends_its_case(world):
    with pytest.raises(AssertionError, match="rank 1: no answer in time"):
        world.run(rank_cases.sleep_on_rank_1, ranks=2, seconds=1)
