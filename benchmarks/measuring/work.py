"""The work of a call, from its shape alone: attended pairs, operations and bytes.

All counts are for causal attention, and the least that the method needs: blocks are not
padded to tiles, every tensor is read or written once, and elements have 16 bits.
"""

from typing import NamedTuple

import torch

import nsa
from nsa.blocks import num_compressed_blocks, num_query_tiles, num_selection_blocks
from nsa.fused.pipeline import SHORT_TOKENS

ELEMENT = 2  # bytes


class Pairs(NamedTuple):
    """(query, key) pairs of one head in each branch."""

    compressed: int
    selected: int
    window: int


class Work(NamedTuple):
    """Bytes moved and floating-point operations of matrix products."""

    bytes: int
    flops: int


def attended_pairs(length: int, config: nsa.NSAConfig) -> Pairs:
    """Upper bound on the pairs of one head in one sequence: a block may end after the query."""
    seen = torch.arange(1, length + 1)
    block, stride = config.compress_block_size, config.compress_stride
    compressed = ((seen - block) // stride + 1).clamp(min=0)
    if config.num_cmp_selected_blocks is not None:
        compressed = compressed.clamp(max=config.num_cmp_selected_blocks * config.cmp_group_size)
    selected = seen.clamp(max=config.num_selected_blocks * config.select_block_size)
    window = seen.clamp(max=config.window_size)
    return Pairs(*(int(x.sum()) for x in (compressed, selected, window)))


def dense_pairs(length: int) -> int:
    """Pairs of one head in causal attention over everything."""
    return length * (length + 1) // 2


def attention_flops(pairs: int, head_dim: int, backward: bool) -> int:
    """Operations: forward has two products, and backward, which recomputes scores, has five."""
    return (10 if backward else 4) * head_dim * pairs


def stage_work(length: int, options, config: nsa.NSAConfig) -> dict[str, Work]:
    """The least work of each stage of ``nsa.fused.pipeline`` for one sequence, by its name.

    Args:
        length: tokens.
        options: heads, kv_heads and head_dim.
        config: block sizes and counts.
    """
    heads, dim = options.heads, options.head_dim
    query = length * heads * dim * ELEMENT
    key = length * options.kv_heads * dim * ELEMENT
    compressed_key = num_compressed_blocks(length, config) * options.kv_heads * dim * ELEMENT
    pairs = attended_pairs(length, config)
    token = config.selection == "token"
    if token:
        lists, scored = options.kv_heads * length, heads * pairs.compressed
    else:
        lists = heads * num_query_tiles(length, config)
        # A tile scores the compressed tokens that its last query sees.
        scored = lists * num_compressed_blocks(length, config) // 2
    listed = lists * min(config.num_selected_blocks, num_selection_blocks(length, config))
    work = {
        "compress_pair": Work(2 * (key + compressed_key), 0),
        "select_blocks": Work(query + compressed_key + 4 * listed, 2 * dim * scored),
        "combine_branches": Work(5 * query, 0),
        # dout, the branches' outputs and q.
        "combine_branches_backward": Work(5 * query, 0),
        # Adds those of means to the gradients of the window's and the selected branch's keys.
        "key_gradients": Work(2 * (3 * key + compressed_key), 0),
    }
    if options.heads == options.kv_heads:
        work["query_gradient"] = Work(4 * query, 0)
    elif not token:
        # Sums in float32, the selected branch's gradient, and the result.
        work["gradient_of_sums"] = Work(4 * query, 0)
    if not token:
        # int32 entries, read and written.
        work |= {
            "selected_attention/selected_lists": Work(8 * listed, 0),
            "selected_attention_backward/selected_lists": Work(8 * listed, 0),
        }
    branches = {
        "compressed_attention": (pairs.compressed, compressed_key),
        "selected_attention": (pairs.selected, key),
        "window_attention": (pairs.window, key),
    }
    for name, (count, keys) in branches.items():
        flops = [attention_flops(heads * count, dim, backward) for backward in (False, True)]
        work[name] = Work(2 * query + 2 * keys, flops[0])
        # q, dout and dq; keys, values and their gradients.
        work[f"{name}_backward"] = Work(3 * query + 4 * keys, flops[1])
    if length > SHORT_TOKENS:
        # One stage for both, which reads the two other outputs besides.
        del work["combine_branches"]
        window = work.pop("window_attention")
        work["closing_window"] = window._replace(bytes=window.bytes + 2 * query)
    elif token and config.num_initial_blocks + config.num_local_blocks > 0:
        # One stage for both, which reads the two other outputs besides.
        del work["combine_branches"]
        selected = work.pop("selected_attention")
        work["closing_attention"] = selected._replace(bytes=selected.bytes + 2 * query)
    return work


def floor_milliseconds(work: Work, terabytes: float, teraflops: float) -> tuple[float, str]:
    """The least time by the roofline model, and the limit that sets it, "bytes" or "flops".

    Args:
        work: the work of one stage.
        terabytes: memory bandwidth per second.
        teraflops: rate of matrix products per second.
    """
    by_bytes, by_flops = work.bytes / terabytes / 1e9, work.flops / teraflops / 1e9
    return max((by_bytes, "bytes"), (by_flops, "flops"))
