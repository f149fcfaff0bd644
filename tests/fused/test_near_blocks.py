"""The window's backward attends near blocks for token mode's selected branch."""

import pytest
import torch

import nsa
from nsa.fused import kernel_calls
from nsa.testing import make_inputs
from tests.helpers.small_configs import token_config

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

JOINED = {
    "whole": dict(),
    "two entries": dict(batch=2),
    "one local block": dict(num_local_blocks=1),
    "last queries": dict(queries=150, keys=342),
    "last queries, with keys before the first window": dict(queries=70, keys=390),
    "non-causal": dict(causal=False),
    "an odd group": dict(heads=(3, 1)),
    "fixed order": dict(deterministic=True),
}
APART = {
    "a window of less than two blocks": dict(window_size=127),
    "no local block": dict(num_local_blocks=0),
    "blocks of 32": dict(select_block_size=32),
    "queries within a block": dict(queries=150, keys=343),
    "gates that are given": dict(gates=True),
    "keys of its own": dict(separate=True),
    "wide heads": dict(head_dim=136),
}


@pytest.fixture
def joined(monkeypatch):
    """What was left out of each selected backward."""
    found, join = [], kernel_calls.join_near_blocks

    def noted(*arguments):
        statistics, others = join(*arguments)
        found.append(int((others == -2).sum()))
        return statistics, others

    monkeypatch.setattr(kernel_calls, "join_near_blocks", noted)
    return found


def check_gradients(
    lists=None, batch=1, queries=300, keys=None, heads=(4, 2), head_dim=4, gates=False,
    separate=False, deterministic=False, **config,
):  # fmt: skip
    """Those of the fused backend are the reference's."""
    config = token_config(**(dict(window_size=128, num_selected_blocks=5) | config))
    keys = queries if keys is None else keys
    q, k, v = make_inputs((batch, keys), *heads, head_dim, dtype=torch.float64)
    q = q[:, keys - queries :]
    named = {"gates": torch.rand(*q.shape[:3], 3).double()}
    if not gates:
        named = {"gate_proj_weight": torch.randn(heads[0], 3, head_dim).double()}
    indices = nsa.select_blocks(q, k, config=config, backend="reference")
    if lists is not None:
        indices = lists(indices)
    k, v = ((x, x.clone(), x.clone()) if separate else (x,) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, *k, *v, *named.values())]
    k, v = (x if separate else x[0] for x in (k, v))
    results = []
    for options in (dict(backend="reference"), dict(backend="fused")):
        if deterministic and options["backend"] == "fused":
            options["deterministic"] = True
        out = nsa.forward(q, k, v, config=config, block_indices=indices, **named, **options)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append(torch.autograd.grad(out, leaves, dout))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", JOINED)
def test_gradients_where_branches_are_joined(case, joined):
    check_gradients(**JOINED[case])
    assert len(joined) == 1
    assert joined[0] > 0


@pytest.mark.parametrize("case", APART)
def test_gradients_where_they_cannot_be(case, joined):
    check_gradients(**APART[case])
    assert not joined


def test_lists_of_the_caller_may_lack_them(joined):
    def without_some(indices):
        """No own block for a third of the tokens, no block before it for another."""
        own = torch.arange(indices.shape[1])[:, None, None] // 64
        third = torch.arange(indices.shape[1])[:, None, None] % 3
        lacks = ((third == 0) & (indices == own)) | ((third == 1) & (indices == own - 1))
        last = indices.max() + 1
        kept = torch.where(lacks | (indices < 0), last, indices).sort(-1).values
        return torch.where(kept == last, -1, kept)

    check_gradients(lists=without_some)
    assert joined[0] > 0


def test_large_scores_on_one_side_alone(joined):
    """Either branch has all its weight elsewhere, so that probabilities of the other underflow."""
    config = token_config(window_size=256, num_selected_blocks=3, scale=1.0)
    q, k, v = make_inputs((1, 512), 2, 1, 4, dtype=torch.float64)
    # Blocks 0 and 4 have large scores: the first is selected, the other in the window alone.
    q[..., 0], k[..., 0] = 1, 0
    k[:, :64, :, 0], k[:, 256:320, :, 0] = 300, 600
    leaves = [x.requires_grad_() for x in (q, k, v)]
    indices = torch.tensor([0, 6, 7]).int().expand(1, 512, 1, 3).clone()
    own = (torch.arange(512) // 64).int()[None, :, None]
    indices[..., 1], indices[..., 2] = own - 1, own
    indices = torch.where((indices[..., :1] >= indices[..., 1:]).any(-1, True), -1, indices)
    indices[..., 0] = torch.where(indices[..., 0] < 0, 0, indices[..., 0])
    results = []
    for backend in ("reference", "fused"):
        out = nsa.forward(q, k, v, config=config, block_indices=indices, backend=backend)
        results.append(torch.autograd.grad(out.sin().sum(), leaves))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert len(joined) == 1
