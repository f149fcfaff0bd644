"""Configurations with small blocks, so that a few hundred tokens have blocks to choose from."""

import nsa

SMALL = {
    "token": nsa.NSAConfig.paper(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=8,
        num_selected_blocks=4,
        window_size=20,
    ),
    "tile": nsa.NSAConfig(
        compress_block_size=4,
        select_block_size=8,
        num_selected_blocks=3,
        num_local_blocks=1,
        window_size=20,
        q_tile_size=16,
    ),
    "sparse": nsa.NSAConfig(
        compress_block_size=2,
        select_block_size=4,
        num_selected_blocks=3,
        window_size=7,
        q_tile_size=8,
        num_cmp_selected_blocks=2,
        cmp_group_size=5,
    ),
}
"""By mode, of a few tokens a block: for the reference, which takes any size."""


def tile_config(**changes) -> nsa.NSAConfig:
    """Tile mode with the smallest blocks that the kernels support."""
    sizes = dict(
        compress_block_size=16, select_block_size=64, q_tile_size=64, num_selected_blocks=2,
        window_size=20,
    )  # fmt: skip
    return nsa.NSAConfig(**(sizes | changes))


def token_config(**changes) -> nsa.NSAConfig:
    """The paper's configuration, with few selected blocks and a short window."""
    return nsa.NSAConfig.paper(**(dict(num_selected_blocks=4, window_size=20) | changes))
