"""The stages of Native Sparse Attention: compress, select, attend in three branches, gate."""

import torch
from torch import Tensor

from nsa.blocks import num_query_tiles
from nsa.boundaries import Boundaries
from nsa.cache import Cache
from nsa.cache.append import flat_branches
from nsa.cache.context import locate_in_cache
from nsa.config import NSAConfig
from nsa.geometry import Geometry
from nsa.precision import without_autocast
from nsa.reference.attention import compressed_attention, selected_attention, window_attention
from nsa.reference.cached import attend_cached, select_cached
from nsa.reference.compression import compress
from nsa.reference.determinism import check_deterministic_device
from nsa.reference.gating import combine_branches
from nsa.reference.selection import select_blocks as _select_blocks
from nsa.reference.selection import select_groups
from nsa.results import Results
from nsa.segments import QuerySegments, Segments

Branches = tuple[Tensor, Tensor, Tensor]


@torch.compiler.disable(reason="nsa's reference reads lengths on the host")
def forward(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    config: NSAConfig,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    segments: QuerySegments | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool = False,
    results: Results | None = None,
) -> Tensor:
    """See :func:`nsa.forward`. Arguments are checked; ``k`` and ``v`` hold a tensor per branch.

    ``segments`` says where queries stand that are not the last ones of their sequences.
    """
    check_deterministic_device(deterministic, q)
    if results is not None:
        results.may_read_keys()
    with without_autocast(q.device):
        out = attend(
            _flatten(q),
            flat_branches(k),
            flat_branches(v),
            _geometry(q, k[0], boundaries, segments, config),
            gate_proj_weight=gate_proj_weight,
            gates=None if gates is None else _flatten(gates),
            compress_weights=(compress_k_weight, compress_v_weight),
            compressed_kv=compressed_kv,
            indices=None if block_indices is None else _flatten_indices(block_indices, config),
        )
        return out.reshape(*q.shape[:-1], out.shape[-1])


