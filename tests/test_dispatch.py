"""The choice of backend: explicit requests, auto, and what is said about it."""

import logging
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import nsa
from nsa import backends
from nsa.testing import make_inputs

CONFIG = nsa.NSAConfig(num_selected_blocks=2)


@pytest.fixture
def inputs():
    # Only the device keeps the fused backend from these.
    return make_inputs((1, 200), 4, 2, 64, dtype=torch.bfloat16)


@pytest.fixture
def fresh_log():
    """Reasons are logged once a process: forget what other tests logged."""
    backends._log_once.cache_clear()
    yield
    backends._log_once.cache_clear()


def test_auto_is_the_reference_on_cpu(inputs):
    auto = nsa.forward(*inputs, config=CONFIG)
    assert torch.equal(auto, nsa.forward(*inputs, config=CONFIG, backend="reference"))
    q, k, _ = inputs
    auto = nsa.select_blocks(q, k, config=CONFIG)
    assert torch.equal(auto, nsa.select_blocks(q, k, config=CONFIG, backend="reference"))


def test_fused_on_cpu_says_why_not_and_what_to_do(inputs):
    pattern = r"backend='fused'.*CUDA device, got cpu; .*backend='reference'"
    with pytest.raises(nsa.UnsupportedError, match=pattern):
        nsa.forward(*inputs, config=CONFIG, backend="fused")
    with pytest.raises(nsa.UnsupportedError, match=pattern):
        nsa.select_blocks(*inputs[:2], config=CONFIG, backend="fused")
    assert issubclass(nsa.UnsupportedError, NotImplementedError)


