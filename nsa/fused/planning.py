"""Make the plan of a call, or find one that is kept."""

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from nsa.boundaries import Boundaries
from nsa.config import NSAConfig
from nsa.fused.compressed_forms import (
    CompressedForm,
    compressed_form,
    skips_key_tiles,
)
from nsa.fused.fa4_variants import choose_key_block
from nsa.fused.kernel_inputs import MOST_FEW_KEYS
from nsa.fused.plan import Plan
from nsa.fused.plan_tables import make_rule
from nsa.fused.token_inputs import choose_shape
from nsa.geometry import Geometry
from nsa.host import may_keep

MAX_PLANS = 8
"""Plans of batches to keep. Few, because each keeps index tensors on the device
that are as long as the sequences: about 100 bytes a token if packed."""


@lru_cache(maxsize=64)
def with_scale(config: NSAConfig, scale: float) -> NSAConfig:
    """``config`` with an explicit scale, because padding changes ``D`` and so the default scale."""
    return replace(config, scale=scale)


def make_plan(
    q: Tensor,
    config: NSAConfig,
    boundaries: Boundaries | None = None,
    *,
    num_keys: int | None = None,
    num_kv_heads: int | None = None,
) -> Plan:
    """The plan for ``q (B, Nq, H, D)``, or for packed ``q (1, T, H, D)`` with ``boundaries``.

    The plan is kept with the caller's :class:`Packing`, if any. Otherwise it has copies of the
    boundaries, which nobody changes before backward. The host reads the lengths of the keys if no
    bound is known.

    Args:
        q, boundaries: see above.
        config: the configuration, with its scale.
        num_keys: keys of an entry; by default as many as queries.
        num_kv_heads: KV heads; by default as many as query heads.
    """
    num_keys = q.shape[1] if num_keys is None else num_keys
    if boundaries is None:
        plan = _cached_batched_plan if may_keep(q) else _batched_plan
        return plan(q.shape[0], q.shape[1], num_keys, q.shape[-1], q.device, config)
    packing = boundaries.packing
    if packing is not None:
        # An op has aliases of these.
        cu_seqlens, cu_seqlens_k = packing.cu_seqlens, packing.cu_seqlens_k
        max_seqlen_k = packing.max_seqlen_k
    else:
        cu_seqlens = cu_seqlens_k = boundaries.cu_seqlens.clone()
        if boundaries.cu_seqlens_k is not boundaries.cu_seqlens:
            cu_seqlens_k = boundaries.cu_seqlens_k.clone()
        max_seqlen_k = boundaries.max_seqlen_k
    if max_seqlen_k is None:
        max_seqlen_k = int(cu_seqlens_k.diff().max()) if len(cu_seqlens_k) > 1 else 0
    num_heads, head_dim = q.shape[2:]
    group = 1 if num_kv_heads is None else num_heads // num_kv_heads
    tile_tokens = 1 if config.selection == "tile" else choose_shape(head_dim, group).tile_tokens
    sizes: dict[str, Any] = dict(
        num_queries=q.shape[1],
        num_keys=num_keys,
        head_dim=head_dim,
        tile_tokens=tile_tokens,
        max_seqlen_k=min(max_seqlen_k, num_keys),
        config=config,
    )
    make = partial(_packed_plan, cu_seqlens, cu_seqlens_k, **sizes)
    return make() if packing is None else packing.keep(tuple(sizes.values()), make)


def _packed_plan(
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    tile_tokens: int,
    max_seqlen_k: int,
    config: NSAConfig,
) -> Plan:
    geometry = Geometry.packed(cu_seqlens, cu_seqlens_k, num_queries, num_keys, config, exact=False)
    form = compressed_form(config, packed=True, num_compressed=geometry.compressed.total)
    whole = cu_seqlens is cu_seqlens_k
    folded = skips_key_tiles(
        form, geometry.compressed.total, config, whole=whole, longest=max_seqlen_k
    )
    has_few = config.causal and form is not CompressedForm.NONE
    key_block = choose_key_block(config.select_block_size, config, head_dim)
    cmp_key_block = choose_key_block(config.cmp_group_size, config, head_dim)
    rule = make_rule(
        config,
        num_queries=num_queries,
        num_keys=num_keys,
        sequences=cu_seqlens.shape[0] - 1,
        whole=whole,
        form=form,
        folded=folded,
        token_tile=tile_tokens,
        key_blocks=(key_block, cmp_key_block),
        most_few_keys=MOST_FEW_KEYS if has_few else 1,
    )
    return Plan(geometry, 1, head_dim, cu_seqlens, cu_seqlens_k, max_seqlen_k, rule)


def _batched_plan(
    batch: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    device: torch.device,
    config: NSAConfig,
) -> Plan:
    return Plan(Geometry.equal(1, num_queries, num_keys, device, config), batch, head_dim)


_cached_batched_plan = lru_cache(maxsize=MAX_PLANS)(_batched_plan)
