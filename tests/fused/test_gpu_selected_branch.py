"""On the GPU: ``nsa.selected_attention`` against dense attention in float64."""

from typing import NamedTuple

import pytest
import torch

import nsa
from nsa.testing import assert_as_accurate
from tests.helpers.gpu_cases import assert_equal_but_for_rounding, gpu_test
from tests.helpers.poison import poisoned_memory
from tests.helpers.selected_cases import NAMES, SelectedProblem, make_problem, results

pytestmark = gpu_test

_BF16, _FP16 = torch.bfloat16, torch.float16


class Form(NamedTuple):
    """Options that kernels are compiled for. This is a covering set: each costs seconds."""

    dims: tuple[int, int]
    group: int
    block_size: int
    slots: int
    dtype: torch.dtype
    causal: bool = True
    packed: bool = True


FORMS = [
    Form((128, 128), 16, 128, 16, _BF16),
    Form((128, 128), 4, 128, 4, _FP16, causal=False, packed=False),
    Form((96, 96), 3, 128, 3, _FP16),
    Form((64, 64), 64, 128, 2, _BF16, packed=False),
    Form((64, 64), 1, 32, 7, _BF16),
    Form((128, 64), 6, 64, 5, _BF16, packed=False),
    Form((256, 256), 6, 128, 3, _BF16),
]
PACK = [(300, 300), (0, 40), (1, 1), (63, 200), (65, 65), (0, 0), (33, 900), (700, 700)]


def gpu_problem(form: Form, **changes) -> SelectedProblem:
    return make_problem(
        PACK if form.packed else [(500, 700)] * 2,
        packed=form.packed,
        kv_heads=2,
        group=form.group,
        dims=form.dims,
        block_size=form.block_size,
        slots=form.slots,
        causal=form.causal,
        dtype=form.dtype,
        device="cuda",
        **changes,
    )


def form_id(form: Form) -> str:
    dims = "x".join(map(str, form.dims))
    return f"D{dims}-G{form.group}-{form.block_size}x{form.slots}"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_results_and_gradients(form, deterministic):
    problem = gpu_problem(form)
    exact = results(problem.to(torch.float64), SelectedProblem.dense)
    same_dtype = results(problem, lambda x: x.attend(backend="reference"))
    with poisoned_memory():
        options = dict(deterministic=deterministic, backend="fused")
        actual = results(problem, lambda x: x.attend(**options))
    seen = exact[1] > -torch.inf
    assert torch.equal(actual[1] > -torch.inf, seen)
    actual[1], same_dtype[1], exact[1] = (x[1][seen] for x in (actual, same_dtype, exact))
    for name, *triple in zip(NAMES, actual, same_dtype, exact, strict=True):
        # The kernels add into float32 what they rounded to 16 bits.
        assert_as_accurate(name, *triple, atol=1e-4)


@torch.no_grad()
def test_lists_of_any_strides():
    """To the bit: each row of the list is read as it is."""
    problem = gpu_problem(FORMS[0])
    expected = problem.attend(backend="fused")
    for order in ((1, 0, 2), (2, 0, 1), (2, 1, 0)):
        inverse = [order.index(i) for i in range(3)]
        indices = problem.block_indices.permute(order).contiguous().permute(inverse)
        actual = problem._replace(block_indices=indices).attend(backend="fused")
        for pair in zip(actual, expected, strict=True):
            assert torch.equal(*pair)


def test_compiled_code():
    torch._dynamo.reset()
    problem = gpu_problem(FORMS[0])
    bounds = problem.boundaries() | {"max_seqlen": 700, "max_seqlen_k": 900}

    def function(q, k, v):
        out, lse = problem._replace(q=q, k=k, v=v).attend(backend="fused", **bounds)
        return out.float().square().sum() + torch.where(lse > -torch.inf, lse, 0).sum()

    compiled = torch.compile(function, fullgraph=True)
    steps = []
    for call in (function, compiled):
        out = call(*problem.leaves)
        steps.append((out.detach(), *torch.autograd.grad(out, problem.leaves)))
    for expected, actual in zip(*steps, strict=True):
        assert_equal_but_for_rounding(actual, expected)


@torch.no_grad()
def test_cuda_graph():
    problem = gpu_problem(FORMS[0])
    bounds = problem.boundaries() | {"max_seqlen": 700, "max_seqlen_k": 900}
    problem.attend(backend="fused", **bounds)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.attend(backend="fused", **bounds)
    other = gpu_problem(FORMS[0], seed=1)
    for x, y in zip(problem[:4], other[:4], strict=True):
        x.copy_(y)
    graph.replay()
    for pair in zip(captured, other.attend(backend="fused"), strict=True):
        assert torch.equal(*pair)


def test_selection_of_nsa_by_itself():
    """The selected branch of the paper's configuration, by the blocks that it selects."""
    config = nsa.NSAConfig.paper()
    length = 900
    q, k, v = (torch.randn(1, length, n, 128, device="cuda", dtype=_BF16) for n in (32, 2, 2))
    blocks = nsa.select_blocks(q, k, config=config, backend="fused")
    gates = torch.zeros(1, length, 32, 3, device="cuda", dtype=_BF16)
    gates[..., 1] = 1
    expected = nsa.forward(
        q, k, v, config=config, gates=gates, block_indices=blocks, backend="fused"
    )
    actual, _ = nsa.selected_attention(q, k, v, blocks, backend="fused")
    assert_equal_but_for_rounding(actual, expected)


@pytest.mark.parametrize("dtype", [_BF16, _FP16])
def test_one_key_gives_its_value_and_no_gradient_of_the_query(dtype):
    """Exactly, because ``dP - delta`` cancels only then."""
    bounds = torch.arange(101, device="cuda", dtype=torch.int32)
    shapes = ((100, 32, 128), (100, 2, 128), (100, 2, 128))
    q, k, v = (torch.randn(x, device="cuda", dtype=dtype, requires_grad=True) for x in shapes)
    indices = torch.zeros(100, 2, 1, device="cuda", dtype=torch.int32)
    out = nsa.selected_attention(
        q, k, v, indices, cu_seqlens=bounds, max_seqlen=1, return_lse=False, backend="fused"
    )
    assert torch.equal(out, v.repeat_interleave(16, dim=1))
    (dq,) = torch.autograd.grad(out, q, torch.randn_like(out))
    assert dq.abs().max() <= 1e-4
