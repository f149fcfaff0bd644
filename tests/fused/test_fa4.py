"""How FlashAttention-4 is called, with its functions replaced: no GPU, no FlashAttention-4."""

import types

import pytest
import torch

from nsa.fused import fa4


@pytest.fixture
def calls(monkeypatch):
    """What FA4's functions were called with."""
    noted = []

    def forward(**arguments):
        noted.append(arguments)
        return arguments["q"], None, None

    def backward(**arguments):
        noted.append(arguments)
        return arguments["q"], arguments["k"], arguments["v"]

    interface = types.SimpleNamespace(
        _flash_attn_fwd=forward, _flash_attn_bwd=backward, _get_device_arch=lambda: 90
    )
    monkeypatch.setattr(fa4, "_interface", lambda: interface)
    return noted


@pytest.mark.parametrize(("longest", "bound"), [(1, 257), (64, 257), (257, 257), (5000, 5000)])
def test_no_bound_of_packed_sequences_is_of_one_tile(calls, longest, bound):
    q, k = torch.randn(10, 4, 64), torch.randn(10, 2, 64)
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    arguments = dict(
        scale=1.0,
        causal=True,
        window_size=(None, None),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    fa4.dense_forward(q, k, k, **arguments)
    fa4.dense_backward(q, q, k, k, q, torch.randn(4, 10), **arguments)
    for call in calls:
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (bound, bound)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("group", "dim", "window", "tile"),
    [
        (1, 128, (None, None), None),
        (4, 64, (511, None), None),
        (4, 128, (511, None), (192, 80)),
        (5, 128, (511, None), None),
        (4, 128, (None, None), (128, 160)),
        (64, 128, (None, None), (128, 160)),
    ],
)
def test_tiles(calls, group, dim, window, tile):
    q, k = torch.empty(1, 2, group, dim), torch.empty(1, 2, 1, dim)
    assert fa4._dense_forward_tile(q, k, window) == tile
