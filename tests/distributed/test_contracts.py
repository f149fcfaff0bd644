"""What ranks send and keep, and that chunks and checkpoints change nothing."""

import pytest
import torch

import nsa
from nsa.distributed import backend_calls
from nsa.distributed.call import NO_LIMIT
from nsa.distributed.order import ORDERS
from nsa.distributed.rank_layout import Layout, Whole
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import rank_cases
from tests.helpers.shared_problems import check_ranks
from tests.helpers.small_configs import SMALL, tile_config, token_config
from tests.helpers.strategies import Problem


def make_problem(config, tokens=96, heads=(6, 3), packed=False, dim=4, **extras) -> Problem:
    leading = (tokens,) if packed else (1, tokens)
    q, k, v = make_inputs(leading, *heads, dim, dtype=torch.float64)
    if packed:
        extras["cu_seqlens"] = make_cu_seqlens([1, tokens - 1])
    return Problem(q, k, v, config, extras)


CASES = [
    "several_chunks",
    "many_runs",
    "separate_calls",
    "separate_calls_of_many_runs",
    "after_inference",
    "checkpointed",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["token", "sparse"])
@pytest.mark.parametrize("separate", [False, True], ids=["one K/V", "three K/V"])
def test_how_it_is_computed_changes_nothing(world, case, mode, separate):
    gates = torch.rand(1, 96, 6, 3, dtype=torch.float64)
    problem = make_problem(SMALL[mode], gates=gates)
    if separate:
        # Three different keys and values.
        k, v = ((x, x.flip(1), x.roll(5, 1)) for x in (problem.k, problem.v))
        problem = problem._replace(k=k, v=v)
    check_ranks(world, problem, 2, "head-tail", case=getattr(rank_cases, case))


