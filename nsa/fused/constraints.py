"""What the fused backend supports. Beyond that, :class:`nsa.UnsupportedError` names the limit.

- GPU: compute capability 9.0 (Hopper).
- float16 and bfloat16; ``D`` and ``Dv`` up to 256, any ``G``. Channels are padded with zeros to the
  kernels' 64, 96, 128 or 256, because FA4's backward is silently wrong at D = 80 and does not
  support ``Dv != D`` with G > 1.
- Tile mode: ``q_tile_size``, ``select_block_size`` and (with a sparse compressed branch)
  ``cmp_group_size`` are multiples of 64, the width of a block-sparse tile; any
  ``compress_block_size``. ``num_selected_blocks`` and ``num_cmp_selected_blocks`` are up to 256,
  because one warp holds the best so far in registers. Sizes are up to 65536, because rows are
  padded to whole tiles.
- Token mode: ``select_block_size`` is 32 or 64, the keys that a query row attends at a time.
  ``num_selected_blocks`` is up to 64, because one thread holds the weights in registers. ``G`` is
  up to 32, the heads whose probabilities one thread adds. ``compress_block_size`` is up to about 60
  strides, because a tile of 64 compressed tokens overlaps only the next tile's selection blocks.
- Deterministic gradients: in tile mode, ``D`` and ``Dv`` up to 128, because FA4's backward with
  lists has no fixed order, and our own no room for more.
- The selected branch by itself: blocks of 32, 64 or 128 keys, up to 64 of them for a query, any
  ``G``. It runs all KV heads at once, so ``block_indices`` have fewer than 2^30 slots.
"""

import math

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.cache.paged_keys import PagedKeys
from nsa.config import NSAConfig
from nsa.fused import decoding, fa4, prefill
from nsa.fused.decode_inputs import MAX_TOKENS
from nsa.fused.kernel_inputs import HEAD_DIMS, MAX_BLOCKS
from nsa.fused.token_inputs import MAX_GROUP, Rule
from nsa.host import has_no_values, is_capturing

DTYPES = (torch.float16, torch.bfloat16)
BLOCK = 64
TOKEN_BLOCKS = (32, 64)
MAX_TOKEN_SELECTED = 64
MAX_SIZE = 1 << 16
MAX_PAIRS = 1 << 30
"""Limit on pairs of a token and a block for one KV head, over all entries of the batch. It is half
of the int32 range, because chunks of tokens are rounded up."""
_USE_REFERENCE = "use backend='reference'"


