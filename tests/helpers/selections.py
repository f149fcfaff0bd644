"""Comparisons of selections, which may name different blocks only if scores are equal."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsa.config import NSAConfig
from nsa.geometry import Geometry
from nsa.reference import selection
from nsa.segments import Segments


def assert_same_token_blocks(
    actual: Tensor,
    expected: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    cu_seqlens: Tensor | None,
    config: NSAConfig,
    atol: float,
) -> None:
    """Assert that rows of ``actual`` have as many blocks as ``expected``, with the same scores.

    Scores are the reference's, for ``q`` and ``k_cmp`` in float64. Shapes are those of
    :func:`nsa.forward`, batched or packed.
    """
    assert actual.shape == expected.shape
    geometry = Geometry.of(q, q, config, cu_seqlens)
    if cu_seqlens is None:
        q, k_cmp, actual, expected = (x.flatten(0, 1) for x in (q, k_cmp, actual, expected))
    offset = geometry.selection.offset[geometry.queries.owner]
    chunks = selection._token_block_scores(q.double(), k_cmp.double(), geometry)
    assert_same_scores(actual, expected, chunks, offset, atol)


def assert_same_tile_blocks(
    actual: Tensor, expected: Tensor, q: Tensor, k_cmp: Tensor, geometry: Geometry, atol: float
) -> None:
    """Assert that tiles of ``actual`` have as many blocks as ``expected``, with the same scores.

    Scores are the reference's in float64, for flattened ``q (T, H, D)`` and
    ``k_cmp (M, H_kv, D)``. Blocks are ``(tiles, H, n)``.
    """
    config = geometry.config
    size = config.select_block_size // config.compress_block_size
    _assert_same_of_tiles(actual, expected, q, k_cmp, geometry.selection, size, geometry, atol)


def assert_same_tile_groups(
    actual: Tensor, expected: Tensor, q: Tensor, k_cmp: Tensor, geometry: Geometry, atol: float
) -> None:
    """The same for groups of the sparse compressed branch, ``(tiles, H, m)``."""
    size = geometry.config.cmp_group_size
    _assert_same_of_tiles(actual, expected, q, k_cmp, geometry.groups, size, geometry, atol)


def _assert_same_of_tiles(
    actual: Tensor,
    expected: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    blocks: Segments,
    size: int,
    geometry: Geometry,
    atol: float,
) -> None:
    offset = blocks.offset[geometry.tile_owner]
    wide = q.double(), k_cmp.double()
    chunks = selection._tile_block_scores(*wide, blocks, size, geometry)
    assert_same_scores(actual, expected, chunks, offset, atol)


def assert_same_scores(
    actual: Tensor,
    expected: Tensor,
    chunks: Iterable[tuple[int, int, Tensor, int]],
    offset: Tensor,
    atol: float,
) -> None:
    """Assert that rows of ``actual`` have as many blocks as ``expected``, with the same scores.

    Args:
        actual: int32 ``(units, heads, n)``, ascending, -1 in empty slots at the end.
        expected: likewise; its ``n`` may differ, because slots may be empty.
        chunks: scores of each unit and block, as the reference's selection yields them.
        offset: the flat index of the first block of each unit's sequence, ``(units,)``.
        atol: the most that rounding changes a score.
    """
    width = max(actual.shape[-1], expected.shape[-1])
    actual, expected = (pad(x, (0, width - x.shape[-1]), value=-1) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.int32
    if torch.equal(actual, expected):
        return
    used = actual >= 0
    assert torch.equal(used, expected >= 0)
    assert (actual.diff(dim=-1) > 0)[used[..., 1:]].all(), "blocks do not ascend"
    for start, stop, scores, low in chunks:
        totals = []
        for taken in (actual, expected):
            taken = taken[start:stop].transpose(0, 1).long()  # (heads, C, n)
            at = (taken + offset[start:stop, None] - low).clamp(min=0)
            best = scores.gather(-1, at).masked_fill(taken < 0, 0)
            totals.append(best.sort(-1).values)
        torch.testing.assert_close(*totals, rtol=0, atol=atol)
