"""Checks of ``block_indices``, the caller's selection, before any kernel starts."""

import torch
from torch import Tensor

from nsa.blocks import most_query_tiles, num_query_tiles, num_selection_blocks
from nsa.boundaries import Boundaries
from nsa.host import has_readable_values
from nsa.validation import Problem


def check_block_indices(indices, boundaries: Boundaries | None, q: Tensor, problem: Problem):
    """Check the caller's selection: shape, int32, range, ascending with -1 at the end."""
    if indices is None:
        return
    check_index_tensor(indices, q)
    shape = _block_indices_shape(boundaries, problem)
    if tuple(indices.shape) != shape and not _has_unknown_tiles(indices, boundaries, problem):
        raise ValueError(
            f"block_indices must have shape {shape} with selection="
            f"{problem.config.selection!r}, got {tuple(indices.shape)}"
        )
    if indices.numel() and has_readable_values(indices):
        check_block_values(indices, *_block_counts(indices, boundaries, problem))


def check_listed_blocks(
    indices,
    boundaries: Boundaries | None,
    q: Tensor,
    problem: Problem,
    counts: tuple[Tensor, int] | None = None,
):
    """Check the blocks of the selected branch alone, ``(B, Nq, H_kv, n)`` or ``(T, H_kv, n)``.

    They are as :func:`check_block_indices` wants them in token mode, but ``n`` is any from 1 on.
    ``counts`` are the blocks that each row may name, and the most of all, where keys are in pages.
    """
    check_index_tensor(indices, q)
    leading = (*problem.leading, problem.num_kv_heads)
    if tuple(indices.shape[:-1]) != leading or indices.shape[-1] == 0:
        wanted = ", ".join(map(str, leading))
        raise ValueError(
            f"block_indices must have shape ({wanted}, n) with n of at least 1, got "
            f"{tuple(indices.shape)}"
        )
    if indices.numel() and has_readable_values(indices):
        check_block_values(indices, *(counts or _block_counts(indices, boundaries, problem)))


def check_index_tensor(indices, q: Tensor):
    """Check that the caller's selection is an int32 tensor on the device of q."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"block_indices must be an int32 tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int32:
        raise TypeError(f"block_indices must have dtype torch.int32, got {indices.dtype}")
    if indices.device != q.device:
        raise ValueError(
            f"block_indices must be on the device of q, {q.device}, got {indices.device}"
        )


def _block_indices_shape(boundaries: Boundaries | None, problem: Problem) -> tuple[int, ...]:
    """The shape of ``block_indices``, with an upper bound on tiles if lengths are unknown."""
    config = problem.config
    if config.selection == "token":
        return (*problem.leading, problem.num_kv_heads, config.num_selected_blocks)
    if boundaries is None:
        batch, length = problem.leading
        tiles = num_query_tiles(length, config)
        return (batch, problem.num_heads, tiles, config.num_selected_blocks)
    if boundaries.lengths is None:
        tiles = most_query_tiles(problem.leading[0], boundaries.cu_seqlens.shape[0] - 1, config)
    else:
        tiles = sum(num_query_tiles(length, config) for length in boundaries.lengths)
    return (problem.num_heads, tiles, config.num_selected_blocks)


def _has_unknown_tiles(indices: Tensor, boundaries: Boundaries | None, problem: Problem) -> bool:
    """Whether the shape fits some number of tiles, and the true number was not read."""
    if boundaries is None or problem.config.selection == "token":
        return False
    if boundaries.lengths is not None or indices.ndim != 3:
        return False
    heads, most, slots = _block_indices_shape(boundaries, problem)
    if (indices.shape[0], indices.shape[2]) != (heads, slots):
        return False
    # torch.compile would guard a number of tiles that it knows as a symbol.
    return torch.compiler.is_compiling() or indices.shape[1] <= most


def _block_counts(
    indices: Tensor, boundaries: Boundaries | None, problem: Problem
) -> tuple[int | Tensor, int]:
    """Blocks that each row of ``indices`` may name, and the largest such number."""
    config = problem.config
    if boundaries is None:
        most = num_selection_blocks(problem.leading_k[1], config)
        return most, most
    if boundaries.lengths is None or boundaries.lengths_k is None:
        longest = boundaries.max_seqlen_k
        longest = problem.leading_k[0] if longest is None else longest
        most = num_selection_blocks(longest, config)
        return most, most
    lengths = boundaries.lengths
    token = config.selection == "token"
    units = lengths if token else [num_query_tiles(n, config) for n in lengths]
    blocks = [num_selection_blocks(n, config) for n in boundaries.lengths_k]
    each = torch.repeat_interleave(*(torch.tensor(x, device="cpu") for x in (blocks, units)))
    count = each.to(indices.device)[(..., None, None) if token else (..., None)]
    return count, max(blocks, default=0)


def check_block_values(indices: Tensor, count: int | Tensor, most: int):
    """Check that each row names blocks below ``count``, ascending with -1 at the end."""
    outside = (indices < -1) | (indices >= count)
    before, after = indices[..., :-1], indices[..., 1:]
    descends = (after != -1) & ((after <= before) | (before == -1))
    # One test, so that the host waits for the device once.
    if not bool(outside.any() | descends.any()):
        return
    if outside.any():
        raise ValueError(
            f"block_indices must lie in [0, blocks of the sequence), at most {most}, or be -1; "
            f"got {int(indices[outside][0])}"
        )
    raise ValueError(
        f"block_indices must ascend, with -1 only at the end of a row, got "
        f"{int(before[descends][0])} before {int(after[descends][0])}"
    )
