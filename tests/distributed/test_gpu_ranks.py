"""The fused backend on two GPUs over NCCL, against the reference on one."""

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import rank_cases
from tests.helpers.strategies import Problem
from tests.helpers.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    ranks = World(str(tmp_path_factory.mktemp("gpus")), size=2, backend="cpu:gloo,cuda:nccl")
    yield ranks
    ranks.stop()


@pytest.mark.parametrize(
    ("config", "order", "lengths", "separate"),
    [
        (nsa.NSAConfig.paper(), "head-tail", None, True),
        (nsa.NSAConfig(q_tile_size=128), "head-tail", None, True),
        (nsa.NSAConfig.paper(), "contiguous", [500, 0, 1, 1547], False),
        (nsa.NSAConfig(q_tile_size=128), "head-tail-each", [512, 1536], False),
    ],
    ids=["token", "tile", "token packed", "tile packed"],
)
def test_as_accurate_as_one_gpu(gpus, config, order, lengths, separate):
    leading = (2048,) if lengths else (1, 2048)
    q, k, v = make_inputs(leading, 8, 2, 128, dtype=torch.float64)
    extras = {
        "gate_proj_weight": torch.randn(8, 3, 128, dtype=torch.float64) / 8,
        "compress_k_weight": torch.randn(2, 128, 128, dtype=torch.float64) / 11,
    }
    if lengths:
        extras["cu_seqlens"] = make_cu_seqlens(lengths)
    problem = Problem(q, k, v, config, extras)
    for share in gpus.run(rank_cases.gpu_accuracy, problem, order, separate, seconds=300):
        # The sums of scores are in another order, so near ties may fall differently.
        assert share >= 0.999
