"""Near blocks: a token's own block and the one before, which token mode usually selects.

They lie in the window. If both branches have the same keys, values and ``dout``, the backward of
the window attends them for the selected branch too: it then has the sum of both probabilities,
which takes other row statistics and no other product.
"""

from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.fa4_call import LARGEST_TILE, rounded_up
from nsa.fused.hardware import WGMMA_ROWS
from nsa.fused.kernel_inputs import KINDS_OF_KEYS, RowStatistics
from nsa.fused.sizes import Sizes


def fits_near_blocks(config: NSAConfig, head_dim: int, *, packed: bool) -> bool:
    """Whether the window's backward can attend near blocks, as far as lengths do not matter.

    The window has all their keys, and 64 keys of a warp group lie within one block.
    """
    if config.selection != "token" or config.num_local_blocks == 0 or packed or head_dim > 128:
        return False
    size = config.select_block_size
    return size % WGMMA_ROWS == 0 and 2 * size <= config.window_size


def join_near_blocks(
    window: RowStatistics,
    selected: RowStatistics,
    block_indices: Tensor,
    *,
    first: int,
    block_size: int,
) -> tuple[RowStatistics, Tensor]:
    """The statistics of the window's backward, and the blocks left for that of the selected branch.

    Args:
        window, selected: the statistics of each branch by itself.
        block_indices: ``(B, T, H_kv, n)``.
        first: the position of the first token of each entry.
        block_size: keys of a block.
    """
    batch = block_indices.shape[0]
    statistics, others = kernel_calls.join_near_blocks(
        window, selected, block_indices.flatten(0, 1), batch, first, block_size
    )
    return statistics, others.view(block_indices.shape)


def near_block_bytes(sizes: Sizes) -> int:
    """Bytes that :func:`join_near_blocks` allocates, at most."""
    if not fits_near_blocks(sizes.config, sizes.head_dim, packed=sizes.packed):
        return 0
    rows = sizes.batch * rounded_up(sizes.length, LARGEST_TILE) * sizes.num_heads
    return sizes.indices + 2 * KINDS_OF_KEYS * 4 * rows
