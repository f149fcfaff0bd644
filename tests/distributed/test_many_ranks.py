"""Four and eight ranks equal one process, outputs and every gradient."""

import os

import pytest
import torch

from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import rank_cases
from tests.helpers.shared_problems import check_ranks
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import Problem
from tests.helpers.world import World


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    ranks = World(str(tmp_path_factory.mktemp("eight")), size=8, seconds=240)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("calls", ["output_and_gradients", "separate_calls"])
@pytest.mark.parametrize(
    ("mode", "order", "lengths"),
    [
        ("token", "head-tail", None),
        ("tile", "head-tail", None),
        ("token", "head-tail-each", [40, 0, 104]),
        ("token", "contiguous", [1, 100, 3, 40]),
    ],
    ids=["token", "tile", "each", "contiguous"],
)
def test_four_ranks_equal_one_process(world, mode, order, lengths, calls):
    check_ranks(world, make_problem(mode, lengths), 4, order, case=getattr(rank_cases, calls))


@pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="eight processes take long on few CPUs")
@pytest.mark.parametrize("mode", ["token", "tile"])
def test_eight_ranks_equal_one_process(eight, mode):
    check_ranks(eight, make_problem(mode, None), 8, "head-tail")


def make_problem(mode: str, lengths: list[int] | None) -> Problem:
    """More ranks than KV heads, and pieces that have less than a window before them."""
    leading = (1, 256) if lengths is None else (sum(lengths),)
    q, k, v = make_inputs(leading, 4, 2, 4, dtype=torch.float64)
    extras = {"gate_proj_weight": torch.randn(4, 3, 4, dtype=torch.float64)}
    extras["compress_k_weight"] = torch.randn(2, 4, 4, dtype=torch.float64)
    if lengths is not None:
        extras["cu_seqlens"] = make_cu_seqlens(lengths)
    return Problem(q, k, v, SMALL[mode], extras)
