"""Two calls that share keys and write where they are told, as a rank's do."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import num_compressed_blocks
from nsa.config import NSAConfig
from nsa.fused import entry, key_sums
from nsa.results import Results


class Leaves(NamedTuple):
    """``(1, T, H, D)`` of queries, keys and values, and compressed ones of these."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor


def attend(leaves: Leaves, config: NSAConfig, **options) -> Tensor:
    """The fused backend, with one copy of keys and values for all branches."""
    q, k, v, *compressed = leaves
    return entry.forward(
        q, (k, k, k), (v, v, v), config=config, compressed_kv=tuple(compressed), **options
    )


def attend_in_two(
    leaves: Leaves,
    dout: Tensor,
    first: int,
    config: NSAConfig,
    block_indices: Tensor | None = None,
    **options,
) -> tuple[list[Tensor], list[bool]]:
    """Output and gradients of two calls, of which the second begins at query ``first``.

    Args:
        block_indices: of all queries; selected by default.

    Returns:
        They, without the dimension of the batch; and for each call whether it added to the sums.
    """
    (_, length, heads, dim), kv_heads = leaves.q.shape, leaves.k.shape[2]
    # Slices of heads, as of a rank that computes some at a time.
    memory = leaves.q.new_full((2, length, heads + 2, dim), torch.nan)
    out, dq = memory[:, :, 1:-1]
    keys, runs = (leaves.k[0], leaves.v[0]), (first, length - first)
    sums = key_sums.make_key_sums(*keys, runs, config, deterministic=False)
    assert sums is not None
    late = [leaves.k.new_zeros(length, kv_heads, dim) for _ in range(2)]
    compressed = [torch.zeros_like(x[0]) for x in leaves[3:]]
    added = []
    for rows in (slice(0, first), slice(first, length)):
        blocks = num_compressed_blocks(rows.stop, config)
        q, (k, v) = leaves.q[:, rows], (x[:, : rows.stop] for x in leaves[1:3])
        part = Leaves(q, k, v, *(x[:, :blocks] for x in leaves[3:]))
        results = Results(out=out[rows])
        if block_indices is not None:
            options["block_indices"] = _of_rows(block_indices, rows, config)
        found = attend(part, config, results=results, **options)
        assert found.data_ptr() == out[rows].data_ptr()
        results.dq = dq[rows]
        results.keys = sums.of_call(slice(0, rows.stop))
        grads = torch.autograd.grad(found, leaves, dout[:, rows], allow_unused=True)
        added.append(grads[1] is None and grads[2] is None)
        for total, grad in zip((*late, *compressed), grads[1:], strict=True):
            if grad is not None:
                total += grad[0]
        assert torch.equal(grads[0][0, rows], dq[rows])
    for which, total in enumerate(late):
        rounded = torch.empty_like(total)
        for rows in (slice(0, first), slice(first, length)):
            sums.round_into(which, rows, rounded[rows])
        total += rounded
        for start, grad in sums.windows(which):
            total[start : start + len(grad)] += grad
    assert memory[:, :, [0, -1]].isnan().all()
    return [out, dq, *late, *compressed], added


def _of_rows(block_indices: Tensor, rows: slice, config: NSAConfig) -> Tensor:
    """The indices of some queries."""
    if config.selection == "token":
        return block_indices[:, rows]
    return block_indices[
        :, :, rows.start // config.q_tile_size : -(-rows.stop // config.q_tile_size)
    ]