# What no device could change, so told without one.
LIMITS = {
    "odd block of a token": (
        nsa.NSAConfig.paper(select_block_size=128),
        {},
        r"select_block_size of \(32, 64\) with selection='token', got 128",
    ),
    "many blocks of a token": (
        nsa.NSAConfig.paper(num_selected_blocks=65),
        {},
        "num_selected_blocks of at most 64 with selection='token', got 65",
    ),
    "long compressed blocks of a token": (
        nsa.NSAConfig.paper(compress_block_size=2048),
        {},
        "compress_block_size of at most 65 strides with selection='token', got 128",
    ),
    "odd tile": (nsa.NSAConfig(q_tile_size=100), {}, "q_tile_size .*64, got 100"),
    "odd block": (
        nsa.NSAConfig(compress_block_size=32),
        {},
        "select_block_size .*64, got 32",
    ),
    "odd group": (
        nsa.NSAConfig(num_cmp_selected_blocks=1, cmp_group_size=32),
        {},
        "cmp_group_size .*64, got 32",
    ),
    "float32": (nsa.NSAConfig(), {"dtype": torch.float32}, "float16 or bfloat16, got .*float32"),
    "wide heads": (nsa.NSAConfig(), {"head_dim": 264}, "256, got 264"),
    "wide values": (nsa.NSAConfig(), {"value_dim": 320}, "256, got 320"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_fused_names_the_limit(case):
    config, changes, limit = LIMITS[case]
    settings = {"dtype": torch.bfloat16, "head_dim": 64} | changes
    inputs = make_inputs((1, 10), 4, 2, **settings)
    with pytest.raises(nsa.UnsupportedError, match=rf"{limit}.*backend='reference'"):
        nsa.forward(*inputs, config=config, backend="fused")
    assert nsa.forward(*inputs, config=config).shape[:3] == (1, 10, 4)


def test_fused_names_the_limit_of_a_group():
    inputs = make_inputs((1, 10), 33, 1, dtype=torch.bfloat16, head_dim=64)
    with pytest.raises(nsa.UnsupportedError, match=r"at most 32 query heads .*'token', got 33"):
        nsa.forward(*inputs, config=nsa.NSAConfig.paper(), backend="fused")


@pytest.mark.parametrize("fake", [False, True])
def test_the_reference_needs_values(inputs, fake):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        q, k, v = (x + 0 if fake else x.to("meta") for x in inputs)
        blocks = torch.empty(1, 200, 2, 1, dtype=torch.int32, device=q.device)
        for call in (
            lambda: nsa.forward(q, k, v, backend="reference"),
            lambda: nsa.select_blocks(q, k),
            lambda: nsa.selected_attention(q, k, v, blocks),
        ):
            with pytest.raises(nsa.UnsupportedError, match="which meta and fake tensors do not"):
                call()


def test_the_reference_cannot_be_exported():
    layer = nsa.NativeSparseAttention(32, 4, 2, CONFIG)
    with pytest.raises(nsa.UnsupportedError, match="which meta and fake tensors do not"):
        torch.export.export(layer, (torch.randn(1, 200, 32),), strict=False)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_transforms_of_functions_are_refused(inputs, backend):
    def total(q):
        return nsa.forward(q, *inputs[1:], config=CONFIG, backend=backend).sum()

    q = inputs[0]
    for transform in (
        lambda: torch.func.grad(total)(q),
        lambda: torch.func.vjp(total, q),
        lambda: torch.func.vmap(total)(q[None]),
    ):
        with pytest.raises(nsa.UnsupportedError, match=r"transforms of torch\.func"):
            transform()


def test_auto_logs_a_reason_once(inputs, fresh_log, caplog):
    caplog.set_level(logging.INFO, logger="nsa")
    for _ in range(3):
        nsa.forward(*inputs, config=CONFIG)
    (record,) = caplog.records
    assert record.name == "nsa"
    assert "reference" in record.getMessage()
    assert "got cpu" in record.getMessage()
    nsa.forward(*inputs, config=nsa.NSAConfig.paper(num_selected_blocks=65))
    assert len(caplog.records) == 2
    assert "got 65" in caplog.records[1].getMessage()


def test_an_explicit_reference_logs_nothing(inputs, fresh_log, caplog):
    caplog.set_level(logging.DEBUG, logger="nsa")
    nsa.forward(*inputs, config=CONFIG, backend="reference")
    assert not caplog.records


def test_explain_backend_names_backend_and_reason(inputs):
    said = nsa.explain_backend(*inputs, config=CONFIG)
    assert "reference" in said
    assert "got cpu" in said
    assert "reference" in nsa.explain_backend(*inputs, config=CONFIG, backend="reference")
    many = nsa.explain_backend(*inputs, config=nsa.NSAConfig.paper(num_selected_blocks=65))
    assert "got 65" in many


def test_explain_backend_takes_every_argument_of_forward(inputs):
    q, k, _ = inputs
    said = nsa.explain_backend(
        *inputs,
        config=CONFIG,
        gates=torch.zeros(1, 200, 4, 3, dtype=q.dtype),
        gate_proj_weight=torch.zeros(4, 3, 64, dtype=q.dtype),
        compress_k_weight=torch.zeros(2, 64, 64, dtype=q.dtype),
        compress_v_weight=torch.zeros(2, 64, 64, dtype=q.dtype),
        compressed_kv=None,
        block_indices=nsa.select_blocks(q, k, config=CONFIG),
        cu_seqlens=None,
        cu_seqlens_k=None,
        max_seqlen=None,
        max_seqlen_k=None,
        max_workspace_bytes=1 << 30,
        recompute_window=True,
        backend="auto",
    )
    assert said.startswith("backend: reference")


def test_a_supported_call_goes_to_the_fused_backend(inputs, monkeypatch):
    from nsa import fused
    from nsa.fused import constraints

    monkeypatch.setattr(constraints, "unsupported_reason", lambda q, v, config: None)
    monkeypatch.setattr(fused, "forward", lambda *args, **kwargs: "fused")
    monkeypatch.setattr(fused, "select_blocks", lambda *args, **kwargs: "fused")
    for backend in ("auto", "fused"):
        assert nsa.forward(*inputs, config=CONFIG, backend=backend) == "fused"
        assert nsa.select_blocks(*inputs[:2], config=CONFIG, backend=backend) == "fused"
    assert "fused" in nsa.explain_backend(*inputs, config=CONFIG)
    reference = nsa.forward(*inputs, config=CONFIG, backend="reference")
    assert isinstance(reference, torch.Tensor)
