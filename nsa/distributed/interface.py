"""The public functions of :mod:`nsa.distributed`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nsa import dispatch
from nsa.blocks import num_query_tiles
from nsa.config import NSAConfig
from nsa.distributed.block_sharing import Pair, compress_own, gather_blocks
from nsa.distributed.call import NO_LIMIT, RankCall, RankInputs
from nsa.distributed.chunked_attention import RankAttentionNode, attend
from nsa.distributed.collectives import process_group
from nsa.distributed.order import check_order
from nsa.distributed.rank_checks import Part, check_call, check_equal_tokens, distinct, flat
from nsa.distributed.sharding import Mesh
from nsa.host import needs_gradients
from nsa.packing import Packing
from nsa.validation import check_deterministic


@torch.compiler.disable(reason="nsa.distributed compares the arguments of ranks on the host")
def forward(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    v: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    mesh: Mesh,
    order: str = "head-tail",
    config: NSAConfig | None = None,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    max_seqlen: int | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`nsa.forward` of sequences that the ranks of ``mesh`` hold parts of.

    Each rank gives its part of the tokens, as :func:`shard` cuts them, and gets the output of
    those. Results and gradients are those of :func:`nsa.forward` over the whole. The gradients of
    ``q``, ``k``, ``v``, ``gates`` and ``compressed_kv`` are complete. Those of the weights are this
    rank's part; their sum over the ranks is the whole's, as data parallelism expects.

    Every rank of the mesh must call it, also in backward: a rank whose loss does not need the
    output adds ``0 * out.sum()``. Differentiable once. Under torch.compile it is a graph break.

    Keys and values are gathered a few KV heads at a time, and again in backward. Gradients of keys,
    values and compressed blocks are summed over the ranks in float32. Those of keys and values are
    sent in the dtype of these, so each rank's part is rounded once more.

    Args:
        q, k, v: this rank's tokens, ``N / P`` of ``N``: ``(B, N / P, H, D)`` and so on, or packed
            ``(N / P, H, D)`` with ``cu_seqlens``; as in :func:`nsa.forward`.
        mesh: a DeviceMesh of one dimension, or a ProcessGroup: the ``P`` ranks that hold a
            sequence, in rank order. Any number of them, also more than KV heads.
        order: how the sequence dimension is cut. ``"contiguous"``: rank ``r`` holds part ``r`` of
            ``P``. ``"head-tail"``: it holds pieces ``r`` and ``2P - 1 - r`` of ``2P``, which
            balances causal attention. ``"head-tail-each"``: it holds these pieces of every packed
            sequence, which balances packs; each length is a multiple of ``2P``. In tile mode a
            piece starts at a multiple of ``q_tile_size`` in its sequence.
        gates: of own tokens.
        compressed_kv: of the blocks whose last token this rank holds, in the order of its tokens:
            ``(B, blocks, H_kv, D)`` and ``(B, blocks, H_kv, Dv)``, or ``(blocks, H_kv, ...)``.
        block_indices: of own tokens, or of the tiles of own tokens, in their order; blocks are
            numbered in their sequence.
        cu_seqlens: boundaries of the whole, from 0 to ``N``; equal on all ranks. A sequence may lie
            on several ranks. The host reads them, those of an :class:`nsa.Packing` once.
        config, gate_proj_weight, compress_k_weight, compress_v_weight, max_seqlen: as in
            :func:`nsa.forward`, and equal on all ranks.
        max_workspace_bytes: as in :func:`nsa.forward`, but of each few KV heads whose keys are
            gathered together, and by default without limit: free memory, which may differ from rank
            to rank, is never asked for.
        recompute_window, backend: as in :func:`nsa.forward`.
        deterministic: as in :func:`nsa.forward`. Gradients of keys and values are added in the
            order of the ranks, those of compressed blocks as NCCL adds them, in a fixed order on
            the same ranks.

    Returns:
        The output of own tokens, in the form of ``q``.

    Raises:
        TypeError, ValueError: an argument is wrong, or ranks differ in shapes, dtypes, settings or
            which arguments they give. It is raised on all ranks, with the values by rank.
        UnsupportedError: ``backend="fused"`` cannot do this.
    """
    group = process_group(mesh)
    arguments: dict[str, Any] = dict(
        config=config, gate_proj_weight=gate_proj_weight, gates=gates,
        compress_k_weight=compress_k_weight, compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv, block_indices=block_indices, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, max_workspace_bytes=max_workspace_bytes,
        recompute_window=recompute_window, deterministic=deterministic, backend=backend,
    )  # fmt: skip
    if group.size() == 1:
        check_order(order)
        check_equal_tokens(q, k)
        return dispatch.forward(q, k, v, **arguments)
    return attend_part(mesh, order, dict(q=q, k=k, v=v, **arguments))


