"""Errors come on every rank, name what is wrong, and leave no rank waiting."""

import dataclasses
import re

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs
from tests.distributed import error_cases
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


def one_kv(problem: Problem) -> Problem:
    """One tensor is the keys and the values."""
    return problem._replace(v=problem.k)


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
        (
            one_kv(own_problem()),
            own_problem(),
            r"differ in tensors for k selected, k window, v selected, v window: "
            r"rank 0 \(0, 0, 0, 0\), rank 1 \(0, 0, 1, 1\)$",
        ),
    ],
    ids=["length", "config", "requires_grad", "boundaries", "gates", "shared"],
)
def test_ranks_that_differ(world, first, second, message):
    texts = errors(world, first, second)
    assert texts[0] == texts[1]
    assert texts[0].startswith("ValueError: all ranks must make the same call, but differ in ")
    assert re.search(message, texts[0]), texts[0]


def test_dtypes_of_autocast_that_differ(world):
    texts = world.run(error_cases.autocast, own_problem(), ranks=2)
    assert texts[0] == texts[1]
    assert texts[0].endswith("differ in computed in: rank 0 torch.bfloat16, rank 1 torch.float16")


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
            "cu_seqlens must end at the 24 tokens of all 2 ranks, got 22",
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


def assert_only_rank_1_is_wrong(texts, message):
    assert texts[1].startswith(message)
    assert texts[0] == f"ValueError: another rank cannot make this call: rank 1: {texts[1]}"


def test_an_order_of_one_rank_that_is_wrong(world):
    texts = errors(world, own_problem(), own_problem(), orders=("head-tail", "zigzag"))
    assert_only_rank_1_is_wrong(texts, "ValueError: order must be one of")
    texts = world.run(error_cases.order_of_selection, own_problem(), ranks=2)
    assert_only_rank_1_is_wrong(texts, "ValueError: order must be one of")


def test_an_argument_of_one_rank_that_cannot_be_described(world):
    changes = ({}, dict(max_workspace_bytes=error_cases.Nameless()))
    texts = errors(world, own_problem(), own_problem(), changes=changes)
    assert_only_rank_1_is_wrong(texts, "RuntimeError: no name")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dim=9), "ValueError: dim must be one of the 3 dimensions of x, got 9"),
        (dict(x=None), "TypeError: x must be a tensor, got NoneType"),
        (dict(order="zigzag"), "ValueError: order must be one of"),
    ],
    ids=["dim", "x", "order"],
)
def test_unshard_of_one_rank_that_is_wrong(world, change, message):
    texts = world.run(error_cases.unshard, change, ranks=2)
    assert_only_rank_1_is_wrong(texts, message)


@pytest.mark.parametrize("function", ["forward", "select_blocks"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(cache=object()), "UnsupportedError: a layer under context parallelism"),
        (dict(cu_seqlens=torch.tensor([0.0, 24.0])), "TypeError: cu_seqlens must"),
    ],
    ids=["cache", "cu_seqlens"],
)
def test_a_layer_of_one_rank_that_is_wrong(world, function, change, message):
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["token"])
    texts = world.run(error_cases.layer, layer, function, change, ranks=2)
    assert_only_rank_1_is_wrong(texts, message)


def test_a_gate_that_fails_on_one_rank(world):
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["token"])
    texts = world.run(error_cases.failing_gate, layer, ranks=2)
    assert_only_rank_1_is_wrong(texts, "RuntimeError: this module fails")


def test_what_fails_on_one_rank_later_ends_the_others_in_time(world):
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["token"])
    first, second = world.run(error_cases.failing_compressor, layer, 4, ranks=2)
    assert second == "RuntimeError: this module fails"
    assert first.startswith("RuntimeError")
    assert "imed out" in first or "closed" in first


def test_a_learned_compressor_on_one_rank(world):
    layers = [
        nsa.NativeSparseAttention(16, 4, 2, SMALL["token"], compressor=compressor)
        for compressor in ("mlp", "mean")
    ]
    texts = world.run(error_cases.different_layers, layers, ranks=2)
    assert texts[0] == texts[1]
    assert texts[0].endswith("differ in learned compressor: rank 0 True, rank 1 False")


def test_fused_says_what_it_needs(world):
    part = own_problem(config=dataclasses.replace(SMALL["token"], causal=False))
    problem = part._replace(extras={})
    (text, _) = world.run(rank_cases.fused_error, problem, ranks=2)
    assert text.startswith("UnsupportedError: backend='fused' cannot do this")
    assert "needs causal=True" in text


def test_ranks_that_call_different_functions(world):
    texts = world.run(rank_cases.error_of_different_functions, own_problem(), ranks=2)
    assert texts[0] == texts[1]
    assert texts[0].endswith("differ in function: rank 0 forward, rank 1 select_blocks")


def test_a_mesh_of_another_device(world):
    texts = world.run(rank_cases.error_of_meta_tensors, own_problem(), ranks=2)
    assert texts[0] == texts[1] == "ValueError: q must be on a cpu device as mesh is, got meta"


def test_errors_of_helpers(world):
    unshard, gradient, pieces, mesh, kind, order, fine = world.run(
        rank_cases.errors_of_helpers, ranks=3
    )[0]
    assert "shape of x: rank 0 (1, 12, 2), rank 1 (1, 13, 2)" in unshard
    assert "unshard has none" in gradient
    assert "must be a multiple of 6" in pieces
    assert (
        "must have 1 dimension, that of the sequence, got 2 ('dp', 'cp'); pass mesh['cp']" in mesh
    )
    assert kind.startswith("TypeError: mesh must be a DeviceMesh or a ProcessGroup, got str")
    assert "order must be one of" in order
    assert fine == "no error"


def test_wrong_arguments_of_helpers(world):
    dim, x, kind, negative, device, outside = world.run(error_cases.wrong_arguments, ranks=2)[0]
    assert dim == "ValueError: dim must be one of the 3 dimensions of x, got 9"
    assert x == "TypeError: x must be a tensor, got list"
    assert kind == "TypeError: length must be an int, got float"
    assert negative == "ValueError: length must be at least 0, got -12"
    assert device == "ValueError: device must be one that PyTorch knows, got 'gpu'"
    assert outside == "ValueError: mesh must hold this rank, 0, which is not in it"


def test_one_rank_refuses_what_more_refuse(mesh):
    part, longer = own_problem(12), own_problem(14)
    message = "k must have as many tokens as q, 12, got 14"
    with pytest.raises(ValueError, match=message):
        nsa.distributed.forward(part.q, longer.k, longer.v, mesh=mesh, config=part.config)
    with pytest.raises(ValueError, match=message):
        nsa.distributed.select_blocks(part.q, longer.k, mesh=mesh, config=part.config)
    bounds = nsa.Packing(make_cu_seqlens([12]), make_cu_seqlens([14]))
    q, k, v = part.q[0], longer.k[0], longer.v[0]
    with pytest.raises(ValueError, match=message):
        nsa.distributed.forward(q, k, v, mesh=mesh, config=part.config, cu_seqlens=bounds)


def test_no_process_group():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group first"):
        nsa.distributed.shard(torch.zeros(1, 4), None, 1)
