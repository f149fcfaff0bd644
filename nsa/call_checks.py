"""The checks of all arguments of :func:`nsa.forward`, in order, and what is left of them."""

from typing import NamedTuple

from torch import Tensor

from nsa import validation
from nsa.block_index_checks import check_block_indices
from nsa.boundaries import Boundaries, check_boundaries
from nsa.cache.calls import cache_config, check_cached_call, check_cached_indices
from nsa.config import NSAConfig
from nsa.host import needs_gradients
from nsa.precision import autocast_tensors

_FLOATS = (
    "q",
    "k",
    "v",
    "gate_proj_weight",
    "gates",
    "compress_k_weight",
    "compress_v_weight",
    "compressed_kv",
)


class CheckedCall(NamedTuple):
    """Checked arguments: ``k`` and ``v`` hold a tensor per branch; all floats have one dtype."""

    q: Tensor
    k: tuple[Tensor, Tensor, Tensor]
    v: tuple[Tensor, Tensor, Tensor]
    config: NSAConfig
    gate_proj_weight: Tensor | None
    gates: Tensor | None
    compress_k_weight: Tensor | None
    compress_v_weight: Tensor | None
    compressed_kv: tuple[Tensor, Tensor] | None
    boundaries: Boundaries | None
    deterministic: bool

    @property
    def needs_gradients(self) -> bool:
        weights = (self.gate_proj_weight, self.compress_k_weight, self.compress_v_weight)
        blocks = self.compressed_kv or ()
        return needs_gradients(self.q, *self.k, *self.v, self.gates, *weights, *blocks)


def check_call(
    q,
    k,
    v,
    *,
    config,
    gate_proj_weight=None,
    gates=None,
    compress_k_weight=None,
    compress_v_weight=None,
    compressed_kv=None,
    block_indices=None,
    cu_seqlens=None,
    cu_seqlens_k=None,
    max_seqlen=None,
    max_seqlen_k=None,
    cache,
    max_workspace_bytes,
    recompute_window,
    deterministic,
) -> CheckedCall:
    """Check the arguments of :func:`nsa.forward`, and cast them to one dtype under autocast."""
    config = validation.check_config(config) if cache is None else cache_config(cache, config)
    k, v = validation.per_branch("k", k), validation.per_branch("v", v)
    floats = (gate_proj_weight, gates, compress_k_weight, compress_v_weight, compressed_kv)
    q, k, v, *floats = autocast_tensors(q, k, v, *floats)
    gate_proj_weight, gates, compress_k_weight, compress_v_weight, compressed_kv = floats
    problem = validation.check_qkv(q, k, v, config, cu_seqlens, cu_seqlens_k)
    boundaries = check_boundaries(cu_seqlens, max_seqlen, q, k[0], cu_seqlens_k, max_seqlen_k)
    validation.check_gates(gates, gate_proj_weight, q, problem)
    validation.check_compression(
        compress_k_weight,
        compress_v_weight,
        compressed_kv,
        boundaries,
        q,
        problem,
        cached=cache is not None,
    )
    if cache is None:
        validation.check_positions(boundaries, problem)
        check_block_indices(block_indices, boundaries, q, problem)
    else:
        named = dict(zip(_FLOATS, (q, k, v, *floats), strict=True))
        check_cached_call(cache, k, v, named, boundaries, problem)
        check_cached_indices(cache, block_indices, boundaries, q, problem)
    validation.check_max_workspace_bytes(max_workspace_bytes)
    validation.check_flag("recompute_window", recompute_window)
    return CheckedCall(
        q=q,
        k=k,
        v=v,
        config=config,
        gate_proj_weight=gate_proj_weight,
        gates=gates,
        compress_k_weight=compress_k_weight,
        compress_v_weight=compress_v_weight,
        compressed_kv=compressed_kv,
        boundaries=boundaries,
        deterministic=validation.check_deterministic(deterministic),
    )
