"""Index tensors of compressed blocks, as PyTorch computes them where no kernel makes tables."""

import torch
from torch import Tensor

from nsa.blocks import covered_tokens
from nsa.fused.kernel_inputs import MOST_FEW_KEYS, FewKeys
from nsa.fused.row_layouts import over_batch
from nsa.geometry import Geometry


def queries_of_few_keys(geometry: Geometry, batch: int) -> FewKeys:
    """Queries that see a few compressed keys, and these keys."""
    config, queries, compressed = geometry.config, geometry.queries, geometry.compressed
    rows, visibility = queries.rows, config.compressed_visibility
    stride = config.compress_stride
    segment = torch.arange(rows.num_sequences, device=rows.device)[:, None]
    owner = queries.sequence_of(segment)
    # Positions from which queries see two keys, as long as they may see no more than a few.
    lead = covered_tokens(config, visibility) - 1 + stride
    position = torch.arange(lead, lead + (MOST_FEW_KEYS - 1) * stride, device=rows.device)
    local = position - queries.first_of(segment)
    count = geometry.num_visible(position, owner, visibility)
    real = (local >= 0) & (local < rows.count[segment]) & (count > 1)
    query = torch.where(real, rows.offset[segment] + local, -1)
    # A sequence without blocks may start behind the last row of k.
    first = torch.where(real, compressed.offset[owner], 0)
    return FewKeys(
        query=over_batch(query.flatten(), batch, rows.total),
        first=over_batch(first.flatten(), batch, compressed.total),
        keys=count.clamp(min=1).expand_as(query).flatten().repeat(batch).int(),
    )


def starts_of_blocks(geometry: Geometry) -> Tensor:
    """The first token of each compressed block, -1 for blocks of no sequence, int32."""
    keys, compressed = geometry.keys, geometry.compressed
    stride = geometry.config.compress_stride
    if compressed.single:
        end, device = compressed.total * stride, geometry.device
        return torch.arange(0, end, stride, dtype=torch.int32, device=device)
    start = keys.offset[compressed.owner] + compressed.local * stride
    return torch.where(compressed.real, start, -1).int()


def blocks_of_tokens(geometry: Geometry) -> Tensor:
    """The compressed blocks that each token is in, -1 for none, int32 ``(Tk, l / d)``."""
    config, keys, compressed = geometry.config, geometry.keys, geometry.compressed
    # The last block that starts at or before the token, and the blocks before it.
    overlap = config.compress_block_size // config.compress_stride
    earlier = torch.arange(overlap, device=geometry.device)
    owner = keys.owner[:, None]
    local = keys.local[:, None] // config.compress_stride - earlier
    inside = (local >= 0) & (local < compressed.count[owner])
    return torch.where(inside, compressed.offset[owner] + local, -1).int()
