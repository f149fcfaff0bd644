"""On the GPU: ``nsa.selected_attention`` of keys in pages, read in place and copied."""

import pytest
import torch

from nsa.testing import assert_as_accurate
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.paged_keys import attend_pages, in_pages
from tests.helpers.poison import poisoned_memory
from tests.helpers.selected_cases import SelectedProblem, make_problem

pytestmark = gpu_test

_BF16, _FP16 = torch.bfloat16, torch.float16
FEW = [(1, 3000), (8, 8), (0, 40), (3, 65), (5, 1000), (0, 0), (1, 1), (2, 63)]
MANY = [(300, 300), (0, 40), (1, 1), (63, 200), (9, 900)]
# dims, group, block_size, slots, dtype, page_size, lengths
FORMS = {
    "MiniMax-M3": ((128, 128), 16, 128, 16, _BF16, 128, FEW),
    "64": ((64, 96), 3, 64, 7, _FP16, 192, FEW),
    "32": ((128, 128), 1, 32, 64, _BF16, 64, FEW),
    "many heads": ((96, 96), 32, 128, 3, _BF16, 256, FEW),
    "copied": ((128, 128), 4, 64, 5, _BF16, 48, MANY),
}


def gpu_problem(form: str, **changes) -> tuple[SelectedProblem, int]:
    """A packed problem, and the size of its pages."""
    dims, group, block_size, slots, dtype, page_size, lengths = FORMS[form]
    sizes = dict(lengths=lengths, packed=True, kv_heads=2, causal=True) | changes
    problem = make_problem(
        group=group, dims=dims, block_size=block_size, slots=slots, dtype=dtype, device="cuda",
        **sizes,
    )  # fmt: skip
    return problem, page_size


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_results(form, causal):
    problem, page_size = gpu_problem(form, causal=causal)
    exact = problem.to(torch.float64).dense()
    same_dtype = problem.attend(backend="reference")
    for by_heads in (False, True):
        pages = in_pages(problem, page_size, by_heads)
        with poisoned_memory():
            actual = attend_pages(problem, pages, backend="fused")
        seen = exact[1] > -torch.inf
        assert torch.equal(actual[1] > -torch.inf, seen)
        for name, *triple in zip(("out", "lse"), actual, same_dtype, exact, strict=True):
            if name == "lse":
                triple = [x[seen] for x in triple]
            assert_as_accurate(name, *triple, atol=1e-4)


@torch.no_grad()
def test_a_graph_is_replayed_as_sequences_grow():
    problem, page_size = gpu_problem("MiniMax-M3", lengths=[(1, 3000)] * 2, packed=False)
    pages = in_pages(problem, page_size)
    attend_pages(problem, pages, backend="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend_pages(problem, pages, backend="fused")
    for lengths in ([129, 1], [2999, 3000]):
        pages["seqused_k"].copy_(torch.tensor(lengths))
        # A block past a sequence has no keys; while a graph is captured, no value is checked.
        blocks = -(-pages["seqused_k"].view(2, 1, 1, 1) // 128)
        inside = problem.block_indices < blocks
        graph.replay()
        lists = problem.block_indices.masked_fill(~inside, -1)
        expected = attend_pages(problem._replace(block_indices=lists), pages, backend="fused")
        for pair in zip(captured, expected, strict=True):
            assert torch.equal(*pair)