@torch.compiler.disable(reason="nsa.distributed compares the arguments of ranks on the host")
@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    mesh: Mesh,
    order: str = "head-tail",
    config: NSAConfig | None = None,
    compress_k_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | Packing | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that :func:`forward` selects for own queries, as its ``block_indices``.

    Arguments and errors are those of :func:`forward`; results are in the form of
    :func:`nsa.select_blocks`.
    """
    group = process_group(mesh)
    arguments: dict[str, Any] = dict(
        config=config, compress_k_weight=compress_k_weight, compressed_kv=compressed_kv,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, backend=backend,
    )  # fmt: skip
    if group.size() == 1:
        check_order(order)
        check_equal_tokens(q, k)
        return dispatch.select_blocks(q, k, **arguments)
    return select_part(mesh, order, dict(q=q, k=k, **arguments))


Compressor = Callable[[Part, ProcessGroup], Pair]
"""Gives compressed keys and values of the blocks that own tokens complete."""


@torch.compiler.disable(reason="nsa.distributed compares the arguments of ranks on the host")
def attend_part(
    mesh: Mesh,
    order: str,
    arguments: dict[str, Any],
    compress: Compressor | None = None,
    problem: Exception | None = None,
) -> Tensor:
    """:func:`forward` of several ranks.

    Args:
        arguments: those of :func:`forward` by name.
        compress: computes blocks that are not given; by default their means.
        problem: what is wrong on this rank already.
    """
    part = check_call("forward", mesh, order, arguments, problem, learned=compress is not None)
    group = process_group(mesh)
    assert part.v is not None
    own, again = _own_blocks(part, compress, group)
    k_cmp, v_cmp = gather_blocks(own, part.layout, group)
    kv, branches = distinct(part.k, part.v)
    shared = branches == (0, 0, 1, 1) and part.k[0] is part.k[1] and part.v[0] is part.v[1]
    if shared and again is not None:
        kv = again
    gates = None if part.gates is None else flat(part.gates)
    inputs = RankInputs(flat(part.q), gates, part.gate_proj_weight, k_cmp, v_cmp, kv)
    call = RankCall(
        part.layout, group, part.backend, part.config, branches,
        max_workspace_bytes=arguments.get("max_workspace_bytes") or NO_LIMIT,
        recompute_window=arguments.get("recompute_window", False),
        deterministic=check_deterministic(arguments.get("deterministic")),
        heads_apart=kv is again,
    )  # fmt: skip
    tensors, block_indices = (*inputs.tensors, *inputs.kv), _flat_indices(part)
    if needs_gradients(*tensors):
        out = RankAttentionNode.apply(call, block_indices, *tensors)
    else:
        out = attend(call, block_indices, inputs)
    return out.reshape(*part.q.shape[:-1], out.shape[-1])


@torch.compiler.disable(reason="nsa.distributed compares the arguments of ranks on the host")
@torch.no_grad()
def select_part(
    mesh: Mesh,
    order: str,
    arguments: dict[str, Any],
    compress: Compressor | None = None,
    problem: Exception | None = None,
) -> Tensor:
    """:func:`select_blocks` of several ranks. Arguments as in :func:`attend_part`."""
    part = check_call(
        "select_blocks", mesh, order, arguments, problem, learned=compress is not None
    )
    group = process_group(mesh)
    layout = part.layout
    (own, _), _ = _own_blocks(part, compress, group)
    (k_cmp,) = gather_blocks((own,), layout, group)
    extra = {} if layout.segments is None else {"segments": layout.segments}
    blocks = part.backend.select_blocks(
        flat(part.q),
        # Only the shape of the keys is read.
        part.q.new_empty(()).expand(layout.num_keys, *part.k[0].shape[-2:]),
        config=part.config,
        compressed_kv=(k_cmp, k_cmp),
        boundaries=layout.boundaries,
        **extra,
    )
    if part.q.ndim == 3:
        return blocks
    if layout.token_mode:
        return blocks.unflatten(0, part.q.shape[:2])
    batch, tokens = part.q.shape[:2]
    # Pieces start at tiles, so a rank holds whole ones.
    shape = (batch, num_query_tiles(tokens, part.config))
    return blocks.unflatten(1, shape).transpose(0, 1).contiguous()


def _own_blocks(
    part: Part, compress: Compressor | None, group: ProcessGroup
) -> tuple[Pair, Pair | None]:
    """As :func:`compress_own`, of blocks that are given or not."""
    if part.compressed_kv is not None:
        k_cmp, v_cmp = map(flat, part.compressed_kv)
        return (k_cmp, v_cmp), None
    if compress is not None:
        return compress(part, group), None
    # Selection has no values, so keys take their place.
    values = part.k[0] if part.v is None else part.v[0]
    weights = (part.compress_k_weight, None if part.v is None else part.compress_v_weight)
    return compress_own(flat(part.k[0]), flat(values), weights, part.layout, part.backend, group)


def _flat_indices(part: Part) -> Tensor | None:
    """``block_indices`` as ``(T, H_kv, n)`` or ``(H, tiles, n)``."""
    indices = part.block_indices
    if indices is None:
        return None
    if indices.ndim == 4:
        indices = (
            indices.flatten(0, 1)
            if part.layout.token_mode
            else indices.transpose(0, 1).flatten(1, 2)
        )
    return part.layout.within_keys(indices)
