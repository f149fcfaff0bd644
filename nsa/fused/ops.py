"""The fused forward and backward as torch.library custom ops, so that torch.compile can trace them.

Inside an op the code is opaque to tracing; the fake implementations give the shapes. Optional
tensors that an op returns, or takes in a list, are empty where there is none, because there an op
has tensors only.
"""

from functools import lru_cache

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import pipeline
from nsa.fused.call import Call, with_scale
from nsa.fused.compressed_forms import (
    CompressedForm,
    compressed_form,
    num_compressed_bound,
    num_folded_rows,
)
from nsa.fused.memory import fewest_chunks
from nsa.fused.pipeline import Inputs, Saved
from nsa.fused.plan import (
    Plan,
    make_plan,
    num_tiles_bound,
    num_units_bound,
)
from nsa.fused.schedule import split_heads
from nsa.packing import find_packing
from nsa.validation import UnsupportedError


@lru_cache(maxsize=64)
def _config(encoded: str, scale: float) -> NSAConfig:
    return with_scale(NSAConfig.decode(encoded), scale)


@torch.library.custom_op("nsa::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slc: Tensor | None,
    v_slc: Tensor | None,
    k_win: Tensor | None,
    v_win: Tensor | None,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    block_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    owned: bool,
    config: str,
    scale: float,
    chunks: int,
    save: bool,
    recompute: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output ``(B, T, H, Dv)`` and, where ``save``, a :class:`Saved` of each chunk, one by one.

    KV heads are run in ``chunks``, see :mod:`nsa.fused.schedule`. Selected blocks are returned only
    where the caller gave none, and with ``recompute`` nothing but what was selected. Last comes a
    copy of ``cu_seqlens``, which the caller may change before the backward, unless they are
    ``owned`` by a Packing.
    """
    inputs = Inputs(
        q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
        compress_k_weight, compress_v_weight, k_cmp, v_cmp,
    )  # fmt: skip
    plan = _plan(q, cu_seqlens, max_seqlen, _config(config, scale))
    _check_pairs(q, k, plan.config, chunks)
    out, saved = Call(block_indices, plan, chunks, recompute).forward(inputs, save)
    saved = [q.new_empty(0) if x is None else x for part in saved for x in part]
    if save and cu_seqlens is not None and not owned:
        saved.append(cu_seqlens.clone())
    return out, saved


def _check_pairs(q: Tensor, k: Tensor, config: NSAConfig, chunks: int):
    """Raise where the kernels cannot count the pairs of a chunk, which tracing left open."""
    fewest = fewest_chunks(q.shape[0] * q.shape[1], k.shape[2], config)
    if chunks < fewest:
        raise UnsupportedError(
            f"backend='fused' needs KV heads in {fewest} chunks for so many tokens and selected "
            f"blocks, got {chunks}: torch.compile cannot choose that; set max_workspace_bytes, or "
            "split the batch"
        )


def _plan(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, config: NSAConfig) -> Plan:
    packing = None if cu_seqlens is None else find_packing(cu_seqlens)
    return make_plan(q, cu_seqlens, max_seqlen, config, packing)


@attention.register_fake
def _(q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight, compress_k_weight,
      compress_v_weight, k_cmp, v_cmp, block_indices, cu_seqlens, max_seqlen, owned, config,
      scale, chunks, save, recompute):  # fmt: skip
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if not save:
        return out, []
    config = _config(config, scale)
    select = block_indices is None
    saved = []
    for heads in split_heads(q.shape[2], k.shape[2], chunks):
        part, lists = out[:, :, heads.query], heads.query
        if config.selection == "token":
            lists = heads.kv
        num_lists = lists.stop - lists.start
        saved += _fake_saved(part, num_lists, cu_seqlens, config, select, recompute)
    if cu_seqlens is not None and not owned:
        saved.append(torch.empty_like(cu_seqlens))
    return out, saved


def _fake_saved(
    out: Tensor,
    num_lists: int,
    cu_seqlens: Tensor | None,
    config: NSAConfig,
    select: bool,
    recompute: bool,
) -> list[Tensor]:
    """:class:`Saved` of a chunk with output ``out``, whose units select ``num_lists`` times."""
    batch, length = out.shape[:2]
    tensors = {}
    if not recompute:
        shapes = _out_shapes(out, cu_seqlens, config)
        lse_shapes = _lse_shapes(out, cu_seqlens, config)
        for branch, shape, lse in zip(("cmp", "slc", "win"), shapes, lse_shapes, strict=True):
            tensors[f"o_{branch}"] = out.new_empty(shape)
            tensors[f"lse_{branch}"] = out.new_empty(lse, dtype=torch.float32)
    units = num_units_bound(length, cu_seqlens, config)
    counts = {
        "block_indices": config.num_selected_blocks if select else None,
        "groups": config.num_cmp_selected_blocks,
    }
    for name, count in counts.items():
        if count is not None:
            tensors[name] = out.new_empty(batch, units, num_lists, count, dtype=torch.int32)
    # An op's outputs share no memory, not even if they are empty.
    return [tensors[name] if name in tensors else out.new_empty(0) for name in Saved._fields]


def _form(length: int, cu_seqlens: Tensor | None, config: NSAConfig) -> CompressedForm:
    packed = cu_seqlens is not None
    bound = num_compressed_bound(length, packed, config)
    return compressed_form(config, packed=packed, num_compressed=bound)


def _out_shapes(q: Tensor, cu_seqlens: Tensor | None, config: NSAConfig) -> list[tuple]:
    """Shapes of the output of each branch, see :func:`nsa.fused.attention.query_placements`."""
    length, num_heads, dim = q.shape[1:]
    in_order = tuple(q.shape)
    if cu_seqlens is None or config.selection == "token":
        return [in_order] * 3
    rows = num_tiles_bound(length, cu_seqlens, config) * config.q_tile_size
    in_rows, out_cmp = (1, rows, num_heads, dim), in_order
    form = _form(length, cu_seqlens, config)
    if form is CompressedForm.LISTED:
        out_cmp = in_rows
    elif form is CompressedForm.FOLDED_ROWS:
        folded = num_folded_rows(length, cu_seqlens.shape[0] - 1, config)
        out_cmp = (1, folded, num_heads * config.compress_stride, dim)
    return [out_cmp, in_rows, in_order]


def _lse_shapes(q: Tensor, cu_seqlens: Tensor | None, config: NSAConfig) -> list[tuple]:
    """Shapes of the log-sum-exp of each branch, in the layouts of :mod:`nsa.fused.attention`."""
    batch, length, num_heads = q.shape[:3]
    leading = (batch,) if cu_seqlens is None else ()
    lse_cmp = in_order = (*leading, num_heads, length)
    if config.selection == "token":
        lse_slc = (batch * length, num_heads)
    else:
        rows = num_units_bound(length, cu_seqlens, config) * config.q_tile_size
        lse_slc = (1, num_heads, batch * rows)
    form = _form(length, cu_seqlens, config)
    if form is CompressedForm.NONE:
        lse_cmp = (0,)
    elif form is CompressedForm.LISTED:
        lse_cmp = lse_slc
    elif form is CompressedForm.FOLDED_ROWS:
        folded = num_folded_rows(length, cu_seqlens.shape[0] - 1, config)
        lse_cmp = (num_heads * config.compress_stride, folded)
    return [lse_cmp, lse_slc, in_order]


@torch.library.custom_op("nsa::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_slc: Tensor | None,
    v_slc: Tensor | None,
    k_win: Tensor | None,
    v_win: Tensor | None,
    gates: Tensor | None,
    gate_proj_weight: Tensor | None,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    block_indices: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    config: str,
    scale: float,
    chunks: int,
    recompute: bool,
    saved: list[Tensor],
) -> list[Tensor]:
    """Gradients of the first thirteen arguments of :func:`attention`, empty where None."""
    inputs = Inputs(
        q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
        compress_k_weight, compress_v_weight, k_cmp, v_cmp,
    )  # fmt: skip
    parts = [_without_empty(part) for part in Saved.of_chunks(saved)]
    plan = _plan(q, cu_seqlens, max_seqlen, _config(config, scale))
    grads = Call(block_indices, plan, chunks, recompute).backward(dout, inputs, parts)
    return [q.new_empty(0) if grad is None else grad for grad in grads]


def _without_empty(saved: Saved) -> Saved:
    blocks, groups = (x if x.numel() else None for x in (saved.block_indices, saved.groups))
    return saved._replace(block_indices=blocks, groups=groups)


@attention_backward.register_fake
def _(dout, q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight, compress_k_weight,
      compress_v_weight, k_cmp, v_cmp, *_):  # fmt: skip
    inputs = (q, k, v, k_slc, v_slc, k_win, v_win, gates, gate_proj_weight,
              compress_k_weight, compress_v_weight, k_cmp, v_cmp)  # fmt: skip
    # Gradients are contiguous whatever the strides of the inputs.
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


@torch.library.custom_op("nsa::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor,
    k: Tensor | None,
    compress_k_weight: Tensor | None,
    k_cmp: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    config: str,
    scale: float,
) -> Tensor:
    """See :func:`nsa.fused.pipeline.select_blocks`."""
    plan = _plan(q, cu_seqlens, max_seqlen, _config(config, scale))
    return pipeline.select_blocks(q, k, compress_k_weight, k_cmp, plan)


@select_blocks.register_fake
def _(q, k, compress_k_weight, k_cmp, cu_seqlens, max_seqlen, config, scale):
    config = _config(config, scale)
    units = num_units_bound(q.shape[1], cu_seqlens, config)
    keys = k if k_cmp is None else k_cmp
    lists = keys.shape[2] if config.selection == "token" else q.shape[2]
    return q.new_empty(q.shape[0], units, lists, config.num_selected_blocks, dtype=torch.int32)