@torch.compiler.disable(reason="nsa's reference reads lengths on the host")
def forward_cached(
    q: Tensor,
    k: Branches,
    v: Branches,
    *,
    cache: Cache,
    config: NSAConfig,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_k_weight: Tensor | None = None,
    compress_v_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    boundaries: Boundaries | None = None,
    max_workspace_bytes: int | None = None,
    recompute_window: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """:func:`forward` with a cache, whose configuration is ``config``. There are no gradients."""
    check_deterministic_device(deterministic, q)
    with without_autocast(q.device):
        out = attend_cached(
            _flatten(q),
            flat_branches(k),
            flat_branches(v),
            cache,
            locate_in_cache(cache, q, boundaries, compressed_kv),
            gate_proj_weight=gate_proj_weight,
            gates=None if gates is None else _flatten(gates),
            compress_weights=(compress_k_weight, compress_v_weight),
            compressed_kv=_flatten_pair(compressed_kv),
            block_indices=block_indices,
        )
        return out.reshape(*q.shape[:-1], out.shape[-1])


def make_key_sums(*_, **__) -> None:
    """As in the fused backend. Here autograd adds gradients up."""


def attend(
    q: Tensor,
    k: Branches,
    v: Branches,
    geometry: Geometry,
    *,
    gate_proj_weight: Tensor | None = None,
    gates: Tensor | None = None,
    compress_weights: tuple[Tensor | None, Tensor | None] = (None, None),
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """All stages, for flat tensors and queries at any positions.

    Args:
        q: ``(T, H, D)``.
        k, v: a tensor per branch, ``(Tk, H_kv, D)`` and ``(Tk, H_kv, Dv)``.
        geometry: where the ``T`` queries and the ``Tk`` keys lie.
        gate_proj_weight: ``(H, 3, D)``.
        gates: ``(T, H, 3)``.
        compress_weights: ``(H_kv, D, D)`` for keys and ``(H_kv, Dv, Dv)`` for values.
        compressed_kv: ``(sum of N_cmp, H_kv, D)`` and ``(sum of N_cmp, H_kv, Dv)``, batched or not.
        indices: blocks to attend, ``(T, H_kv, n)`` or ``(tiles, H, n)``.

    Returns:
        ``(T, H, Dv)``.
    """
    (k_cmp_in, k_slc, k_win), (v_cmp_in, v_slc, v_win) = k, v
    if compressed_kv is None:
        k_cmp = compress(k_cmp_in, compress_weights[0], geometry)
        v_cmp = compress(v_cmp_in, compress_weights[1], geometry)
    else:
        k_cmp, v_cmp = (_given_compressed(x, geometry) for x in compressed_kv)
    if indices is None:
        indices = _select_blocks(q, k_cmp, geometry)
    sparse = geometry.config.num_cmp_selected_blocks is not None
    groups = select_groups(q, k_cmp, geometry) if sparse else None
    o_slc, _ = selected_attention(q, k_slc, v_slc, indices, geometry)
    branches = (
        compressed_attention(q, k_cmp, v_cmp, groups, geometry),
        o_slc,
        window_attention(q, k_win, v_win, geometry),
    )
    return combine_branches(branches, q, gates, gate_proj_weight)


@torch.compiler.disable(reason="nsa's reference reads lengths on the host")
@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    config: NSAConfig,
    compress_k_weight: Tensor | None = None,
    compressed_kv: tuple[Tensor, Tensor] | None = None,
    boundaries: Boundaries | None = None,
    cache: Cache | None = None,
    segments: QuerySegments | None = None,
) -> Tensor:
    """See :func:`nsa.select_blocks`. Arguments are checked; ``k`` is the compressed branch's."""
    with without_autocast(q.device):
        if cache is not None:
            tokens = locate_in_cache(cache, q, boundaries, compressed_kv)
            pair = _flatten_pair(compressed_kv)
            return select_cached(q, _flatten(k), cache, tokens, compress_k_weight, pair)
        geometry = _geometry(q, k, boundaries, segments, config)
        if compressed_kv is None:
            k_cmp = compress(_flatten(k), compress_k_weight, geometry)
        else:
            k_cmp = _given_compressed(compressed_kv[0], geometry)
        indices = _select_blocks(_flatten(q), k_cmp, geometry)
        return _unflatten_indices(indices, q, config)


def compress_blocks(
    k: Tensor,
    v: Tensor,
    *,
    config: NSAConfig,
    compress_k_weight: Tensor | None,
    compress_v_weight: Tensor | None,
    boundaries: Boundaries,
) -> tuple[tuple[Tensor, Tensor], None]:
    """The compressed keys and values of packed ``k (T, H_kv, D)`` and ``v (T, H_kv, Dv)``.

    None, because autograd adds gradients up.
    """
    with without_autocast(k.device):
        geometry = _geometry(k, k, boundaries, None, config)
        pairs = ((k, compress_k_weight), (v, compress_v_weight))
        k_cmp, v_cmp = (compress(x, weight, geometry) for x, weight in pairs)
        return (k_cmp, v_cmp), None


def _geometry(
    q: Tensor,
    k: Tensor,
    boundaries: Boundaries | None,
    segments: QuerySegments | None,
    config: NSAConfig,
) -> Geometry:
    if boundaries is None:
        return Geometry.of(q, k, config)
    if segments is not None:
        return Geometry(segments, Segments(boundaries.cu_seqlens_k.long(), k.shape[0]), config)
    return Geometry.of(q, k, config, boundaries.cu_seqlens, boundaries.cu_seqlens_k)


def _flatten(x: Tensor) -> Tensor:
    """Batched ``(B, N, H, ...)`` to ``(B * N, H, ...)``; packed ``(T, H, ...)`` stays."""
    return x.flatten(0, 1) if x.ndim == 4 else x


def _flatten_pair(x: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if x is None else (_flatten(x[0]), _flatten(x[1]))


def _given_compressed(x: Tensor, geometry: Geometry) -> Tensor:
    """The caller's compressed keys or values, ``(sum of N_cmp, H_kv, D)``.

    While torch.compile traces, a caller may know only an upper bound on their number.
    """
    return _flatten(x)[: geometry.compressed.total]


def _flatten_indices(indices: Tensor, config: NSAConfig) -> Tensor:
    """The caller's ``block_indices`` as ``(T, H_kv, n)`` or ``(tiles, H, n)``.

    They are a copy, because the caller may overwrite the original before the backward.
    """
    indices = indices.clone()
    if config.selection == "token":
        return _flatten(indices)
    return indices.transpose(-3, -2).flatten(0, -3)


def _unflatten_indices(indices: Tensor, q: Tensor, config: NSAConfig) -> Tensor:
    """The selected blocks in the caller's layout, padded with empty slots up to ``n``."""
    batched = q.ndim == 4
    missing = config.num_selected_blocks - indices.shape[-1]
    indices = torch.nn.functional.pad(indices, (0, missing), value=-1)
    if config.selection == "token":
        return indices.unflatten(0, q.shape[:2]) if batched else indices
    if batched:
        indices = indices.unflatten(0, (q.shape[0], num_query_tiles(q.shape[1], config)))
    return indices.transpose(-3, -2).contiguous()
