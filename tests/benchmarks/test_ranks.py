"""The model of several ranks on one GPU."""

import pytest
import torch

import nsa
from measuring.ranks import Link, Mark, one_rank, replay
from nsa.distributed import backend_calls, rank_layout
from tests.helpers.small_configs import SMALL


def test_transfers_run_beside_compute_one_after_another():
    link = Link(latency=1, rate=10)
    marks = [
        Mark(2, "issue", 0, 40),  # from 2 to 7
        Mark(1, "issue", 1, 10),  # from 7 to 9
        Mark(1, "wait", 0),  # at 4, until 7
        Mark(5, "wait", 1),  # at 12: it is there
        Mark(3, "end"),
    ]
    assert replay(marks, link) == (15, 12, 3, 7)
    free = Link(latency=0, rate=float("inf"))
    assert replay(marks, free) == (12, 12, 0, 0)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 4), (3, 4), (0, 2), (1, 2)])
@pytest.mark.parametrize("least", [0, backend_calls.MIN_TOKENS], ids=["a call a piece", "one call"])
def test_one_process_is_any_rank(monkeypatch, rank, ranks, least):
    monkeypatch.setattr(backend_calls, "MIN_TOKENS", least)
    monkeypatch.setattr(rank_layout, "_kept_layout", rank_layout.Layout)
    q, k, v = (torch.randn(1, 32, heads, 4, requires_grad=True) for heads in (4, 2, 2))
    with one_rank(rank, ranks) as group:
        out = nsa.distributed.forward(
            q, k, v, mesh=group, config=SMALL["token"], backend="reference"
        )
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.shape == q.shape
    assert all(x.isfinite().all() for x in (out, *grads))
