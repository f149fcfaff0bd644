"""On the GPU: the gradients of token mode's selected branch against their emulation."""

import math

import pytest
import torch

import nsa
from nsa.fused import kernel_calls
from nsa.fused import waves as wave_sizes
from nsa.fused.fa4_call import new_query_sums
from nsa.fused.kernel_inputs import OtherGradients, RowStatistics
from nsa.fused.planning import make_plan
from nsa.testing import assert_as_accurate
from tests.helpers import emulated_token_kernels
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.token_cases import (
    FORMS,
    KV_HEADS,
    SEGMENTS,
    TokenForm,
    form_id,
    make_selected_case,
)

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


# Two warpgroups share the rows, and two CTAs the keys.
LONG_BLOCKS = [
    TokenForm(96, 4, 128, 5, False, torch.float16),
    TokenForm(256, 3, 128, 9, True, torch.bfloat16),
]
# TMA copies their rows: two pairs of a tile for each warp, one for two of 8 warps, one for each.
WIDE_GROUPS = [
    TokenForm(64, 8, 64, 5, True, torch.bfloat16),
    TokenForm(128, 32, 128, 4, False, torch.float16),
    TokenForm(256, 8, 64, 4, True, torch.bfloat16),
]


@pytest.mark.parametrize("forced", [False, True], ids=["any blocks", "band"])
@pytest.mark.parametrize("waves", ["one wave", "a unit a wave"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", FORMS + LONG_BLOCKS + WIDE_GROUPS, ids=form_id)
def test_selected_backward(form, segments, deterministic, waves, forced, monkeypatch):
    if waves == "a unit a wave":
        monkeypatch.setattr(wave_sizes, "GRADIENT_BYTES", 1)
    case = make_selected_case(form, forced=forced, segments=segments)
    wide = case.exact()
    out, lse = emulated_token_kernels.selected_forward(*wide[:3], *wide.selected, forced)

    # Gates, of which some are 0.
    log2_gate = torch.rand_like(lse).mul(1.1).sub(0.1).clamp(min=0).log2()

    def gradients(kernels, x, out, lse):
        results = (out.to(x.q), lse.to(x.q.device))
        statistics = kernels.row_statistics(x.dout, *results, None)
        gated = statistics.lse_log2 - log2_gate.to(statistics.lse_log2)
        statistics = statistics._replace(lse_log2=gated)
        options = dict(deterministic=deterministic)
        return kernels.selected_backward(x.dout, *x[:3], statistics, *x.selected, **options)

    exact = gradients(emulated_token_kernels, wide, out, lse)
    same_dtype = gradients(emulated_token_kernels, case.to("cpu", form.dtype), out, lse.float())
    actual = gradients(kernel_calls, case, out, lse.float())
    for name, *grads in zip(("dq", "dk", "dv"), actual, same_dtype, exact, strict=True):
        # The kernel adds into float32 what it rounded to 16 bits.
        assert_as_accurate(name, grads[0].cpu(), *grads[1:], atol=1e-4)


@pytest.mark.parametrize("group", [6, 16])
def test_many_short_items_have_the_same_bits_each_time(group, monkeypatch):
    """Each CTA has a tile or two, so that little hides a copy that is not waited for."""
    from nsa.fused.kernels import selected_backward  # which needs a GPU's packages

    monkeypatch.setattr(selected_backward, "choose_chunk_tokens", lambda *_: 128)
    total, blocks, heads = 8192, 128, KV_HEADS * group
    generator = torch.Generator(device="cuda").manual_seed(0)

    def draw(num_heads):
        shape = (total, num_heads, 128)
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    dout, q, k, v = draw(heads), draw(heads), draw(KV_HEADS), draw(KV_HEADS)
    order = torch.rand(total, KV_HEADS, blocks, generator=generator, device="cuda")
    token_blocks = make_plan(q[None], nsa.NSAConfig.paper()).token_blocks
    statistics = RowStatistics(torch.full((total, heads), 8.0, device="cuda"), q[..., 0].float())
    chosen = (order.topk(16).indices.int(), token_blocks, 64, 128**-0.5, True)

    def gradients(deterministic):
        arguments = (dout, q, k, v, statistics, *chosen)
        return kernel_calls.selected_backward(*arguments, deterministic=deterministic)

    expected = gradients(deterministic=True)
    assert all(x.isfinite().all() for x in expected)
    for _ in range(20):
        assert all(map(torch.equal, gradients(deterministic=True), expected))
        assert torch.equal(gradients(deterministic=False)[0], expected[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_finite_reaches_its_query_alone(dtype, value):
    total, heads = 300, KV_HEADS * 4
    shapes = (heads, heads, KV_HEADS, KV_HEADS)
    dout, q, k, v = (torch.randn(total, h, 128, device="cuda", dtype=dtype) for h in shapes)
    dout[200, 5, 7] = value
    token_blocks = make_plan(q[None], nsa.NSAConfig.paper()).token_blocks
    order = torch.rand(total, KV_HEADS, 5, device="cuda")
    statistics = RowStatistics(torch.full((total, heads), 8.0, device="cuda"), q[..., 0].float())
    chosen = (order.topk(3).indices.int(), token_blocks, 64, 128**-0.5, True)
    dq, *_ = kernel_calls.selected_backward(dout, q, k, v, statistics, *chosen)
    assert not dq[200, 5].isfinite().any()
    dq[200, 5] = 0
    assert dq.isfinite().all()


@pytest.mark.parametrize("with_weight", [False, True])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype"),
    [
        (16, 128, torch.bfloat16),
        (3, 96, torch.float16),
        (1, 64, torch.bfloat16),
        (6, 256, torch.bfloat16),
    ],
)
def test_other_gradients_are_added_before_rounding(group, head_dim, dtype, with_weight):
    batch, length, heads = 2, 700, KV_HEADS * group
    kind = dict(device="cuda", dtype=dtype)
    dout, q = (torch.randn(batch * length, heads, head_dim, **kind) for _ in "dq")
    k, v = (torch.randn(batch * length, KV_HEADS, head_dim, **kind) for _ in "kv")
    entries = q.unflatten(0, (batch, -1))
    token_blocks = make_plan(entries, nsa.NSAConfig.paper()).token_blocks
    order = torch.rand(batch * length, KV_HEADS, 10, device="cuda")
    statistics = RowStatistics(
        torch.full((batch * length, heads), 8.0, device="cuda"), q[..., 0].float()
    )
    scale = head_dim**-0.5
    arguments = (dout, q, k, v, statistics, order.topk(4).indices.int(), token_blocks, 64, scale)
    dq, *_ = kernel_calls.selected_backward(*arguments, True)
    sums = new_query_sums(entries).normal_()
    dlogits = weight = None
    if with_weight:
        dlogits = torch.randn(batch, length, heads, 3, device="cuda")
        weight = torch.randn(heads, 3, head_dim, **kind)
    expected = kernel_calls.gradient_of_sums(sums, dq.view(entries.shape), dlogits, weight, scale)
    out = torch.full((batch, length, heads + 2, head_dim), torch.nan, **kind)[:, :, 1:-1]
    others = OtherGradients(sums, dlogits, weight, out)
    actual, *_ = kernel_calls.selected_backward(*arguments, True, others=others)
    assert actual.data_ptr() == out.data_ptr()
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    # Only the expected gradient is of a rounded one of the branch.
    assert error < (4e-3 if dtype is torch.bfloat16 else 5e-4)
