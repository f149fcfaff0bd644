"""Errors come on every rank, name what is wrong, and leave no rank waiting."""

import dataclasses
import re

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers import rank_cases
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import Problem


def own_problem(tokens=12, config=SMALL["token"], packed=False, **extras) -> Problem:
    """A rank's own part."""
    leading = (tokens,) if packed else (1, tokens)
    q, k, v = make_inputs(leading, 2, 1, 4, dtype=torch.float64)
    return Problem(q, k, v, config, extras)


def errors(world, *parts: Problem, orders=("head-tail", "head-tail"), changes=({}, {})):
    return world.run(rank_cases.error_of, list(parts), list(changes), list(orders), ranks=2)


def requires_grad(problem: Problem) -> Problem:
    return problem._replace(q=problem.q.clone().requires_grad_())


OTHER = dataclasses.replace(SMALL["token"], window_size=3)
BOUNDS = [make_cu_seqlens([n, 24 - n]) for n in (10, 11)]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (own_problem(12), own_problem(14), r"q: .*rank 0 .*12.*rank 1 .*14"),
        (own_problem(), own_problem(config=OTHER), r"config: .*rank 0 .*=20.*rank 1 .*=3"),
        (own_problem(), requires_grad(own_problem()), r"q: .*rank 1 .*requires a gradient"),
        (
            own_problem(packed=True, cu_seqlens=BOUNDS[0]),
            own_problem(packed=True, cu_seqlens=BOUNDS[1]),
            r"cu_seqlens: rank 0 lengths \[10, 14\], rank 1 lengths \[11, 13\]",
        ),
        (
            own_problem(),
            own_problem(gates=torch.rand(1, 12, 2, 3, dtype=torch.float64)),
            r"gates: rank 0 None, rank 1 torch.float64",
        ),
    ],
    ids=["length", "config", "requires_grad", "boundaries", "gates"],
)
def test_ranks_that_differ(world, first, second, message):
    texts = errors(world, first, second)
    assert texts[0] == texts[1]
    assert texts[0].startswith("ValueError: all ranks must make the same call, but differ in ")
    assert re.search(message, texts[0]), texts[0]


def test_orders_that_differ(world):
    texts = errors(world, own_problem(), own_problem(), orders=("head-tail", "contiguous"))
    assert texts[0] == texts[1]
    assert "order: rank 0 head-tail, rank 1 contiguous" in texts[0]


def test_an_error_of_one_rank_is_raised_on_all(world):
    blocks = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    good = torch.zeros(1, 5, 1, 4, dtype=torch.float64)
    parts = [own_problem(compressed_kv=(x, x)) for x in (good, blocks)]
    problem = "ValueError: compressed_kv[0] must have shape (1, 6, 1, 4), got (1, 2, 1, 4)"
    texts = errors(world, *parts)
    assert texts[0] == f"ValueError: another rank cannot make this call: rank 1: {problem}"
    assert texts[1] == problem


@pytest.mark.parametrize(
    ("part", "order", "message"),
    [
        (own_problem(13), "head-tail", "must be a multiple of 4, 2 for each of 2 ranks"),
        (
            own_problem(packed=True, cu_seqlens=make_cu_seqlens([10, 14])),
            "head-tail-each",
            "each sequence must have a multiple of 4 tokens",
        ),
        (
            own_problem(20, SMALL["tile"]),
            "contiguous",
            "q_tile_size is 16, got a piece of rank 1 at position 20",
        ),
        (
            own_problem(packed=True, cu_seqlens=make_cu_seqlens([10, 12])),
            "contiguous",
            "cu_seqlens must end at the 24 tokens",
        ),
        (own_problem(max_seqlen=3), "contiguous", "max_seqlen must be None"),
        (own_problem(config="paper"), "contiguous", "config must be an nsa.NSAConfig"),
    ],
    ids=["pieces", "each", "tiles", "boundaries", "max_seqlen", "config"],
)
def test_arguments_that_are_wrong(world, part, order, message):
    texts = errors(world, part, part, orders=(order, order))
    assert texts[0] == texts[1]
    assert message in texts[0]


def test_fused_says_what_it_needs(world):
    part = own_problem(config=dataclasses.replace(SMALL["token"], causal=False))
    problem = part._replace(extras={})
    (text, _) = world.run(rank_cases.fused_error, problem, ranks=2)
    assert text.startswith("UnsupportedError: backend='fused' cannot do this")
    assert "needs causal=True" in text


def test_ranks_that_call_different_functions(world):
    texts = world.run(rank_cases.error_of_different_functions, own_problem(), ranks=2)
    assert texts[0] == texts[1]
    assert "function: rank 0 forward, rank 1 select_blocks" in texts[0]
    assert "v: rank 0 torch.float64 (1, 12, 1, 4) on cpu, rank 1 None" in texts[0]


def test_a_mesh_of_another_device(world):
    texts = world.run(rank_cases.error_of_meta_tensors, own_problem(), ranks=2)
    assert texts[0] == texts[1] == "ValueError: q must be on a cpu device as mesh is, got meta"


def test_errors_of_helpers(world):
    unshard, gradient, pieces, mesh, kind, order, fine = world.run(rank_cases.errors_of_helpers)[0]
    assert "shape of x: rank 0 (1, 12, 2), rank 1 (1, 13, 2)" in unshard
    assert "unshard has none" in gradient
    assert "must be a multiple of 6" in pieces
    assert (
        "must have 1 dimension, that of the sequence, got 2 ('dp', 'cp'); pass mesh['cp']" in mesh
    )
    assert kind.startswith("TypeError: mesh must be a DeviceMesh or a ProcessGroup, got str")
    assert "order must be one of" in order
    assert fine == "no error"


def test_no_process_group():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        nsa.distributed.shard(torch.zeros(1, 4), None, 1)
