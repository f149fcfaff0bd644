"""Checks of the arguments of a cache."""

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.validation import UnsupportedError, check_config, check_dtype, check_size

MAX_LENGTH = 2**31 - 1
"""Tokens of a sequence, whose lengths are int32. Other sizes are limited likewise."""


def check_decodable(config) -> NSAConfig:
    """The configuration, if sequences can be decoded with it step by step."""
    config = check_config(config)
    reason = None
    if not config.causal:
        reason = "causal=False lets outputs change as the sequence grows; use causal=True"
    elif config.compressed_visibility == "started":
        reason = (
            "compressed_visibility='started' lets a query see later tokens; use "
            "compressed_visibility='complete'"
        )
    elif config.selection == "tile" and config.tile_summary == "mean":
        reason = (
            "tile_summary='mean' selects with queries that do not exist yet; use "
            "tile_summary='first'"
        )
    if reason is not None:
        raise UnsupportedError(f"a cache cannot decode with this configuration: {reason}")
    return config


def check_num_heads(num_heads, num_kv_heads: int):
    check_size("num_heads", num_heads, MAX_LENGTH)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}"
        )


def check_page_size(page_size, config: NSAConfig):
    """Check that pages hold whole selection blocks, and so whole strides."""
    check_size("page_size", page_size, MAX_LENGTH)
    if page_size % config.select_block_size:
        raise ValueError(
            f"page_size must be a multiple of select_block_size={config.select_block_size}, got "
            f"{page_size}"
        )


def check_pages(k_pages, v_pages, k_cmp_pages, v_cmp_pages, config: NSAConfig):
    """Check the pools of a server."""
    pools = {
        "k_pages": k_pages,
        "v_pages": v_pages,
        "k_cmp_pages": k_cmp_pages,
        "v_cmp_pages": v_cmp_pages,
    }
    for name, pool in pools.items():
        if not isinstance(pool, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(pool).__name__}")
        check_dtype(f"dtype of {name}", pool.dtype)
        if pool.ndim != 4 or 0 in pool.shape:
            raise ValueError(
                f"{name} must have shape (pages, slots, H_kv, channels) with sizes of at least 1, "
                f"got {tuple(pool.shape)}"
            )
        if (pool.dtype, pool.device) != (k_pages.dtype, k_pages.device):
            raise ValueError(
                f"{name} must have the dtype and device of k_pages, {k_pages.dtype} on "
                f"{k_pages.device}, got {pool.dtype} on {pool.device}"
            )
        if any(
            size > 1 and not stride for size, stride in zip(pool.shape, pool.stride(), strict=True)
        ):
            raise ValueError(
                f"{name} must have a place for each entry, as it is written to, got strides "
                f"{pool.stride()} of an expanded tensor"
            )
    pages, page_size, heads, dim = k_pages.shape
    check_page_size(page_size, config)
    slots = page_size // config.compress_stride
    wanted = {
        "v_pages": (pages, page_size, heads, v_pages.shape[-1]),
        "k_cmp_pages": (pages, slots, heads, dim),
        "v_cmp_pages": (pages, slots, heads, v_pages.shape[-1]),
    }
    for name, shape in wanted.items():
        if tuple(pools[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(pools[name].shape)}")


def check_table(page_table, lengths, device: torch.device, name_of_lengths: str = "lengths"):
    """Check the page table and the lengths of a server."""
    for name, x, rank in (("page_table", page_table, 2), (name_of_lengths, lengths, 1)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be an int32 tensor, got {type(x).__name__}")
        if x.dtype != torch.int32:
            raise TypeError(f"{name} must have dtype torch.int32, got {x.dtype}")
        if x.ndim != rank or 0 in x.shape:
            form = "(B, max_pages)" if rank == 2 else "(B,)"
            raise ValueError(
                f"{name} must have shape {form} with sizes of at least 1, got {tuple(x.shape)}"
            )
        if x.device != device:
            raise ValueError(f"{name} must be on the device of the pages, {device}, got {x.device}")
    if lengths.shape[0] != page_table.shape[0]:
        raise ValueError(
            f"{name_of_lengths} must have one entry for each of the {page_table.shape[0]} rows of "
            f"page_table, got {lengths.shape[0]}"
        )


def check_held(lengths: Tensor, max_length: int):
    """Check that pages can hold the tokens of a server, unless the host would wait for a GPU."""
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > max_length)).any()):
        raise ValueError(
            f"lengths must lie in [0, {max_length}], the tokens of max_pages pages, got "
            f"{lengths.tolist()}"
        )


def check_whole_tiles(lengths: Tensor, config: NSAConfig):
    """Check that no tile of a server's sequences is open; its selection would be unknown."""
    for length in lengths.tolist():
        if length % config.q_tile_size:
            raise ValueError(
                f"lengths must be multiples of q_tile_size={config.q_tile_size} with "
                f"selection='tile', because pages do not hold the open tile's selection; got "
                f"{length}"
            )


def check_integers(name: str, x: Tensor, count: int):
    """Check a tensor of one int32 or int64 for each sequence."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {x.dtype}")
    if tuple(x.shape) != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {tuple(x.shape)}")


def check_lengths(lengths, count: int) -> tuple[Tensor, Tensor | None]:
    """New lengths as a tensor ``(count,)``, and once more if the host can read them."""
    if isinstance(lengths, Tensor):
        check_integers("lengths", lengths, count)
        values = lengths if lengths.device.type == "cpu" else None
    else:
        whole = [lengths] * count if isinstance(lengths, int) else lengths
        if not isinstance(whole, list) or any(type(x) is not int for x in whole):
            raise TypeError(f"lengths must be an int, a list of them or a tensor, got {lengths!r}")
        # A larger one is no limit either, and would not fit.
        whole = [min(x, MAX_LENGTH) for x in whole]
        lengths = values = torch.tensor(whole, dtype=torch.int64, device="cpu")
        check_integers("lengths", lengths, count)
    if values is not None and bool((values < 0).any()):
        raise ValueError(f"lengths must be at least 0, got {values.tolist()}")
    return lengths, values


def check_index(index, count: int, device: torch.device) -> Tensor:
    """An index of sequences as int64 ``(count,)``."""
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    check_integers("index", index, count)
    if index.device != device:
        raise ValueError(f"index must be on the device of the cache, {device}, got {index.device}")
    if device.type == "cpu" and bool(((index < 0) | (index >= count)).any()):
        raise ValueError(f"index must lie in [0, {count}), got {index.tolist()}")
    return index.long()
