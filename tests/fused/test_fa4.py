"""How FlashAttention-4 is called: no GPU, no FlashAttention-4."""

import types

import pytest
import torch

from nsa.fused import fa4


@pytest.fixture(autouse=True)
def on_sm90(monkeypatch):
    interface = types.SimpleNamespace(_get_device_arch=lambda: 90)
    monkeypatch.setattr(fa4, "_interface", lambda: interface)


@pytest.mark.parametrize(
    ("longest", "bound"), [(1, 512), (64, 512), (512, 512), (513, 1024), (5000, 8192)]
)
def test_bounds_of_packed_sequences_are_few_and_none_is_of_one_tile(longest, bound):
    expected = dict(max_seqlen_q=bound, max_seqlen_k=2048)
    assert fa4._bounds(torch.tensor([0, 10]), longest, 1500) == expected
    assert fa4._bounds(None, None, None) == {}


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
def test_tiles(group, dim, window, tile):
    q, k = torch.empty(1, 2, group, dim), torch.empty(1, 2, 1, dim)
    assert fa4._dense_forward_tile(q, k, window, None) == tile


@pytest.mark.parametrize(("group", "tile"), [(4, (192, 80)), (5, None)])
def test_tiles_of_keys_with_times(group, tile):
    q, k = torch.empty(1, 2, group, 128), torch.empty(1, 2, 1, 128)
    assert fa4._dense_forward_tile(q, k, (None, None), (64, 63)) == tile


@pytest.mark.parametrize("other", [dict(causal=True), dict(window_size=(3, None))])
def test_keys_with_times_have_no_other_mask(other):
    q, k = torch.empty(1, 2, 4, 128), torch.empty(1, 2, 1, 128)
    mask = dict(causal=False, window_size=(None, None)) | other
    with pytest.raises(ValueError, match="key_times excludes"):
        fa4.dense_forward(q, k, k, scale=1.0, key_times=(64, 63), **mask)
