"""Results in memory of the caller: outputs, gradients of queries, and sums over calls."""

import pytest
import torch

import nsa
from nsa.fused import key_sums
from nsa.testing import make_inputs
from tests.helpers.pieces_of_results import Leaves, attend, attend_in_two
from tests.helpers.small_configs import tile_config, token_config

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


FIRST = 256


@pytest.mark.parametrize("config", [token_config(), tile_config()], ids=["token", "tile"])
@pytest.mark.parametrize("workspace", [None, 1], ids=["all heads", "a head at a time"])
def test_two_calls_give_what_one_gives(config, workspace):
    q, k, v = make_inputs((1, 512), 4, 2, 64, dtype=torch.float64)
    size, stride = config.compress_block_size, config.compress_stride
    compressed = (x.unfold(1, size, stride).mean(-1) for x in (k, v))
    leaves = Leaves(*(x.requires_grad_() for x in (q, k, v, *compressed)))
    dout = torch.randn_like(q)
    options = dict(max_workspace_bytes=workspace)
    out = attend(leaves, config, **options)
    expected = (out, *torch.autograd.grad(out, leaves, dout))
    found, added = attend_in_two(leaves, dout, FIRST, config, **options)
    # Some heads at a time have gradients of their own.
    assert added == [workspace is None] * 2
    for x, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(x, wanted[0].detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [token_config(), tile_config()], ids=["token", "tile"])
def test_blocks_may_be_given(config):
    q, k, v = make_inputs((1, 512), 4, 2, 64, dtype=torch.float64)
    size, stride = config.compress_block_size, config.compress_stride
    compressed = (x.unfold(1, size, stride).mean(-1) for x in (k, v))
    leaves = Leaves(*(x.requires_grad_() for x in (q, k, v, *compressed)))
    blocks = nsa.select_blocks(*leaves[:2], config=config, compressed_kv=leaves[3:])
    dout = torch.randn_like(q)
    selected, _ = attend_in_two(leaves, dout, FIRST, config)
    given, _ = attend_in_two(leaves, dout, FIRST, config, blocks)
    for x, wanted in zip(given, selected, strict=True):
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-10)


def test_what_kernels_cannot_add_to():
    k, v = torch.randn(2, 500, 2, 64).unbind()
    assert key_sums.make_key_sums(k, v, [256, 244], token_config(), deterministic=False)
    assert key_sums.make_key_sums(k[:320], v[:320], [256, 64], tile_config(), deterministic=False)
    for runs, config, deterministic in (
        ([256, 244], tile_config(), False),
        ([500], token_config(), True),
        ([256, 192], tile_config(select_block_size=128, q_tile_size=128), False),
    ):
        assert key_sums.make_key_sums(k, v, runs, config, deterministic=deterministic) is None
    narrow = (k[..., :16], v[..., :16])
    assert key_sums.make_key_sums(*narrow, [500], token_config(), deterministic=False) is None


@pytest.mark.parametrize("config", [token_config(), tile_config()], ids=["token", "tile"])
def test_each_gradient_of_a_window_is_added_once(config):
    """Some end with a run of keys and begin before it, or in it; one ends within a run."""
    k, v = torch.randn(2, 512, 2, 64, dtype=torch.float64).unbind()
    runs = (128, 256, 128)
    sums = key_sums.make_key_sums(k, v, runs, config, deterministic=False)
    assert sums is not None
    expected = torch.zeros(2, *k.shape, dtype=torch.float64)
    for end, length in ((128, 50), (256, 200), (512, 300), (512, 10)):
        call = sums.of_call(slice(0, end))
        grads = torch.randn(2, length, 2, 64, dtype=torch.float64)
        call.windows.append(tuple(grads))
        expected[:, end - length : end] += grads
    found = torch.full_like(expected, torch.nan)
    for which, total in enumerate(found):
        start = 0
        for count in runs:
            sums.round_into(which, slice(start, start + count), total[start : start + count])
            start += count
        for first, grad in sums.windows(which):
            total[first : first + len(grad)] += grad
    torch.testing.assert_close(found, expected)
