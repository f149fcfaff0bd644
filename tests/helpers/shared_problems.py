"""Problems that ranks can share, and the comparison of ranks with one process."""

from collections.abc import Callable

import torch
from hypothesis import Phase
from hypothesis import strategies as st

import nsa
from nsa.distributed.order import ORDERS
from nsa.testing import make_cu_seqlens
from tests.helpers import rank_cases
from tests.helpers.profiles import WITH_FIXTURES
from tests.helpers.strategies import Problem, leaves, problems

# A failing example is not made smaller: each try may restart the ranks.
COMMON = WITH_FIXTURES | {"phases": [Phase.explicit, Phase.reuse, Phase.generate]}

SUMMED = ("gate_proj_weight", "compress_k_weight", "compress_v_weight")


@st.composite
def cut_layouts(draw, config: nsa.NSAConfig, ranks: int, order: str, most: int):
    """Lengths that ``ranks`` can share, of about ``most`` tokens at most in total.

    Some sequences have 0 or 1 tokens, and some lie on several ranks.
    """
    cuts = ranks if order == "contiguous" else 2 * ranks
    unit = 1 if config.selection == "token" else config.q_tile_size
    if draw(st.booleans()):
        batch = draw(st.sampled_from([1, 2, 1, 0]))
        length = cuts * unit * draw(st.integers(0, max(1, most // (max(1, batch) * cuts * unit))))
        return [length] * batch, (batch, length), {}
    if order == "head-tail-each":
        each = st.integers(0, max(1, most // (3 * cuts * unit)))
        lengths = [cuts * unit * n for n in draw(st.lists(each, max_size=3))]
    else:
        some = st.one_of(st.sampled_from([0, 1]), st.integers(2, max(2, most // (2 * unit))))
        lengths = [unit * n for n in draw(st.lists(some, max_size=4))]
        lengths.append(-sum(lengths) % (cuts * unit))
        if draw(st.booleans()):
            lengths.append(0)
    return lengths, (sum(lengths),), {"cu_seqlens": make_cu_seqlens(lengths)}


@st.composite
def cut_problems(draw, kinds=(problems,), most: int = 60, **fixed):
    """``(problem, ranks, order)``."""
    ranks, order = draw(st.sampled_from([2, 3])), draw(st.sampled_from(ORDERS))
    kind = draw(st.sampled_from(kinds))
    problem = draw(kind(layouts=lambda config: cut_layouts(config, ranks, order, most), **fixed))
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


def check_ranks(
    world,
    problem: Problem,
    ranks: int,
    order: str,
    backend: str = "reference",
    case: Callable = rank_cases.output_and_gradients,
):
    """Outputs and every gradient of the ranks equal those of one process."""
    value = problem.v[0] if isinstance(problem.v, tuple) else problem.v
    shape = torch.Size((*problem.q.shape[:-1], value.shape[-1]))
    dout = torch.linspace(-1, 1, shape.numel(), dtype=torch.float64).view(shape)
    out, grads = gradients(problem, dout)
    results = world.run(case, problem, order, dout, backend, ranks=ranks)
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