def test_segments_of_one_sequence_share_its_keys():
    config, length = SMALL["token"], 8 * backend_calls.MIN_TOKENS
    for rank in range(2):
        part = Layout(Whole(1, length, None), 2, rank, "head-tail", config, torch.device("cpu"))
        first, last = part.calls
        ends = [length // 4 * (rank + 1), length // 4 * (4 - rank)]
        assert [call.keys for call in part.calls] == [slice(0, end) for end in ends]
        assert [call.rows for call in part.calls] == [
            slice(0, length // 4),
            slice(length // 4, length // 2),
        ]
        assert first.runs == last.runs[: len(first.runs)]
        assert sum(count for _, count in part.key_runs) == ends[1]
    # Short ones, and many, are one packed call, with keys for each.
    short = Layout(Whole(1, 96, None), 2, 0, "head-tail", config, torch.device("cpu"))
    assert [call.packed for call in short.calls] == [True]
    assert sum(count for _, count in short.key_runs) == 24 + 96
    many = Layout(Whole(5, length, None), 2, 0, "head-tail", config, torch.device("cpu"))
    assert [call.packed for call in many.calls] == [True]
    # One segment has nothing to be packed with.
    one = Layout(Whole(1, 96, None), 2, 1, "contiguous", config, torch.device("cpu"))
    assert [call.packed for call in one.calls] == [False]


def test_the_window_may_be_computed_again(world):
    problem = make_problem(tile_config(), 512, heads=(2, 1), recompute_window=True)
    check_ranks(world, problem, 2, "head-tail", "fused")


@pytest.mark.parametrize("order", ["contiguous", "head-tail"])
@pytest.mark.parametrize(
    ("config", "tokens"), [(token_config(), 384), (tile_config(), 768)], ids=["token", "tile"]
)
def test_calls_add_gradients_of_keys_where_kernels_do(world, config, tokens, order):
    """Of two and of three ranks, whose pieces are whole tiles."""
    problem = make_problem(config, tokens, heads=(4, 2), dim=64)
    case = rank_cases.separate_calls_that_add
    check_ranks(world, problem, 3, order, "fused", case=case)
    # Not if branches have keys of their own.
    k, v = ((x, x.flip(1), x.roll(5, 1)) for x in (problem.k, problem.v))
    own = problem._replace(k=k, v=v)
    check_ranks(world, own, 2, order, "fused", case=rank_cases.separate_calls)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("weighted", [False, True], ids=["means", "weights"])
def test_one_pass_adds_gradients_of_keys_and_of_their_means(world, ranks, weighted):
    weights = {"compress_k_weight": torch.randn(2, 64, 64, dtype=torch.float64) / 8}
    extras = weights if weighted else {}
    problem = make_problem(tile_config(), 768, heads=(4, 2), dim=64, **extras)
    case = rank_cases.calls_and_means_that_add
    check_ranks(world, problem, ranks, "head-tail", "fused", case=case)


def test_more_ranks_than_kv_heads(world):
    check_ranks(world, make_problem(SMALL["token"], heads=(2, 1)), 3, "head-tail")


@pytest.mark.parametrize("separate", [False, True], ids=["one call", "a call for each piece"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_sent(world, ranks, separate):
    """Blocks once, borders of less than a block, keys and values a head at a time, sums in fp64.

    Where pieces share keys, the first ones are gathered into their place, apart from the others.
    Two ranks then send each other only what the other attends.
    """
    config, tokens = SMALL["token"], 96
    problem = make_problem(config, tokens)
    dout = torch.ones(problem.q.shape, dtype=torch.float64)
    arguments = (problem, "head-tail", dout, "reference", separate)
    found = world.run(rank_cases.traffic, *arguments, ranks=ranks)
    own, dtype = tokens // ranks, "torch.float64"
    parts = 2 if separate else 1
    gathers = [[("all_gather", (own // parts, 1, 4), dtype)] * 2 * parts] * ranks
    if separate and ranks == 2:
        gathers = [[("all_to_all", (own * n // 2, 1, 4), dtype)] * 2 for n in (1, 2)]
    summed = [("reduce_scatter" if ranks == 2 else "all_to_all", (tokens, 1, 4), dtype)] * 2
    # A rank lends the ends of pieces that are not the last one, 2 tokens each.
    border, blocks = (4, 3, 8), (own // 2, 3, 8)
    begin = [("all_gather", border, dtype), ("all_gather", blocks, dtype)]
    end = [
        ("reduce_scatter", (ranks * blocks[0], *blocks[1:]), dtype),
        ("reduce_scatter", (ranks * border[0], *border[1:]), dtype),
    ]
    for (agreement, *rest), gather in zip(found, gathers, strict=True):
        assert agreement[:2] == ("all_gather", (32,))
        middle = gather + gather + summed + gather + summed + summed
        assert rest == begin + gather * 3 + middle + end


@pytest.mark.parametrize("given", [None, 1 << 20])
def test_free_memory_decides_nothing(world, given):
    """With a limit, a schedule follows from shapes alone (:mod:`tests.fused.test_schedule`)."""
    extras = {} if given is None else {"max_workspace_bytes": given}
    problem = make_problem(tile_config(), 512, heads=(4, 2), **extras)
    dout = torch.ones(problem.q.shape, dtype=torch.float64)
    for limits in world.run(rank_cases.workspace_limits, problem, "head-tail", dout, ranks=2):
        assert limits == [given or NO_LIMIT] * 2


def test_gathered_keys_are_not_saved(world):
    tokens = 512
    problem = make_problem(tile_config(), tokens, heads=(2, 1))
    # The last rank attends all keys.
    _, shapes = world.run(rank_cases.saved_shapes, problem, "contiguous", ranks=2)
    assert (tokens // 2, 1, 4) in shapes  # its own
    assert not [shape for shape in shapes if shape[-3:] == (tokens, 1, 4)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_shards_are_the_whole(world, order, packed):
    lengths = [12, 0, 24] if order == "head-tail-each" else [1, 0, 30, 5]
    bounds = make_cu_seqlens(lengths) if packed else None
    x = torch.arange(36.0).expand(2, 36)
    position = torch.cat([torch.arange(n) for n in (lengths if packed else [36])])
    for ranks in (2, 3):
        parts = world.run(rank_cases.round_trip, x, 1, order, bounds, ranks=ranks)
        for own, whole, places in parts:
            assert torch.equal(whole, x)
            assert torch.equal(places, position[own[0].long()])
        assert torch.equal(torch.cat([own for own, *_ in parts], 1).sort().values, x)


def test_head_and_tail_are_those_of_pytorch():
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
        _HeadTailLoadBalancer,
    )

    for ranks in (2, 3):
        indices = _HeadTailLoadBalancer(24, ranks, "cpu")._generate_indices()
        pieces = nsa.distributed.order.make_pieces(24, ranks, "head-tail", None)
        own = torch.cat([pieces.tokens(rank) for rank in range(ranks)])
        assert torch.equal(indices.flatten().cpu(), own)


def test_differentiable_once(world):
    problem = make_problem(SMALL["token"])
    for text in world.run(rank_cases.second_derivative, problem, ranks=2):
        assert "can be differentiated once, not twice" in text
    assert all(world.run(rank_cases.twice_backward, problem, ranks=2))


def test_the_device_of_positions(mesh):
    bounds = make_cu_seqlens([3, 0, 5])
    with torch.device("meta"):
        found = nsa.distributed.positions(8, mesh, cu_seqlens=bounds)
        assert nsa.distributed.positions(8, mesh).device.type == "meta"
        assert nsa.distributed.positions(8, mesh, device="cpu").tolist() == list(range(8))
    # By default where the boundaries are.
    assert found.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert nsa.distributed.positions(8, mesh, cu_seqlens=bounds, device="meta").is_meta
