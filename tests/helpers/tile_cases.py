"""How selections of tile mode are held against each other: others only for equal scores."""

from torch import Tensor

from nsa.blocks import Geometry, Segments
from nsa.reference import selection
from tests.helpers.token_cases import assert_same_scores


def assert_same_blocks(
    actual: Tensor, expected: Tensor, q: Tensor, k_cmp: Tensor, geometry: Geometry, atol: float
) -> None:
    """Assert that tiles of ``actual`` take as many blocks as ``expected``, of the same scores.

    Scores are the reference's in float64, for flattened ``q (T, H, D)`` and
    ``k_cmp (M, H_kv, D)``. Blocks are ``(tiles, H, n)``.
    """
    config = geometry.config
    size = config.select_block_size // config.compress_block_size
    _assert_same(actual, expected, q, k_cmp, geometry.selection, size, geometry, atol)


def assert_same_groups(
    actual: Tensor, expected: Tensor, q: Tensor, k_cmp: Tensor, geometry: Geometry, atol: float
) -> None:
    """The same of groups of the sparse compressed branch, ``(tiles, H, m)``."""
    size = geometry.config.cmp_group_size
    _assert_same(actual, expected, q, k_cmp, geometry.groups, size, geometry, atol)


def _assert_same(
    actual: Tensor,
    expected: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    blocks: Segments,
    size: int,
    geometry: Geometry,
    atol: float,
) -> None:
    offset = blocks.offset[geometry.tiles.owner]
    wide = q.double(), k_cmp.double()
    chunks = selection._tile_block_scores(*wide, blocks, size, geometry)
    assert_same_scores(actual, expected, chunks, offset, atol)
