"""Calls with few packed sequences, in both modes and on both backends."""

import pytest
import torch

import nsa
from nsa.testing import make_inputs
from tests.helpers.small_configs import tile_config, token_config

F64 = torch.float64
LENGTHS, OTHER = [70, 0, 1, 130], [30, 101, 0, 70]
TOTAL = sum(LENGTHS)
CONFIGS = {"tile": tile_config(num_local_blocks=1), "token": token_config()}
both = pytest.mark.parametrize("backend", ["reference", "fused"])
modes = pytest.mark.parametrize("mode", CONFIGS)


def inputs(requires_grad=True):
    return make_inputs((TOTAL,), 4, 2, 8, dtype=F64, requires_grad=requires_grad)


def run(cu_seqlens, mode, backend, between=None, **extras):
    """The output and the gradients of q, k and v."""
    q, k, v = inputs()
    call = dict(config=CONFIGS[mode], backend=backend)
    out = nsa.forward(q, k, v, cu_seqlens=cu_seqlens, **call, **extras)
    if between is not None:
        between()
    return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
