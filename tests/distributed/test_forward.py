"""Outputs, gradients and selection of several ranks equal those of one process, in float64."""

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import nsa
from nsa.distributed.order import ORDERS
from nsa.testing import make_cu_seqlens
from tests.helpers import rank_cases
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.strategies import Problem, leaves, problems, tile_problems, token_problems

# A failing example is not made smaller: each try may restart the ranks.
COMMON = WITH_FIXTURES | {"phases": [Phase.explicit, Phase.reuse, Phase.generate]}

SUMMED = ("gate_proj_weight", "compress_k_weight", "compress_v_weight")


@st.composite
def cut_layouts(draw, config: nsa.NSAConfig, ranks: int, order: str):
    """Lengths that ``ranks`` can share; sequences of 0 and 1 tokens and over several ranks."""
    cuts = ranks if order == "contiguous" else 2 * ranks
    unit = 1 if config.selection == "token" else config.q_tile_size
    if draw(st.booleans()):
        batch = draw(st.sampled_from([1, 2]))
        length = cuts * unit * draw(st.integers(0, max(1, 60 // (batch * cuts * unit))))
        return [length] * batch, (batch, length), {}
    if order == "head-tail-each":
        each = st.integers(0, max(1, 24 // (cuts * unit)))
        lengths = [cuts * unit * n for n in draw(st.lists(each, max_size=3))]
    else:
        some = st.one_of(st.sampled_from([0, 1]), st.integers(2, max(2, 30 // unit)))
        lengths = [unit * n for n in draw(st.lists(some, max_size=4))]
        lengths.append(-sum(lengths) % (cuts * unit))
        if draw(st.booleans()):
            lengths.append(0)
    return lengths, (sum(lengths),), {"cu_seqlens": make_cu_seqlens(lengths)}


@st.composite
def cut_problems(draw, kinds=(problems,), **fixed):
    """``(problem, ranks, order)``."""
    ranks, order = draw(st.sampled_from([2, 3])), draw(st.sampled_from(ORDERS))
    kind = draw(st.sampled_from(kinds))
    problem = draw(kind(layouts=lambda config: cut_layouts(config, ranks, order), **fixed))
    return problem, ranks, order


def gradients(problem: Problem, dout: torch.Tensor) -> tuple[torch.Tensor, Problem]:
    """Output of one process, and its gradients in the form of the problem."""
    inputs = [x.requires_grad_() for x in leaves(problem)]
    out = problem.forward(backend="reference")
    found = torch.autograd.grad(out, inputs, dout, allow_unused=True)
    by_input = {id(x): g for x, g in zip(inputs, found, strict=True)}

    def gradient(x):
        if isinstance(x, tuple):
            return tuple(map(gradient, x))
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            return x
        grad = by_input[id(x)]
        return torch.zeros_like(x) if grad is None else grad

    for x in inputs:
        x.requires_grad_(False)
    extras = {name: gradient(x) for name, x in problem.extras.items()}
    grads = Problem(*map(gradient, problem[:3]), problem.config, extras)
    return out.detach(), grads


def check_ranks(world, problem: Problem, ranks: int, order: str, backend: str = "reference"):
    """Outputs and every gradient of the ranks equal those of one process."""
    value = problem.v[0] if isinstance(problem.v, tuple) else problem.v
    shape = torch.Size((*problem.q.shape[:-1], value.shape[-1]))
    dout = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
    out, grads = gradients(problem, dout)
    results = world.run(
        rank_cases.output_and_gradients, problem, order, dout, backend, ranks=ranks
    )
    dim = rank_cases.token_dim(problem)
    summed = dict.fromkeys(SUMMED, 0)
    for rank, (own_out, *own) in enumerate(results):
        tokens = rank_cases.own_tokens(problem, ranks, rank, order)
        torch.testing.assert_close(own_out, out.index_select(dim, tokens), rtol=0, atol=1e-9)
        part = rank_cases.own_part(grads, ranks, rank, order)
        weights = {id(x): name for name, x in part.extras.items() if name in SUMMED}
        for expected, actual in zip(leaves(part), own, strict=True):
            actual = torch.zeros_like(expected) if actual is None else actual
            if id(expected) in weights:
                summed[weights[id(expected)]] += actual
            else:
                torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    for name, total in summed.items():
        if name in grads.extras:
            torch.testing.assert_close(total, grads.extras[name], rtol=0, atol=1e-9)


@settings(max_examples=examples(50), **COMMON)
@given(case=cut_problems())
def test_output_and_gradients_equal_one_process(world, case):
    check_ranks(world, *case)


STRICT = {"causal": True, "compressed_visibility": "complete"}


@settings(max_examples=examples(20), **COMMON)
@given(case=cut_problems((tile_problems, token_problems), **STRICT))
def test_the_fused_backend_equals_one_process(world, case):
    check_ranks(world, *case, backend="fused")


@settings(max_examples=examples(20), **COMMON)
@given(case=cut_problems())
def test_selection_equals_one_process_and_may_be_given(world, case):
    problem, ranks, order = case
    indices = problem.select_blocks(backend="reference")
    results = world.run(rank_cases.selected_blocks, problem, order, ranks=ranks)
    given = problem._replace(extras=problem.extras | {"block_indices": indices})
    for rank, own in enumerate(results):
        part = rank_cases.own_part(given, ranks, rank, order)
        assert torch.equal(own, part.extras["block_indices"])
    check_ranks(world, given, ranks, order)
