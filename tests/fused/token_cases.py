"""How selections of token mode are held against each other: other blocks only for equal scores."""

import torch
from torch import Tensor

from nsa.blocks import Geometry
from nsa.config import NSAConfig
from nsa.reference import selection


def assert_same_selection(
    actual: Tensor,
    expected: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    cu_seqlens: Tensor | None,
    config: NSAConfig,
    atol: float,
) -> None:
    """Assert that rows of ``actual`` name as many blocks as ``expected``, of the same scores.

    Scores are the reference's, for ``q`` and ``k_cmp`` in float64. Shapes are those of
    :func:`nsa.forward`, batched or packed.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.int32
    if torch.equal(actual, expected):
        return
    geometry = Geometry.of(q, cu_seqlens, config)
    if cu_seqlens is None:
        q, k_cmp, actual, expected = (x.flatten(0, 1) for x in (q, k_cmp, actual, expected))
    used = actual >= 0
    assert torch.equal(used, expected >= 0)
    assert (actual.diff(dim=-1) > 0)[used[..., 1:]].all(), "blocks do not ascend"
    offset = geometry.selection.offset[geometry.tokens.owner]
    chunks = selection._token_block_scores(q.double(), k_cmp.double(), geometry)
    for start, stop, scores, low in chunks:
        totals = []
        for taken in (actual, expected):
            taken = taken[start:stop].transpose(0, 1).long()  # (H_kv, C, n)
            at = (taken + offset[start:stop, None] - low).clamp(min=0)
            best = scores.gather(-1, at).masked_fill(taken < 0, 0)
            totals.append(best.sort(-1).values)
        torch.testing.assert_close(*totals, rtol=0, atol=atol)
