"""The gated sum and the gradient of the queries: as autograd has it, also on slices of heads."""

import pytest
import torch

from nsa.fused.gating import combine_branches, combine_branches_backward, query_gradient
from nsa.fused.hardware import LOG2_E
from tests.helpers.gating_cases import (
    FORMS,
    in_order,
    make_placements,
    make_problem,
    make_statistics,
    place,
)
from tests.helpers.gpu_cases import slice_of_heads


def combine_plainly(branches, q, gates, weight):
    if weight is not None:
        gates = torch.einsum("bthd,hid->bthi", q, weight).sigmoid()
    elif gates is None:
        return sum(branches) / 3
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_are_multiplied_into_gradients_of_float16(dtype):
    """P times a small gate would be denormal in float16, and gradients of values inexact."""
    branches, q, _, weight, dout = make_problem("weight", (2, 5, 3, 8), dtype)
    statistics = make_statistics((10, 3, 8), in_order(10, 3))
    lses = tuple(x.float() for x in statistics.lses)
    actual = combine_branches_backward(dout, branches, lses, q, None, weight, statistics.placements)
    gates = torch.einsum("bthd,hid->bthi", q.float(), weight.float()).sigmoid()
    by_head = [torch.where(x == -torch.inf, torch.inf, x * LOG2_E) for x in lses]
    for i, (lse_log2, delta) in enumerate(actual.statistics):
        if dtype == torch.bfloat16:
            assert actual.douts[i] is dout
            continue
        assert torch.equal(lse_log2, by_head[i])
        own = (gates[..., i, None] * dout.float()).half()
        torch.testing.assert_close(actual.douts[i], own)
        product = (actual.douts[i].float() * branches[i].float()).sum(-1).view(10, 3)
        torch.testing.assert_close(delta.view(10, 3) if i == 1 else delta.view(3, 10).T, product)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("form", FORMS)
def test_equals_autograd(form):
    branches, q, gates, weight, dout = make_problem(form, (2, 5, 3, 8))
    leaves = [x for x in (*branches, q, gates, weight) if x is not None]
    leaves = [x.requires_grad_() for x in leaves]
    expected = combine_plainly(branches, q, gates, weight)
    grads = torch.autograd.grad(expected, leaves, dout, materialize_grads=True)
    *branches, q = (slice_of_heads(x.detach()) for x in (*branches, q))

    out = slice_of_heads(torch.zeros_like(q))
    assert combine_branches(branches, q, gates, weight, out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, expected)
    statistics = make_statistics((10, 3, 8), in_order(10, 3))
    actual = combine_branches_backward(
        slice_of_heads(dout), branches, statistics.lses, q, gates, weight, statistics.placements
    )
    dq = query_gradient(branches, actual.logits, weight, out=branches[2])
    assert dq.data_ptr() == branches[2].data_ptr()
    # Of the branches' own gradients of q, which stand in for it here, one was written over.
    plain = sum(x.detach() for x in leaves[:3])
    own = [x for x in (actual.gates, actual.gate_proj_weight) if x is not None]
    torch.testing.assert_close([dq - plain, *own], list(grads[3:]))
    for i, grad in enumerate(grads[:3]):
        tensors = (statistics.lses[i], *actual.statistics[i])
        # The selected branch is by row, the others are by head.
        rows = [x.view(10, 3) if i == 1 else x.view(3, 10).T for x in tensors]
        lse, lse_log2, delta = (x.reshape(2, 5, 3) for x in rows)
        seen = lse > -torch.inf
        assert torch.equal(lse_log2 < torch.inf, seen)
        # The probability of a score of 0, with the gate and without.
        gate = (lse * LOG2_E - lse_log2).exp2()[..., None]
        torch.testing.assert_close((gate * actual.douts[i])[seen], grad[seen])
        torch.testing.assert_close(delta, (actual.douts[i] * leaves[i]).sum(-1))


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("visibility", ["complete", "started"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 2), (4, 1)])
def test_placements_are_where_queries_are_copied_to(heads, kv_heads, visibility):
    lengths = [0, 1, 63, 65, 15, 64]
    placements, sizes, plan = make_placements(lengths, heads, kv_heads, visibility)
    q = torch.randn(1, sum(lengths), heads, 8)
    copies = (plan.folded.fold(q, kv_heads), plan.queries.pack(q))
    for placement, size, copied in zip(placements, sizes, copies, strict=True):
        placed = place(q[0], placement, size).nan_to_num(0)
        torch.testing.assert_close(placed.view(copied.shape), copied, rtol=0, atol=0)
