"""On a GPU the reference has the same bits each time only if PyTorch is told to."""

from types import SimpleNamespace

import pytest
import torch

import nsa
from nsa.reference.determinism import check_deterministic_device

GPU, CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)


def test_pytorch_must_be_told_on_a_gpu(monkeypatch):
    with pytest.raises(nsa.UnsupportedError, match=r"algorithms\(True\) with the"):
        check_deterministic_device(True, GPU)
    check_deterministic_device(False, GPU)
    check_deterministic_device(True, CPU)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_deterministic_device(True, GPU)


@pytest.mark.parametrize("config", [nsa.NSAConfig(), nsa.NSAConfig.paper()], ids=["tile", "token"])
def test_on_a_cpu_nothing_is_asked_for(config):
    q = torch.randn(1, 70, 2, 8)
    out = nsa.forward(q, q, q, config=config, deterministic=True, backend="reference")
    assert torch.equal(out, nsa.forward(q, q, q, config=config, backend="reference"))
