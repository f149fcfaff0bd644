"""The gated sum and the gradient of the queries: as autograd has it, also on slices of heads."""

import pytest
import torch

import nsa
from nsa.fused import kernel_calls
from nsa.fused.attention import query_placements
from nsa.fused.gating import combine_branches, combine_branches_backward, query_gradient
from nsa.fused.placement import IN_ORDER
from nsa.fused.plan import make_plan
from nsa.testing import make_cu_seqlens
from tests.helpers import emulated_kernels
from tests.helpers.gpu_cases import gpu_test, slice_of_heads
from tests.helpers.requirements import import_fused

FORMS = ["weight", "gates", "mean"]


def make_problem(form: str, shape, dtype=torch.float64, device="cpu"):
    """(branches, q, gates, weight, dout) of ``shape (B, T, H, D)``."""
    x = torch.randn(5, *shape, dtype=dtype, device=device)
    gates = weight = None
    if form == "gates":
        gates = torch.randn(*shape[:3], 3, dtype=dtype, device=device)
    if form == "weight":
        weight = torch.randn(shape[2], 3, shape[3], dtype=dtype, device=device)
    return x[:3].unbind(), x[3], gates, weight, x[4]


def combine_plainly(branches, q, gates, weight):
    if weight is not None:
        gates = torch.einsum("bthd,hid->bthi", q, weight).sigmoid()
    elif gates is None:
        return sum(branches) / 3
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))


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
    actual = combine_branches_backward(slice_of_heads(dout), branches, q, gates, weight)
    dq = query_gradient(branches, actual.logits, weight, out=branches[2])
    assert dq.data_ptr() == branches[2].data_ptr()
    # Of the branches' own gradients of q, which stand in for it here, one was written over.
    plain = sum(x.detach() for x in leaves[:3])
    own = [x for x in (actual.gates, actual.gate_proj_weight) if x is not None]
    torch.testing.assert_close([*actual.branches, dq - plain, *own], list(grads))


@pytest.mark.usefixtures("fused_on_cpu")
def test_output_that_would_be_lost_is_refused():
    """Rows of the output that are no view of it would be a copy, thrown away."""
    vectors = import_fused("nsa.fused.kernels.vectors")
    vectors.check_output("out", torch.empty(2, 5, 4, 8)[:, :, :3])
    with pytest.raises(ValueError, match=r"out has shape .* written in place"):
        vectors.check_output("out", torch.empty(2, 7, 3, 8)[:, :5])


def results(kernels, branches, q, gates, weight, dout, placements=IN_ORDER) -> list[torch.Tensor]:
    """Output, gradient of ``q`` in place of one of its terms, and the other gradients."""
    out = slice_of_heads(q[None])[0]
    out = kernels.gating_forward(*branches, q, gates, weight, out, placements)
    tensors = (dout, *branches, q, gates, weight, placements)
    *grads, dlogits, dgates, dweight = kernels.gating_backward(*tensors)
    dq = kernels.query_gradient(*branches, dlogits, weight, branches[2], placements)
    return [x for x in (out, dq, *grads, dlogits, dgates, dweight) if x is not None]


def place(x: torch.Tensor, placement, size: int) -> torch.Tensor:
    """``x (R, H, D)`` where ``placement`` says, among NaN, one token and head after the other."""
    placed = x.new_full((size, 1, x.shape[2]), torch.nan)
    for row, start in enumerate(placement.place.tolist()):
        for head in range(x.shape[1]):
            group, member = divmod(head, placement.group)
            if start >= 0:
                vector = start * placement.unit + group * placement.group_stride + member
                placed[vector, 0] = x[row, head]
    return placed


def make_placements(lengths, heads, kv_heads, visibility, device="cpu"):
    """Placements of packed sequences, (folded, aligned rows), and the vectors of each layout."""
    config = nsa.NSAConfig(
        compress_block_size=16, select_block_size=64, q_tile_size=64,
        compressed_visibility=visibility,
    )  # fmt: skip
    q = torch.empty(1, sum(lengths), heads, 8, device=device)
    plan = make_plan(q, make_cu_seqlens(lengths).to(device), max(lengths), config)
    placements = query_placements(q, kv_heads, plan)
    return placements, (plan.folded.rows.total * 16 * heads, plan.tokens.rows * heads), plan


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("visibility", ["complete", "started"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (8, 2), (4, 1)])
def test_placements_are_where_queries_are_copied_to(heads, kv_heads, visibility):
    lengths = [0, 1, 63, 65, 15, 64]
    placements, sizes, plan = make_placements(lengths, heads, kv_heads, visibility)
    q = torch.randn(1, sum(lengths), heads, 8)
    copies = (plan.folded.fold(q, kv_heads), plan.tokens.pack(q))
    for placement, size, copied in zip(placements, sizes, copies, strict=True):
        placed = place(q[0], placement, size).nan_to_num(0)
        torch.testing.assert_close(placed.view(copied.shape), copied, rtol=0, atol=0)


class TestKernels:
    pytestmark = gpu_test

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("dim", [96, 128])
    @pytest.mark.parametrize("form", FORMS)
    def test_equal_float64_on_slices_of_heads(self, form, dim, dtype):
        branches, q, gates, weight, dout = make_problem(form, (1, 1000, 3, dim), dtype, "cuda")
        tensors = [*branches, q, dout]
        gates = None if gates is None else gates[0]
        weight = None if weight is None else weight / dim**0.5
        exact = [None if x is None else x.double() for x in (gates, weight)]

        *branches, q, dout = (slice_of_heads(x)[0] for x in tensors)
        actual = results(kernel_calls, branches, q, gates, weight, dout)
        *branches, q, dout = (x[0].double() for x in tensors)
        expected = results(emulated_kernels, branches, q, *exact, dout)
        for x, y in zip(actual, expected, strict=True):
            tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * y.abs().max().item())
            torch.testing.assert_close(x.double(), y, **tolerance)

    @pytest.mark.parametrize("dim", [64, 96, 128, 256])
    @pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 2)])
    @pytest.mark.parametrize("cmp_placed", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_equal_float64_with_placements(self, form, cmp_placed, heads, kv_heads, dim):
        lengths = [0, 1, 63, 65, 15, 64, 3]
        placements, sizes, _ = make_placements(lengths, heads, kv_heads, "complete", "cuda")
        placements = (placements[0] if cmp_placed else None, placements[1])
        shape = (1, sum(lengths), heads, dim)
        problem = make_problem(form, shape, torch.bfloat16, "cuda")
        branches, q, gates, weight, dout = problem
        branches = [x[0].clone() for x in branches]
        for i, (placement, size) in enumerate(zip(placements, sizes, strict=True)):
            if placement is not None:
                branches[i] = place(branches[i], placement, size)
        q, dout = q[0], dout[0]
        gates = None if gates is None else gates[0]
        weight = None if weight is None else weight / dim**0.5
        exact = [None if x is None else x.double() for x in (*branches, q, gates, weight, dout)]

        expected = results(emulated_kernels, exact[:3], *exact[3:], placements)
        actual = results(kernel_calls, branches, q, gates, weight, dout, placements)
        for x, y in zip(actual, expected, strict=True):
            tolerance = dict(rtol=torch.finfo(x.dtype).eps, atol=1e-4 * y.abs().max().item())
            torch.testing.assert_close(x.double(), y, **tolerance)
