"""Small caches, inputs for them, and calls of some tokens."""

import torch

import nsa
from nsa.testing import make_inputs

F64 = torch.float64
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


def make_cache(config, batch=2, length=96, separate=False, **options) -> nsa.Cache:
    sizes = config, batch, length, KV_HEADS, DIM, VALUE_DIM, separate
    return nsa.Cache(*sizes, **(dict(dtype=F64) | options))


def inputs(*leading: int, separate: bool = False):
    q, k, v = make_inputs(leading, HEADS, KV_HEADS, DIM, VALUE_DIM, dtype=F64)
    if separate:
        return q, (k, torch.randn_like(k), torch.randn_like(k)), (v, v + 1, torch.randn_like(v))
    return q, k, v


def cut(x, start, stop):
    return tuple(cut(part, start, stop) for part in x) if isinstance(x, tuple) else x[:, start:stop]


def feed(cache, tensors, start, stop):
    """The output of tokens start to stop."""
    return nsa.forward(*(cut(x, start, stop) for x in tensors), cache=cache, backend="reference")
