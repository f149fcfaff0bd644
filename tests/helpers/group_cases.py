"""Groups of the sparse compressed branch: comparison of the fused backend with the reference."""

from torch import Tensor

import nsa
from nsa.geometry import Geometry
from nsa.reference.selection import select_groups
from tests.helpers.gpu_cases import Case, Variant, default_case, fused_groups, make_tensors
from tests.helpers.selections import assert_same_tile_groups

GROUP_FORMS = [
    # l, cmp_group_size, num_cmp_selected_blocks
    (32, 64, 2),
    (32, 128, 1),
    (16, 64, 3),
]


def group_case(
    block: int, group_size: int, count: int, packed: bool, tile_summary: str = "first"
) -> Case:
    """Sequences with more groups than are selected; if packed, shorter ones too."""
    config = nsa.NSAConfig(
        compress_block_size=block,
        select_block_size=64,
        num_cmp_selected_blocks=count,
        cmp_group_size=group_size,
        tile_summary=tile_summary,
    )
    variant = default_case().variant
    return default_case(
        variant=Variant(variant.head_dim, variant.value_dim, 2, variant.dtype, block),
        lengths=(9000, 1, 0, 2100, 700) if packed else (9000,),
        packed=packed,
        compressor="given",
        config=config,
    )


def reference_groups(arguments: dict, config: nsa.NSAConfig) -> tuple[Tensor, Geometry]:
    """The groups of the reference for given compressed keys, ``(tiles, H, m)``; its geometry."""
    geometry = Geometry.of(arguments["q"], arguments["k"], config, arguments.get("cu_seqlens"))
    return select_groups(*_scored(arguments), geometry), geometry


def check_groups(case: Case, device: str) -> None:
    """Compare the groups of the fused backend with those of the reference.

    Both score the same compressed keys, so scores differ only by float32 rounding.
    """
    arguments = make_tensors(case, device)
    expected, geometry = reference_groups(arguments, case.config)
    assert max(geometry.groups.counts) > case.config.num_cmp_selected_blocks, "nothing to choose"
    actual = fused_groups(arguments, case.config)
    assert_same_tile_groups(actual, expected, *_scored(arguments), geometry, atol=1e-5)


def _scored(arguments: dict) -> tuple[Tensor, Tensor]:
    """Queries and given compressed keys, ``(T, H, D)`` and ``(M, H_kv, D)``."""
    tensors = (arguments["q"].detach(), arguments["compressed_kv"][0].detach())
    return tuple(x.flatten(0, 1) if x.ndim == 4 else x for x in tensors)
