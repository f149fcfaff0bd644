"""On the GPU: the selected branch of token mode, with the band by itself and without, against its
emulation."""

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