def unsupported_reason(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    """The first limit that ``q (..., D)``, ``v (..., Dv)`` and ``config`` exceed, or None."""
    token = config.selection == "token"
    return (
        (_token_limit(q, v, config) if token else _tile_limit(config))
        or _tensor_limit(q, v)
        or _device_limit(q)
        or fa4.version_problem()
    )


def deterministic_limit(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    """Why gradients of the call cannot have the same bits each time, with the remedy, or None."""
    dim = max(q.shape[-1], v.shape[-1])
    if config.selection == "token" or dim <= 128:
        return None
    return (
        "it needs D and Dv of at most 128 for deterministic gradients with selection='tile', got "
        f"{dim}; pass deterministic=False, or {_USE_REFERENCE}"
    )


def cache_limit(q: Tensor, cache: Cache, boundaries: Boundaries | None, given: bool) -> str | None:
    """The first limit that a call with a cache exceeds, or None.

    ``given`` is whether the caller gives ``block_indices``.
    """
    return (
        _cached_form_limit(q, cache, boundaries, given)
        or _tensor_limit(q, cache.v_pages)
        or _device_limit(q)
        or fa4.version_problem()
    )


def _cached_form_limit(
    q: Tensor, cache: Cache, boundaries: Boundaries | None, given: bool
) -> str | None:
    """Few new tokens are decoded where that is possible; prompts go the way of training."""
    few = decoding.unsupported_reason(q, cache, boundaries, given)
    if few is None:
        return None
    token = cache.config.selection == "token"
    prompt = prefill.unsupported_reason(q, cache, boundaries) or (
        _token_limit(q, cache.v_pages, cache.config) if token else _tile_limit(cache.config)
    )
    return few if prompt and decoding.has_few_tokens(q, boundaries) else prompt


def unsupported_lists(q: Tensor, v: Tensor, block_indices: Tensor) -> str | None:
    """The first limit that attention to the caller's lists exceeds, or None."""
    return (
        _list_limit(block_indices)
        or _tensor_limit(q, v)
        or _device_limit(q)
        or fa4.version_problem()
    )


def unsupported_pages(
    q: Tensor,
    pages: PagedKeys,
    block_indices: Tensor,
    block_size: int,
    boundaries: Boundaries | None,
) -> str | None:
    """The first limit that attention to lists of blocks in pages exceeds, or None."""
    limit = unsupported_lists(q, pages.v, block_indices)
    if limit is None and has_no_values(q):
        limit = "it needs tensors with values, for the kernel that reads pages is no custom op"
    if limit is None and is_capturing(q):
        copied = in_place_limit(q, pages, block_size, boundaries)
        if copied is not None:
            limit = (
                f"in a CUDA graph it reads pages in place, for which it needs {copied}; call it "
                "outside of the graph, where it copies them"
            )
    return limit


def in_place_limit(
    q: Tensor, pages: PagedKeys, block_size: int, boundaries: Boundaries | None
) -> str | None:
    """Why the kernel of decoding cannot read the pages, so that they are copied; None if it can."""
    tokens, group = decoding.most_tokens(q, boundaries), q.shape[-2] // pages.k.shape[2]
    if tokens is None or tokens > MAX_TOKENS:
        return f"at most {MAX_TOKENS} queries of a sequence, which the host knows, got {tokens}"
    if group > MAX_GROUP:
        return f"at most {MAX_GROUP} query heads to a KV head, got {group}"
    if pages.k.shape[1] % block_size:
        return f"page_size to be a multiple of block_size={block_size}, got {pages.k.shape[1]}"
    dims, pools = (pages.k.shape[-1], pages.v.shape[-1]), {"k": pages.k, "v": pages.v}
    return decoding.size_limit(dims, block_size) or decoding.layout_limit(pools)


def _list_limit(block_indices: Tensor) -> str | None:
    slots = block_indices.shape[-1]
    if slots > MAX_TOKEN_SELECTED:
        return (
            f"it needs at most {MAX_TOKEN_SELECTED} slots in a row of block_indices, got {slots}; "
            f"{_USE_REFERENCE}"
        )
    if torch.compiler.is_compiling():
        # torch.compile would guard a limit on a length.
        return None
    pairs = block_indices.numel()
    if pairs >= MAX_PAIRS:
        return (
            f"it needs fewer than {MAX_PAIRS} slots in block_indices, got {pairs}; split the batch "
            f"or the KV heads, or {_USE_REFERENCE}"
        )
    return None


def _token_limit(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    size, rule, group = config.select_block_size, Rule.of(config), q.shape[-2] // v.shape[-2]
    if size not in TOKEN_BLOCKS:
        return (
            f"it needs select_block_size of {TOKEN_BLOCKS} with selection='token', got {size}; "
            f"{_USE_REFERENCE}"
        )
    if config.num_selected_blocks > MAX_TOKEN_SELECTED:
        return (
            f"it needs num_selected_blocks of at most {MAX_TOKEN_SELECTED} with "
            f"selection='token', got {config.num_selected_blocks}; {_USE_REFERENCE}"
        )
    if group > MAX_GROUP:
        return (
            f"it needs at most {MAX_GROUP} query heads to a KV head with selection='token', got "
            f"{group}; {_USE_REFERENCE}"
        )
    if rule.carried > rule.rows:
        return (
            f"it needs compress_block_size of at most {rule.rows + 1} strides with "
            f"selection='token', got {rule.per_compress}; {_USE_REFERENCE}"
        )
    if torch.compiler.is_compiling():
        # torch.compile would guard a limit on a length.
        return None
    pairs = math.prod(q.shape[:-2]) * config.num_selected_blocks
    if pairs >= MAX_PAIRS:
        return (
            f"it needs fewer than {MAX_PAIRS} pairs of tokens and selected blocks with "
            f"selection='token', got {pairs}; split the batch, or {_USE_REFERENCE}"
        )
    return None


def _tile_limit(config: NSAConfig) -> str | None:
    sizes = ["q_tile_size", "select_block_size"]
    if config.num_cmp_selected_blocks is not None:
        sizes.append("cmp_group_size")
    for name in sizes:
        size = getattr(config, name)
        if size % BLOCK:
            return f"it needs {name} to be a multiple of {BLOCK}, got {size}; {_USE_REFERENCE}"
    for name in ("compress_block_size", "q_tile_size", "select_block_size", "cmp_group_size"):
        size = getattr(config, name)
        if size > MAX_SIZE:
            return f"it needs {name} of at most {MAX_SIZE}, got {size}; {_USE_REFERENCE}"
    for name in ("num_selected_blocks", "num_cmp_selected_blocks"):
        count = getattr(config, name)
        if count is not None and count > MAX_BLOCKS:
            return f"it needs {name} of at most {MAX_BLOCKS}, got {count}; {_USE_REFERENCE}"
    return None


def _tensor_limit(q: Tensor, v: Tensor) -> str | None:
    if q.dtype not in DTYPES:
        return f"it needs dtype float16 or bfloat16, got {q.dtype}; cast, or {_USE_REFERENCE}"
    for name, dim in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if dim > HEAD_DIMS[-1]:
            return f"it needs {name} of at most {HEAD_DIMS[-1]}, got {dim}; {_USE_REFERENCE}"
    return None


def _device_limit(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"it needs a CUDA device, got {q.device}; move the tensors, or {_USE_REFERENCE}"
    capability = _capability(q.device.index)
    if capability != "9.0":
        return f"it needs compute capability 9.0, got {capability}; {_USE_REFERENCE}"
    return None


@torch.compiler.assume_constant_result
def _capability(device: int) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability(device)))
