"""What the entry of the fused backend copies, and that slices give what copies of them give."""

import pytest
import torch

import nsa
from nsa.fused.entry import kernel_rows
from nsa.testing import make_cu_seqlens
from tests.helpers.gpu_cases import gpu_test
from tests.helpers.slices import SLICES, forward_and_backward

CONFIGS = {
    "token": nsa.NSAConfig.paper(num_selected_blocks=4, window_size=100),
    "tile": nsa.NSAConfig(q_tile_size=128, window_size=100),
}


@pytest.mark.parametrize("form", SLICES)
def test_slices_are_read_in_place(form):
    x = SLICES[form](torch.randn(1, 80, 6, 16))
    rows = kernel_rows(x, 16)
    assert rows.data_ptr() == x.data_ptr()
    assert rows.stride() == x.stride()
    packed = kernel_rows(x[0], 16)
    assert packed.data_ptr() == x.data_ptr()
    assert packed.shape == x.shape


def test_what_kernels_cannot_read_is_copied():
    x = torch.randn(2, 80, 6, 16)
    heads, tokens = x[:, :, 1:3], x[:, 5:70]
    assert kernel_rows(heads, 16).data_ptr() == heads.data_ptr()
    # Entries that do not follow each other, rows that are not dense, or not aligned.
    unaligned = torch.randn(80 * 97 + 1)[1:].as_strided((1, 80, 6, 16), (0, 97, 16, 1))
    for given in (tokens, x.transpose(1, 2), x[..., ::2], x[..., :8], unaligned):
        rows = kernel_rows(given, given.shape[-1])
        assert rows.is_contiguous()
        assert torch.equal(rows, given)
        assert rows.data_ptr() != given.data_ptr()
    assert kernel_rows(heads, 32).shape == (2, 80, 2, 32)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("mode", CONFIGS)
@pytest.mark.parametrize("form", SLICES)
def test_slices_give_what_copies_give(form, mode, packed):
    bounds = make_cu_seqlens([150, 0, 106]) if packed else None
    found, wanted = forward_and_backward(form, CONFIGS[mode], bounds, torch.float64, "cpu")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("gating", ["none", "gates", "gate_proj_weight"])
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("mode", CONFIGS)
def test_outputs_are_contiguous(mode, backend, gating):
    """Callers view (..., H, Dv) as (..., H * Dv), also where kernels have more channels."""
    q, k, v = torch.randn(2, 70, 4, 24), torch.randn(2, 70, 2, 24), torch.randn(2, 70, 2, 16)
    gates = {}
    if gating == "gates":
        gates = dict(gates=torch.rand(2, 4, 3, 70).permute(0, 3, 1, 2))
    if gating == "gate_proj_weight":
        gates = dict(gate_proj_weight=torch.randn(4, 3, 24))
    out = nsa.forward(q, k, v, config=CONFIGS[mode], backend=backend, **gates)
    assert out.view(2, 70, 64).is_contiguous()
    blocks = torch.zeros(2, 70, 2, 1, dtype=torch.int32)
    out, _ = nsa.selected_attention(q, k, v, blocks, backend=backend)
    assert out.view(2, 70, 64).is_contiguous()


class TestOnGpu:
    pytestmark = gpu_test

    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
    @pytest.mark.parametrize("mode", CONFIGS)
    def test_slices_give_what_copies_give(self, mode, packed):
        bounds = make_cu_seqlens([150, 0, 106], "cuda") if packed else None
        call = (CONFIGS[mode], bounds, torch.bfloat16, "cuda")
        for form in SLICES:
            (out, *grads), (wanted, *wanted_grads) = forward_and_backward(form, *call)
            assert torch.equal(out, wanted)
            # Sums of gradients are in no fixed order.
            for found, grad in zip(grads, wanted_grads, strict=True):
                torch.testing.assert_close(found, grad, rtol=0.02, atol=2e-3)
