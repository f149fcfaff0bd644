"""Checks of a call that has a cache, before any backend starts."""

from typing import Any

import torch
from torch import Tensor

from nsa.block_index_checks import check_block_values, check_index_tensor
from nsa.blocks import num_selection_blocks
from nsa.boundaries import Boundaries
from nsa.cache.state import Cache
from nsa.config import NSAConfig
from nsa.host import has_no_values, has_readable_values
from nsa.validation import (
    Problem,
    UnsupportedError,
    check_config,
)


def cache_config(cache, config) -> NSAConfig:
    """The configuration of the cache, which is that of the call."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be an nsa.Cache or None, got {type(cache).__name__}")
    # The encoded forms, because torch.compile cannot compare ints that it traces as symbols.
    if config is not None and check_config(config).encoded != cache.config.encoded:
        raise ValueError(f"config must be that of the cache, {cache.config}, got {config}")
    return cache.config


def check_cached_call(
    cache: Cache,
    k: tuple[Tensor, Tensor, Tensor],
    v: tuple[Tensor, Tensor, Tensor] | None,
    floats: dict[str, Any],
    boundaries: Boundaries | None,
    problem: Problem,
):
    """Check that new tokens fit the cache, as far as the host knows its lengths.

    Args:
        k, v: a tensor per branch.
        floats: all float arguments by name, which must not require gradients.
    """
    _check_gradients(floats)
    q = floats["q"]
    if boundaries is not None and boundaries.cu_seqlens_k is not boundaries.cu_seqlens:
        raise ValueError(
            "cu_seqlens_k must be None with a cache: k has the new tokens alone, got other "
            "boundaries than those of q"
        )
    if problem.leading != problem.leading_k:
        raise ValueError(
            f"k must have the new tokens alone with a cache, {problem.leading}, got "
            f"{problem.leading_k}"
        )
    sequences = problem.leading[0] if boundaries is None else boundaries.cu_seqlens.shape[0] - 1
    if sequences != cache.batch_size:
        raise ValueError(
            f"cache must have the {sequences} sequences of q, got batch_size={cache.batch_size}"
        )
    if q.dtype != cache.dtype:
        raise TypeError(f"cache must have the dtype of q, {q.dtype}, got {cache.dtype}")
    if q.device != cache.device:
        raise ValueError(f"cache must be on the device of q, {q.device}, got {cache.device}")
    sizes = [
        ("num_kv_heads", problem.num_kv_heads, cache.num_kv_heads),
        ("head_dim", problem.head_dim, cache.head_dim),
    ]
    if v is not None:
        sizes.append(("value_head_dim", problem.value_dim, cache.value_head_dim))
    if cache.num_heads is not None:
        sizes.append(("num_heads", problem.num_heads, cache.num_heads))
    for name, wanted, found in sizes:
        if wanted != found:
            raise ValueError(f"cache must have {name}={wanted} of the arguments, got {found}")
    for name, x in (("k", k), ("v", v)):
        if x is not None and not cache.separate_kv and not x[0] is x[1] is x[2]:
            raise ValueError(
                f"{name} must be one tensor for a cache with separate_kv=False, got three"
            )
    if has_no_values(q):
        raise UnsupportedError(
            "a call with a cache reads values, which meta and fake tensors do not have; give "
            "tensors with values"
        )
    _check_room(cache, boundaries, problem)


def check_cached_indices(
    cache: Cache, indices, boundaries: Boundaries | None, q: Tensor, problem: Problem
):
    """Check ``block_indices`` of new tokens, or of the tiles that have new tokens."""
    if indices is None:
        return
    check_index_tensor(indices, q)
    config, slots = cache.config, cache.config.num_selected_blocks
    spans = _known_spans(cache, boundaries, problem)
    token = config.selection == "token"
    tiles = indices.shape[-2] if spans is None and indices.ndim > 1 else 0
    if spans is not None and not token:
        counts = [_touched_tiles(start, end, config) for start, end in spans]
        tiles = sum(counts) if boundaries is not None else max(counts, default=0)
    if token:
        shape = (*problem.leading, problem.num_kv_heads, slots)
    else:
        batch = () if boundaries is not None else (cache.batch_size,)
        shape = (*batch, problem.num_heads, tiles, slots)
    if tuple(indices.shape) != shape:
        raise ValueError(
            f"block_indices must have shape {shape} with selection={config.selection!r}, got "
            f"{tuple(indices.shape)}"
        )
    if not indices.numel() or not has_readable_values(indices):
        return
    longest = cache.max_length if spans is None else max((end for _, end in spans), default=0)
    most = num_selection_blocks(longest, config)
    count: int | Tensor = most
    if spans is not None:
        blocks = [num_selection_blocks(end, config) for _, end in spans]
        count = torch.tensor(blocks, device="cpu")
        if boundaries is None:
            count = count.view(-1, 1, 1, 1)
            if not token:
                # Rows past the tiles of a sequence are not read.
                row = torch.arange(tiles, device=indices.device)[:, None]
                of_sequence = torch.tensor(counts, device=indices.device).view(-1, 1, 1, 1)
                indices = indices.masked_fill(row >= of_sequence, -1)
        else:
            units = [end - start for start, end in spans] if token else counts
            count = count.repeat_interleave(torch.tensor(units, device="cpu"))
            count = count[(..., None, None) if token else (..., None)]
        count = count.to(indices.device)
    check_block_values(indices, count, most)


def _touched_tiles(start: int, end: int, config: NSAConfig) -> int:
    """Tiles that hold the tokens from ``start`` to ``end``."""
    return -(-end // config.q_tile_size) - start // config.q_tile_size if end > start else 0


def _known_spans(
    cache: Cache, boundaries: Boundaries | None, problem: Problem
) -> list[tuple[int, int]] | None:
    """Lengths of each sequence before and after the call, if the host knows them."""
    if torch.compiler.is_compiling():
        return None
    starts = cache.known_lengths()
    new = [problem.leading[-1]] * cache.batch_size if boundaries is None else boundaries.lengths
    if starts is None or new is None:
        return None
    return [(start, start + count) for start, count in zip(starts, new, strict=True)]


def _check_room(cache: Cache, boundaries: Boundaries | None, problem: Problem):
    for at, (start, end) in enumerate(_known_spans(cache, boundaries, problem) or ()):
        if end > cache.max_length:
            raise ValueError(
                f"cache must have max_length of at least {end} for {end - start} new tokens after "
                f"{start} in sequence {at}, got {cache.max_length}"
            )


def _check_gradients(floats: dict[str, Any]):
    if not torch.is_grad_enabled():
        return
    for name, x in floats.items():
        for part in x if isinstance(x, tuple | list) else (x,):
            if isinstance(part, Tensor) and part.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient with a cache, which has none; use "
                    "torch.no_grad()"
                )
