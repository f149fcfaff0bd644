"""How many KV heads to run at a time, and whether backward computes the forward again.

A call's workspace is what it allocates beside arguments, output and their gradients. The estimates
follow what the stages hold at a time: see :mod:`nsa.fused.pipeline` for the stages and
:class:`nsa.fused.fa4_call.Sums` for FA4's float32 buffers. They leave out what does not grow with
the heads.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import (
    most_query_tiles,
    num_compressed_blocks,
    num_query_tiles,
    num_selection_blocks,
)
from nsa.config import NSAConfig
from nsa.fused.block_lists import BOUNDED_BYTES, goes_by_query
from nsa.fused.compressed_forms import CompressedForm, compressed_form, num_compressed_bound
from nsa.fused.constraints import MAX_PAIRS
from nsa.fused.plan import choose_key_block
from nsa.fused.selection import SCORE_ELEMENTS
from nsa.fused.token_blocks import WORKSPACE_BYTES, choose_chunk_tokens
from nsa.fused.token_selection import chunk_tokens
from nsa.host import is_capturing

ALWAYS_FITS = 1 << 30
"""Workspace for which the free memory is not even asked: that takes some 0.1 ms."""

USABLE = 0.9
"""Part of the free memory to plan with; the rest is lost to fragments and rounding."""

BYTES_PER_SCORE = 8
"""Selection holds the float32 scores of a step and of the one before it."""


class Schedule(NamedTuple):
    """KV heads are run in ``chunks``; backward recomputes where forward saves no branch."""

    chunks: int
    recompute: bool


class Problem(NamedTuple):
    """The sizes that memory follows from."""

    batch: int
    length: int  # tokens of an entry of the batch
    sequences: int | None  # of packed input
    longest: int  # tokens of a sequence, at most
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    config: NSAConfig

    @property
    def packed(self) -> bool:
        return self.sequences is not None

    @property
    def tiles(self) -> int:
        """Query tiles of all entries."""
        if self.packed:
            return most_query_tiles(self.length, self.sequences, self.config)
        return self.batch * num_query_tiles(self.length, self.config)

    @property
    def aligned(self) -> bool:
        """Whether aligned rows are a view of the tokens."""
        return not self.packed and self.length % self.config.q_tile_size == 0


def make_schedule(
    tensors: dict[str, Tensor | None],
    config: NSAConfig,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    *,
    save: bool,
    max_workspace_bytes: int | None,
) -> Schedule:
    """The fewest chunks that fit, with recomputing only where no number of chunks fits without.

    Args:
        tensors: queries, keys and values as the kernels get them, by name; ``q (B, T, H, D)`` and
            ``k (B, T, H_kv, D)`` among them.
        config: block sizes and counts.
        cu_seqlens, max_seqlen: as in :func:`nsa.forward`.
        save: whether there will be a backward.
        max_workspace_bytes: limit of the workspace; None for what is free beside the results.
            While torch.compile traces or a CUDA graph is captured that is not asked, and nothing is
            split.
    """
    q = tensors["q"]
    batch, length, num_heads, head_dim = q.shape
    problem = Problem(
        batch=batch,
        length=length,
        sequences=None if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        longest=length if max_seqlen is None else max_seqlen,
        num_heads=num_heads,
        num_kv_heads=tensors["k"].shape[2],
        head_dim=head_dim,
        itemsize=q.element_size(),
        config=config,
    )
    if max_workspace_bytes is not None:
        return choose(problem, save, max_workspace_bytes)
    if torch.compiler.is_compiling():
        # A limit on a length would be guarded.
        return Schedule(1, False)
    whole = Schedule(_fewest(problem), False)
    if not q.is_cuda or is_capturing(q):
        return whole
    if _always_fits(problem, save):
        return whole
    # The output; for a backward also its gradient and those of the inputs.
    results = q.nbytes
    if save:
        results += q.nbytes + sum(x.nbytes for x in tensors.values() if x is not None)
    return choose(problem, save, int(USABLE * _free_bytes(q.device)) - results)


def choose(problem: Problem, save: bool, limit: int) -> Schedule:
    """The cheapest schedule whose workspace is at most ``limit``, else the smallest there is."""
    num_kv_heads = int(problem.num_kv_heads)
    for recompute in (False, True) if save else (False,):
        for chunks in range(_fewest(problem), num_kv_heads + 1):
            size = -(-num_kv_heads // chunks)
            if workspace_bytes(problem, size, save=save, recompute=recompute) <= limit:
                return Schedule(chunks, recompute)
    return Schedule(num_kv_heads, save)


def fewest_chunks(tokens: int, num_kv_heads: int, config: NSAConfig) -> int:
    """Chunks whose pairs of tokens and selected blocks the kernels can count; one in tile mode."""
    if config.selection == "tile":
        return 1
    pairs = tokens * config.num_selected_blocks
    heads = max(1, (MAX_PAIRS - 1) // max(1, pairs))
    return -(-num_kv_heads // heads)


def _fewest(problem: Problem) -> int:
    return fewest_chunks(problem.batch * problem.length, problem.num_kv_heads, problem.config)


def workspace_bytes(problem: Problem, kv_heads: int, *, save: bool, recompute: bool) -> int:
    """Workspace with ``kv_heads`` KV heads at a time, of forward and, where ``save``, backward."""
    kind = _TokenChunk if problem.config.selection == "token" else _Chunk
    chunk, every = kind(problem, kv_heads), kind(problem, problem.num_kv_heads)
    if not save:
        return chunk.branches + chunk.forward
    backward = chunk.branches + max(chunk.forward, chunk.backward)
    if recompute:
        return every.selected + backward
    # Those of the chunk are among those that are saved.
    return every.selected + every.branches - chunk.branches + backward


# Cached, because for a small problem the sums take longer than what they decide.
@lru_cache(maxsize=256)
def _always_fits(problem: Problem, save: bool) -> bool:
    whole = workspace_bytes(problem, problem.num_kv_heads, save=save, recompute=False)
    return whole <= ALWAYS_FITS


class _Chunk:
    """Bytes of what exists for some KV heads and their query heads."""

    def __init__(self, problem: Problem, kv_heads: int):
        p, config = problem, problem.config
        self.problem, self.kv_heads = p, kv_heads
        self.heads = kv_heads * (p.num_heads // p.num_kv_heads)
        tokens, rows = p.batch * p.length, p.tiles * config.q_tile_size
        compressed = p.batch * num_compressed_blocks(p.length, config)
        bound = num_compressed_bound(p.length, p.packed, config)
        self.form = compressed_form(config, packed=p.packed, num_compressed=bound)
        width = p.head_dim * p.itemsize
        self.tokens, self.rows, self.compressed = tokens, rows, compressed
        # A tensor of queries and of keys, as tokens and in aligned rows; compressed keys.
        self.query, self.query_rows = tokens * self.heads * width, rows * self.heads * width
        self.key, self.key_rows = tokens * kv_heads * width, rows * kv_heads * width
        self.key_cmp = compressed * kv_heads * width
        # What packing copies.
        self.query_copy = 0 if p.aligned else self.query_rows
        self.key_copy = 0 if p.aligned else self.key_rows

    @property
    def branches(self) -> int:
        """Outputs and log-sum-exps of the three branches."""
        selected = self.query_rows if self.problem.packed else self.query
        return 2 * self.query + selected + (2 * self.tokens + self.rows) * self.heads * 4

    @property
    def selected(self) -> int:
        """Indices of blocks and groups."""
        config = self.problem.config
        count = config.num_selected_blocks + (config.num_cmp_selected_blocks or 0)
        return self.problem.tiles * self.heads * count * 4

    @property
    def forward(self) -> int:
        """Peak of a forward beside the branches."""
        summaries = self.problem.tiles * self.heads
        scores = min(SCORE_ELEMENTS, summaries * self.compressed)
        in_float32 = (2 * summaries + self.compressed * self.kv_heads) * self._dim * 4
        select = scores * BYTES_PER_SCORE + in_float32
        attend_cmp = self._compressed_copies(queries=1 if self.problem.packed else 2)
        attend_slc = self.query_copy + 2 * self.key_copy
        # Of what is selected there are indices and lists.
        held = 2 * self.key_cmp + self.query_copy + 2 * self.selected
        return held + max(select, attend_cmp, attend_slc)

    @property
    def backward(self) -> int:
        """Peak of a backward beside the branches: of the window, selected, compressed branch.

        Each holds the gradients of the outputs of those that are left, its own gradients and those
        of the branches before it.
        """
        grads = self.query + 2 * self.key
        logits = self.tokens * self.heads * 3 * 4
        window = 3 * self.query + grads + self._accumulators(self.tokens, self.tokens)
        size = self.problem.config.select_block_size
        selected = self._sparse(self.key_rows, self.key_copy, self.rows, size)
        selected += 2 * self.query + grads
        compressed = self.query + 2 * grads + 2 * self.key_cmp + self._compressed_backward()
        return logits + max(window, selected, compressed)

    @property
    def _dim(self) -> int:
        return self.problem.head_dim

    def _compressed_copies(self, queries: int) -> int:
        """The compressed branch's copies: of so many tensors of queries, and of keys and values."""
        if self.form is CompressedForm.LISTED:
            return (queries - 1) * self.query_copy + 2 * self.key_cmp
        if self.form is CompressedForm.FOLDED_ROWS:
            return queries * self.query
        if self.form is CompressedForm.BATCH:
            # Where it is folded, each query head gets keys of its own; else there are few.
            return 2 * (self.heads // self.kv_heads) * self.key_cmp
        return 0

    def _compressed_backward(self, queries: int = 1) -> int:
        """The compressed branch's copies, accumulators and gradients of queries and keys.

        ``queries`` are the tensors of queries that are folded or unfolded by a copy.
        """
        p = self.problem
        if self.form is CompressedForm.LISTED:
            size = p.config.cmp_group_size
            return self._sparse(self.key_cmp, self.key_cmp, self.compressed, size)
        copies = self._compressed_copies(queries)
        # Gradients of each query head's own keys, where it has them, and their sum in float32.
        gradients = self.query + 4 * self.key_cmp + (0 if p.packed else copies)
        return copies + gradients + self._accumulators(self.tokens, self.compressed)

    def _sparse(self, keys: int, key_copy: int, num_keys: int, block_size: int) -> int:
        """A sparse backward: copies, gradients, accumulators and lists.

        Copied are q, keys and values; of a batch out and dout too, which packed lie in rows.
        """
        copies = (1 if self.problem.packed else 3) * self.query_copy + 2 * key_copy
        gradients = self.query_rows + 2 * keys
        total = copies + gradients + self.selected
        key_block = choose_key_block(block_size, self.problem.config, self._dim)
        if goes_by_query(key_block, self._dim):
            return total + self._key_sums(num_keys)
        return total + self._transposed(num_keys) + self._accumulators(self.rows, num_keys)

    def _accumulators(self, queries: int, keys: int) -> int:
        """FA4's, in float32: dq and two numbers a query; with grouped heads also dk and dv."""
        of_queries = queries * self.heads * (self._dim + 2) * 4
        return of_queries + (self._key_sums(keys) if self.heads != self.kv_heads else 0)

    def _key_sums(self, keys: int) -> int:
        """dk and dv in float32."""
        return 2 * keys * self.kv_heads * self._dim * 4

    def _transposed(self, num_keys: int) -> int:
        """Lists by key block, each as long as the longest: at most all tiles of a sequence."""
        p = self.problem
        rows = self.heads * -(-num_keys // 64)
        if rows * p.tiles * 4 <= BOUNDED_BYTES:
            return rows * p.tiles * 4
        return rows * num_query_tiles(p.longest, p.config) * 4


class _TokenChunk(_Chunk):
    """The same in token mode, where nothing is aligned to tiles."""

    def __init__(self, problem: Problem, kv_heads: int):
        super().__init__(problem, kv_heads)
        self.rows, self.query_rows, self.key_rows = self.tokens, self.query, self.key
        self.query_copy = self.key_copy = 0

    @property
    def selected(self) -> int:
        """Indices of blocks."""
        return self._pairs * 4

    @property
    def forward(self) -> int:
        """Peak of a forward beside the branches."""
        attend_cmp = self._compressed_copies(queries=2)
        # The scores of a step and the log-sum-exp in order.
        select = self._scores * 4 + self.tokens * self.heads * 4
        return 2 * self.key_cmp + self.selected + max(attend_cmp, select, self._pair_results)

    @property
    def backward(self) -> int:
        """As of tiles; the selected branch has an inverted index and accumulates in float32."""
        grads = self.query + 2 * self.key
        logits = self.tokens * self.heads * 3 * 4
        window = 3 * self.query + grads + self._accumulators(self.tokens, self.tokens)
        sums = self.tokens * (self.heads * (self._dim + 2) + 2 * self.kv_heads * self._dim) * 4
        selected = 2 * self.query + 2 * grads + 3 * self.selected + sums
        compressed = self.query + 2 * grads + 2 * self.key_cmp
        compressed += self._compressed_backward(queries=4)
        return logits + max(window, selected, compressed)

    @property
    def _pairs(self) -> int:
        return self.tokens * self.kv_heads * self.problem.config.num_selected_blocks

    @property
    def _scores(self) -> int:
        p = self.problem
        width = num_selection_blocks(p.longest, p.config)
        chunk, _ = chunk_tokens(p.batch, p.length, self.heads, self.kv_heads, self._dim, width)
        return p.batch * self.kv_heads * chunk * width

    @property
    def _pair_results(self) -> int:
        """The inverted index, and the partial results of a wave."""
        p, group = self.problem, self.heads // self.kv_heads
        slots, blocks = p.config.num_selected_blocks, num_selection_blocks(self.tokens, p.config)
        chunk = choose_chunk_tokens(self.tokens, group, blocks, slots, 2 * self._dim)
        of_token = slots * group * (self._dim * p.itemsize + 4)
        # At least a unit; the last chunk is not shorter than the others.
        wave = max(WORKSPACE_BYTES, chunk * of_token)
        results = min(wave, self.kv_heads * (self.tokens + chunk) * of_token)
        return 3 * self._pairs * 4 + results


def _free_bytes(device: torch.device) -> int:
    """Free device memory, with what the caching allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
