"""Every backward kernel is told whether to give the same bits each time."""

import pytest
import torch

import nsa
from nsa.fused import fa4, kernel_calls
from nsa.testing import make_cu_seqlens
from tests.helpers.small_configs import tile_config, token_config

LENGTHS = [70, 0, 1, 130]
CONFIGS = {
    "tile": tile_config(),
    "tile, wide blocks": tile_config(select_block_size=128, q_tile_size=128),
    "sparse": tile_config(num_cmp_selected_blocks=1, cmp_group_size=128, compress_block_size=1),
    "token": token_config(),
    "non-causal": tile_config(causal=False),
}


@pytest.fixture
def told(fused_on_cpu, monkeypatch):
    """(name, ``deterministic``) of each call."""
    calls = []

    def record(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            calls.append((name, kwargs.get("deterministic", False)))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("selected_backward", "listed_backward"):
        record(kernel_calls, name)
    for name in ("dense_backward", "sparse_backward"):
        record(fa4, name)
    return calls


def gradients(config, packed: bool, **options):
    generator = torch.Generator().manual_seed(0)
    leading = (sum(LENGTHS),) if packed else (2, 130)
    q, k, v = (
        torch.randn(*leading, heads, 64, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    bounds = dict(cu_seqlens=make_cu_seqlens(LENGTHS)) if packed else {}
    out = nsa.forward(*leaves, config=config, backend="fused", **bounds, **options)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kernel_is_told(name, packed, told):
    expected = gradients(CONFIGS[name], packed)
    assert told
    assert not any(deterministic for _, deterministic in told)
    for options in ({}, dict(max_workspace_bytes=1)):
        told.clear()
        actual = gradients(CONFIGS[name], packed, deterministic=True, **options)
        assert told
        assert all(deterministic for _, deterministic in told)
        assert "sparse_backward" not in dict(told), "FA4 has no fixed order for lists"
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_none_is_what_pytorch_is_set_to(told, monkeypatch):
    for enabled, given in ((True, None), (True, False), (False, None), (False, True)):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda x=enabled: x)
        told.clear()
        gradients(CONFIGS["token"], False, deterministic=given)
        assert {x for _, x in told} == {enabled if given is None else given}


def test_the_setting_of_the_forward_holds(told):
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = (torch.randn(1, 70, 2, 64).requires_grad_() for _ in range(3))
        out = nsa.forward(q, k, v, config=CONFIGS["tile"], backend="fused")
    finally:
        torch.use_deterministic_algorithms(False)
    out.sum().backward()
    assert all(deterministic for _, deterministic in told)


def test_the_selected_branch_is_told(told):
    q, k, v = (torch.randn(1, 70, 2, 64).requires_grad_() for _ in range(3))
    blocks = torch.zeros(1, 70, 2, 1, dtype=torch.int32)
    for deterministic in (False, True):
        told.clear()
        out, _ = nsa.selected_attention(
            q, k, v, blocks, deterministic=deterministic, backend="fused"
        )
        out.sum().backward()
        assert told == [("selected_backward", deterministic)]


def test_wide_heads_in_tile_mode_have_no_fixed_order(told):
    q, k, v = (torch.randn(1, 70, 1, 160).requires_grad_() for _ in range(3))
    with pytest.raises(nsa.UnsupportedError, match=r"at most 128 for deterministic .* got 160"):
        nsa.forward(q, k, v, config=CONFIGS["tile"], deterministic=True, backend="fused")
    with torch.no_grad():
        nsa.forward(q, k, v, config=CONFIGS["tile"], deterministic=True, backend="fused")
    reason = nsa.explain_backend(q, k, v, config=CONFIGS["tile"], deterministic=True)
    assert reason.startswith("backend: reference (fused cannot do this: it needs D")
    assert nsa.explain_backend(q, k, v, config=token_config(), deterministic=True).startswith(
        "backend: fused"
    )


@pytest.mark.parametrize("value", [1, "yes"])
def test_other_values_are_refused(value):
    q = torch.randn(1, 70, 1, 16)
    with pytest.raises(TypeError, match=f"deterministic must be a bool or None, got {value!r}"):
        nsa.forward(q, q, q, deterministic=value)
    with pytest.raises(TypeError, match="deterministic must be a bool or None"):
        nsa.selected_attention(q, q, q, torch.zeros(1, 70, 1, 1).int(), deterministic=value)
