"""Our own CuTe DSL kernels.

Importing a file imports cutlass; importing this package does not. Callers use
:mod:`nsa.fused.kernel_calls`, which documents the operations.

Files with an operation: ``plan_tables``, ``rope``, ``block_rows``, ``means``, ``gates``,
``few_keys``, ``query_gradient``, ``query_sums``, ``lists``, ``tile_scores``, ``top_blocks``,
``importance``, ``selected_forward``, ``selected_backward``, ``row_statistics`` and
``listed_backward``; and of decoding ``decode_append``, ``decode_compressed``,
``decode_select``, ``decode_units``, ``decode_tile_select``, ``decode_finish`` and
``decode_attend``, which
:mod:`nsa.fused.decode_calls` documents. Each has

- classes of kernels. ``__call__`` runs on the host and launches ``kernel``. Tensors and sizes come
  in named tuples, so that each list of arguments is written once;
- cached functions that compile a class for a dtype and static sizes;
- ``compile_cases``, with which a tool compiles every form on a machine without a GPU;
- the functions that check, allocate and launch.

Parts of other operations, with kernels of their own: ``inverted_index`` (selected forward and
backward), ``selected_band`` (selected forward), ``float_sums`` (the backward kernels of attention)
and ``padded_rows`` (FlashAttention-4's backward).

Files without kernels: ``vectors`` (16-byte loads and stores, how tensors are passed), ``head_rows``
(the tiles of ``gates``, ``few_keys`` and
``query_gradient``), ``sequences`` (the sequence of a row), ``rows``
(copies of rows to shared memory), ``pair_copies`` (those of pairs by TMA, in the selected
forward), ``forward_tiles`` (what the two forward kernels of token mode
share), ``partial_rows`` (partial outputs between these), ``row_gates`` (the gated sum in the
second), ``best_blocks`` (ranked blocks in a warp's registers), ``decode_best`` (those of a CTA),
``decode_pages`` (keys and values in pages), ``decode_tiles`` (attention to tiles of them),
``decode_softmax`` (its softmax), ``decode_schedule`` (the split of compressed keys, and when
kernels start), ``decode_records`` (what is recorded of blocks), ``decode_scores`` (blocks scored
from records), ``decode_lists`` (lists of the best blocks), ``decode_places`` (their tiles),
``decode_parts`` (outputs of warps added up), ``decode_outputs`` (those of a cluster), ``hopper``
(all that is used of FlashAttention-4 and quack-kernels),
``fa4_sm90`` and ``fa4_fakes`` (FlashAttention-4's kernel classes, compiled as ours are) and
``compiled`` (compiled kernels in memory and on disk).
"""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def load(name: str) -> ModuleType:
    """The file of an operation."""
    return import_module(f"{__name__}.{name}")
