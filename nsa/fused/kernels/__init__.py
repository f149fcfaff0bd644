"""Our own CuTe DSL kernels.

Importing a file imports cutlass; importing this package does not. Callers use
:mod:`nsa.fused.kernel_calls` and :mod:`nsa.fused.decode_calls`, which document the operations.

A file of an operation has

- classes of kernels. ``__call__`` runs on the host and launches ``kernel``. Tensors and sizes come
  in named tuples, so that each list of arguments is written once;
- cached functions that compile a class for a dtype and static sizes;
- ``compile_cases``, with which a tool compiles every form on a machine without a GPU;
- the functions that check, allocate and launch.

Operations:

- ``sequence_tables``: the index tensors of packed sequences
- ``rotation``: rotary embedding, forward and backward
- ``block_rows``: rows of the learned compression, gathered and scattered
- ``column_sums``: gradients of activations and of biases
- ``product``: the product of all projections of a layer, split into rotated heads, and its gradient
- ``means``: means of blocks, forward and backward
- ``gated_sum``: the gated sum of branches, forward and backward
- ``few_keys``: the delta of queries that see a few compressed keys
- ``query_gradient``: the gradient of queries, added up over branches
- ``query_sums``: the same from float32 sums
- ``key_block_lists``: block lists by query tile, and their transpose
- ``tile_scores``, ``importance``: scores of blocks, in tile mode and in token mode
- ``top_blocks``: the best-scored blocks
- ``selected_forward``, ``selected_backward``: the selected branch of token mode
- ``row_statistics``: what a backward needs of one branch by itself
- ``listed_backward``: backward of query tiles that attend 64-key blocks

Operations of decoding:

- ``decode_append``: new tokens into pages, and the schedule
- ``decode_compressed``: the compressed branch, and records for the selection
- ``decode_select``, ``decode_tile_select``: the selection by itself, by token and by tile
- ``decode_units``: the rest of a step of a few tokens, a CTA for each unit
- ``decode_finish``: the rest of any step: selection, selected and window branch, gated sum
- ``decode_attend``: selected blocks in pages, for few queries

Parts of other operations, with kernels of their own:

- ``inverted_index``: which tokens selected each block, for the selected branch of token mode
- ``selected_band``: attention over the band, for ``selected_forward``
- ``query_partials``: partial gradients of queries, for ``selected_backward``
- ``float_sums``, ``block_sums``: float32 sums of keys, for the backward kernels of attention
- ``near_block_statistics``: row statistics of a window that attends near blocks too
- ``padded_rows``: row statistics for FlashAttention-4's backward

FlashAttention-4:

- ``fa4_sm90``: its kernel classes, compiled as ours are, and called
- ``fa4_fakes``: tensors to compile them with
- ``fa4_tall``: its forward with tiles of 256 queries
- ``fa4_seen_blocks``, ``fa4_blocks``: forward and backward over compressed blocks
- ``fa4_closing``: its forward that ends with the gated sum
- ``fa4_heads``: its backward with CTAs that pass through several heads
- ``fa4_near_blocks``: that of a window that attends near blocks too
- ``fa4_key_sums``: its conversion of float32 sums, for keys and values at once

Device functions that several kernels share:

- ``vectors``: 16-byte loads and stores, and how tensors are passed
- ``rows``: copies of rows of heads to shared memory
- ``head_rows``: tiles of tensors ``(R, H, D)``
- ``sequence_search``: the sequence of a row
- ``rotary_angles``: angles of the rotary embedding
- ``compressed_rows``: rows of compressed blocks, and their sums by token
- ``forward_tiles``: a tile of 64 rows in the forward of token mode
- ``pair_copies``: rows of pairs to shared memory by TMA, in that forward
- ``partial_rows``: partial outputs between its kernels
- ``row_gates``: the gated sum at its end
- ``query_tiles``: tiles of the rows of pairs, in the backward of token mode
- ``best_blocks``, ``decode_best``: the best of ranked blocks, by a warp and by a CTA
- ``decode_pages``: keys and values in pages
- ``decode_tiles``, ``decode_softmax``: attention to tiles of them, and its softmax
- ``decode_schedule``: how compressed keys are split, and when kernels start
- ``decode_records``, ``decode_scores``: what is recorded of blocks, and scores from it
- ``decode_lists``, ``decode_united``: lists of the best blocks, and those of a unit as one
- ``decode_places``: the tiles of the window and of listed blocks
- ``decode_parts``, ``decode_outputs``, ``decode_unit_outputs``: outputs added up over warps, over
  CTAs, and over what a unit attends

On the host:

- ``compiled``: compiled kernels, in memory and on disk
- ``hopper``: all that is used of FlashAttention-4 and quack-kernels
"""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def load(name: str) -> ModuleType:
    """The file of an operation."""
    return import_module(f"{__name__}.{name}")
