"""The sizes of a call, from which the shapes of results and the memory of stages follow.

The lengths of packed sequences are not read, so sizes that depend on them are upper bounds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.blocks import most_query_tiles, num_compressed_blocks, num_query_tiles
from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused.compressed_forms import (
    CompressedForm,
    compressed_form,
    num_compressed_bound,
    num_folded_rows,
    results_in_order,
    skips_key_tiles,
    sums_queries,
)

_BRANCHES = ("cmp", "slc", "win")


class Sizes(NamedTuple):
    """Sizes of a call, or of a chunk of its KV heads.

    Attributes:
        batch: entries of the batch; 1 for packed sequences.
        length: queries of an entry.
        keys: keys of an entry.
        sequences: number of packed sequences; None for a batch.
        key_bounds: whether packed keys have boundaries of their own.
        longest: upper bound on the keys of a sequence.
        num_heads, num_kv_heads: query heads and KV heads.
        head_dim: the kernels' head dimension.
        itemsize: bytes of an element of ``q``.
        config: block sizes and counts.
        gated_gradients: see :func:`nsa.fused.kernel_inputs.multiplies_gates`.
        deterministic: whether gradients are added in a fixed order.
    """

    batch: int
    length: int
    keys: int
    sequences: int | None
    key_bounds: bool
    longest: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    config: NSAConfig
    gated_gradients: bool = False
    deterministic: bool = False

    def of_heads(self, num_kv_heads: int) -> "Sizes":
        """The sizes with ``num_kv_heads`` KV heads and their query heads."""
        return self._replace(num_kv_heads=num_kv_heads, num_heads=num_kv_heads * self.group)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def packed(self) -> bool:
        return self.sequences is not None

    @property
    def whole(self) -> bool:
        """As :attr:`nsa.fused.plan.Plan.whole`."""
        # While torch.compile traces, only packed sequences may ask: it would guard the lengths.
        return not self.key_bounds if self.packed else self.keys == self.length

    @property
    def ends_align(self) -> bool:
        """As :attr:`nsa.fused.plan.Plan.ends_align`."""
        return self.whole or (self.batch == 1 and not self.packed)

    @property
    def token_mode(self) -> bool:
        return self.config.selection == "token"

    @property
    def in_order(self) -> bool:
        """As :attr:`nsa.fused.plan.Plan.in_order`."""
        return results_in_order(self.config, self.packed)

    @property
    def tokens(self) -> int:
        """Queries of all entries."""
        return self.batch * self.length

    @property
    def tiles(self) -> int:
        """Query tiles of an entry."""
        if self.sequences is not None:
            return most_query_tiles(self.length, self.sequences, self.config)
        return num_query_tiles(self.length, self.config)

    @property
    def units(self) -> int:
        """Units of an entry: its tokens or its query tiles."""
        return self.length if self.token_mode else self.tiles

    @property
    def rows(self) -> int:
        """Rows of queries of all entries, aligned to tiles in tile mode."""
        tile_size = 1 if self.token_mode else self.config.q_tile_size
        return self.batch * self.units * tile_size

    @property
    def key_rows(self) -> int:
        """Rows of keys of all entries, aligned to tiles in tile mode."""
        if self.token_mode:
            return self.batch * self.keys
        if self.sequences is not None:
            tiles = most_query_tiles(self.keys, self.sequences, self.config)
        else:
            tiles = num_query_tiles(self.keys, self.config)
        return self.batch * tiles * self.config.q_tile_size

    @property
    def compressed(self) -> int:
        """Compressed tokens of all entries, as if each entry were one sequence."""
        return self.batch * num_compressed_blocks(self.keys, self.config)

    @property
    def form(self) -> CompressedForm:
        """How the compressed branch is computed."""
        bound = num_compressed_bound(self.keys, self.packed, self.config)
        return compressed_form(self.config, packed=self.packed, num_compressed=bound)

    @property
    def skips_key_tiles(self) -> bool:
        """As :attr:`nsa.fused.plan.Plan.skips_key_tiles`.

        While torch.compile traces, packed sequences count as long ones, which take more memory: it
        would guard their lengths.
        """
        if self.packed and torch.compiler.is_compiling():
            return self.form is CompressedForm.PACKED
        keys, longest = self.compressed // self.batch, min(self.longest, self.keys)
        return skips_key_tiles(self.form, keys, self.config, whole=self.whole, longest=longest)

    @property
    def sums_queries(self) -> bool:
        """As :meth:`nsa.fused.plan.Plan.sums_queries`."""
        keys = self.compressed // self.batch
        return sums_queries(self.form, keys, self.batch, self.num_heads, self.group)

    # Shapes of results.

    def saved_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the results of :meth:`nsa.fused.call_tensors.Saved.tensors` that are not None.

        Log-sum-exps, and in packed tile mode outputs, are in the layout of the kernels, see
        :meth:`nsa.fused.plan.Plan.statistics_placements` and
        :meth:`nsa.fused.plan.Plan.query_placements`.
        """
        selecting = self.num_kv_heads if self.token_mode else self.num_heads
        indices = (self.batch, self.units, selecting)
        o_cmp, lse_cmp = self._compressed_shapes()
        o_slc, lse_slc = self._selected_shapes()
        shapes = dict(
            o_cmp=o_cmp,
            lse_cmp=lse_cmp,
            o_slc=o_slc,
            lse_slc=lse_slc,
            o_win=self._in_order,
            lse_win=self._lse_in_order,
            k_cmp=self._compressed_keys,
            v_cmp=self._compressed_keys,
            block_indices=(*indices, self.config.num_selected_blocks),
        )
        if self.config.num_cmp_selected_blocks is not None:
            shapes["groups"] = (*indices, self.config.num_cmp_selected_blocks)
        return shapes

    @property
    def _compressed_keys(self) -> tuple[int, ...]:
        rows = num_compressed_bound(self.keys, self.packed, self.config)
        return self.batch, rows, self.num_kv_heads, self.head_dim

    @property
    def _in_order(self) -> tuple[int, ...]:
        return self.batch, self.length, self.num_heads, self.head_dim

    @property
    def _lse_in_order(self) -> tuple[int, ...]:
        return self.num_heads, self.batch * self.length

    def _compressed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the output and log-sum-exp of the compressed branch."""
        out = self._in_order
        if self.form is CompressedForm.NONE:
            return out, (0,)
        if self.form is CompressedForm.LISTED:
            return self._selected_shapes()
        if self.form is CompressedForm.PACKED and not self.in_order:
            assert self.sequences is not None  # as of all packed input
            rows = num_folded_rows(self.length, self.sequences, self.config, whole=self.whole)
            heads = self.num_heads * self.config.compress_stride
            return (1, rows, heads, self.head_dim), (rows, heads)
        return out, self._lse_in_order

    def _selected_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the output and log-sum-exp of the selected branch."""
        if self.token_mode:
            return self._in_order, (self.tokens, self.num_heads)
        rows = (1, self.rows, self.num_heads, self.head_dim)
        return self._in_order if self.in_order else rows, (1, self.num_heads, self.rows)

    # Bytes of tensors.

    @property
    def query(self) -> int:
        """Bytes of a tensor of queries."""
        return self.tokens * self.num_heads * self.head_dim * self.itemsize

    @property
    def query_rows(self) -> int:
        """Bytes of a tensor of queries in :attr:`rows`."""
        return self.rows * self.num_heads * self.head_dim * self.itemsize

    @property
    def query_folded(self) -> int:
        """Bytes of a tensor of packed queries in folded rows."""
        assert self.sequences is not None
        rows = num_folded_rows(self.length, self.sequences, self.config, whole=self.whole)
        heads = self.num_heads * self.config.compress_stride
        return rows * heads * self.head_dim * self.itemsize

    def key_bytes(self, rows: int) -> int:
        """Bytes of ``rows`` rows of keys."""
        return rows * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def key(self) -> int:
        """Bytes of a tensor of keys."""
        return self.key_bytes(self.batch * self.keys)

    @property
    def key_cmp(self) -> int:
        """Bytes of a tensor of compressed keys."""
        return self.key_bytes(self.compressed)

    @property
    def query_copy(self) -> int:
        """Bytes of a copy of queries in rows; 0 if the rows are a view."""
        return self.query_rows if self._copies else 0

    @property
    def key_copy(self) -> int:
        """Bytes of a copy of keys in rows; 0 if the rows are a view."""
        return self.key_bytes(self.key_rows) if self._copies else 0

    @property
    def _copies(self) -> bool:
        """Whether rows are a copy of the tokens, not a view."""
        # Queries start at a tile, so those of keys end where those of queries do.
        if self.token_mode:
            return False
        return self.packed or self.length % self.config.q_tile_size != 0

    def outputs(self) -> tuple[int, ...]:
        """Bytes of the outputs of the compressed, selected and window branch."""
        shapes = self.saved_shapes()
        return tuple(_numel(shapes[f"o_{branch}"]) * self.itemsize for branch in _BRANCHES)

    @property
    def lses(self) -> int:
        """Bytes of the log-sum-exps of the three branches."""
        shapes = self.saved_shapes()
        return sum(_numel(shapes[f"lse_{branch}"]) * 4 for branch in _BRANCHES)

    @property
    def branch_outputs(self) -> int:
        """Bytes of the outputs and log-sum-exps of the three branches."""
        return sum(self.outputs()) + self.lses

    @property
    def indices(self) -> int:
        """Bytes of the indices of blocks and groups."""
        shapes = self.saved_shapes()
        return 4 * sum(_numel(shapes[x]) for x in ("block_indices", "groups") if x in shapes)


def make_sizes(
    q: Tensor,
    config: NSAConfig,
    boundaries: Boundaries | None,
    *,
    num_keys: int,
    num_kv_heads: int,
    gated_gradients: bool = False,
    deterministic: bool = False,
) -> Sizes:
    """Sizes of a call, whose arguments are those of :func:`nsa.fused.planning.make_plan`.

    The last two matter for memory alone, and are attributes of :class:`Sizes`.
    """
    batch, length, num_heads, head_dim = q.shape
    sequences, key_bounds, longest = None, False, num_keys
    if boundaries is not None:
        sequences = boundaries.cu_seqlens.shape[0] - 1
        key_bounds = boundaries.cu_seqlens_k is not boundaries.cu_seqlens
        if boundaries.max_seqlen_k is not None:
            longest = boundaries.max_seqlen_k
    return Sizes(
        batch=batch,
        length=length,
        keys=num_keys,
        sequences=sequences,
        key_bounds=key_bounds,
        longest=longest,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        itemsize=q.element_size(),
        config=config,
        gated_gradients=gated_gradients,
        deterministic=deterministic,
    )


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
