"""On the GPU: the selected branch of token mode, with the band by itself and without, and added to
the other branches, against emulations."""

import pytest
import torch

from nsa.fused import kernel_calls
from nsa.fused import waves as wave_sizes
from nsa.testing import assert_as_accurate
from tests.helpers import emulated_token_kernels
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.token_cases import FORMS, SEGMENTS, form_id, make_selected_case

pytestmark = [*gpu_test, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("forced", [False, True], ids=["any blocks", "band"])
@pytest.mark.parametrize("waves", ["one wave", "a unit a wave"])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_selected_forward(form, segments, waves, forced, monkeypatch):
    if waves == "a unit a wave":
        monkeypatch.setattr(wave_sizes, "WORKSPACE_BYTES", 1)
    case = make_selected_case(form, forced=forced, segments=segments)
    actual = kernel_calls.selected_forward(*case[:3], *case.selected, forced)
    exact, same_dtype = (
        emulated_token_kernels.selected_forward(*x[:3], *x.selected, forced)
        for x in (case.exact(), case.to("cpu", form.dtype))
    )
    out, lse = (x.cpu() for x in actual)
    assert_as_accurate("out", out, same_dtype[0], exact[0])
    seen = exact[1] > -torch.inf
    assert not seen[-3:].any()
    assert (lse[~seen] == -torch.inf).all()
    assert not out[~seen].any()
    assert_as_accurate("lse", lse[seen], same_dtype[1][seen], exact[1][seen], atol=1e-4)


@pytest.mark.parametrize("keep", [False, True], ids=["the sum", "both"])
@pytest.mark.parametrize("gated", ["mean", "gates", "weight"])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_closing_forward(form, segments, gated, keep):
    case = make_selected_case(form, forced=True, segments=segments)
    tokens, heads, head_dim = case.q.shape
    new = dict(dtype=form.dtype, device="cuda")
    others = [torch.randn(tokens, heads, head_dim, **new) for _ in range(2)]
    gates = torch.rand(tokens, heads, 3, **new) if gated == "gates" else None
    weight = None
    if gated == "weight":
        weight = torch.randn(heads, 3, head_dim, **new) * head_dim**-0.5
    # A slice of heads among others, which stay as they are.
    wide = torch.full((tokens, 2 * heads, head_dim), torch.nan, **new)
    given = (*others, gates, weight)
    actual, o_slc, lse = kernel_calls.closing_forward(
        *case[:3], *case.selected, *given, wide[:, heads:], keep
    )
    assert wide[:, :heads].isnan().all()
    assert torch.equal(wide[:, heads:], actual)
    exact, same_dtype = (
        emulated_token_kernels.closing_forward(
            *x[:3], *x.selected, *(None if y is None else y.cpu().to(x.q.dtype) for y in given),
            None, True,
        )
        for x in (case.exact(), case.to("cpu", form.dtype))
    )  # fmt: skip
    assert_as_accurate("sum", actual.cpu(), same_dtype[0], exact[0])
    assert (o_slc is not None) == keep
    if keep:
        assert_as_accurate("o_slc", o_slc.cpu(), same_dtype[1], exact[1])
    seen = exact[2] > -torch.inf
    assert (lse.cpu()[~seen] == -torch.inf).all()
    assert_as_accurate("lse", lse.cpu()[seen], same_dtype[2][seen], exact[2][seen], atol=1e-4)
