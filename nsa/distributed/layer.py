"""The layer on a rank's part of the tokens: positions, and learned compression over borders."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from nsa import backends
from nsa.distributed.block_sharing import block_rows
from nsa.distributed.collectives import process_group
from nsa.distributed.interface import attend_part, select_part
from nsa.distributed.order import check_order
from nsa.distributed.rank_checks import Part, flat, part_layout
from nsa.host import has_readable_values
from nsa.layer_checks import check_input
from nsa.layer_compression import compress_tokens, rotate_heads
from nsa.linears import apply_linear
from nsa.packing import Packing
from nsa.precision import autocast_dtype
from nsa.validation import UnsupportedError, check_config

Bounds = Tensor | Packing | None
Layer = Any
"""A :class:`nsa.NativeSparseAttention`, whose module imports no part of this package."""


class ContextParallel(ParallelStyle):
    """Lets a :class:`nsa.NativeSparseAttention` take a rank's part of the tokens.

    For ``torch.distributed.tensor.parallel.parallelize_module``, before ``fully_shard`` and
    ``torch.compile``::

        plan = {"blocks.*.attention": nsa.distributed.ContextParallel()}
        parallelize_module(model, mesh["cp"], plan)

    The layer then takes ``x (B, N / P, dim)``, or packed ``(N / P, dim)`` with global
    ``cu_seqlens``, as :func:`nsa.distributed.shard` cuts them, on all ranks of the mesh at once.
    Its weights stay whole and plain. Their gradients are this rank's part, which data parallelism
    over the ranks of the mesh sums. Setting ``layer.context_parallel = None`` undoes it.

    Args:
        order: as in :func:`nsa.distributed.forward`.
    """

    def __init__(self, order: str = "head-tail"):
        super().__init__()
        self.order = check_order(order)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if "context_parallel" not in vars(module):
            raise TypeError(
                f"ContextParallel is for nsa.NativeSparseAttention, got {type(module).__name__}"
            )
        if process_group(device_mesh).size() > 1:
            vars(module)["context_parallel"] = LayerPart(device_mesh, self.order)
        return module


class LayerPart:
    """What a layer with :class:`ContextParallel` does instead of its own forward."""

    def __init__(self, mesh: DeviceMesh, order: str):
        self.mesh, self.order = mesh, order

    def forward(
        self, layer: Layer, x: Tensor, cu_seqlens: Bounds, max_seqlen: int | None, cache
    ) -> Tensor:
        """See :meth:`nsa.NativeSparseAttention.forward`."""
        arguments, compress, problem = self._arguments(
            layer, x, cu_seqlens, max_seqlen, cache, attends=True
        )
        out = attend_part(self.mesh, self.order, arguments, compress, problem)
        return apply_linear(layer.o_proj, out.flatten(-2), x.dtype)

    def select_blocks(
        self, layer: Layer, x: Tensor, cu_seqlens: Bounds, max_seqlen: int | None, cache
    ) -> Tensor:
        """See :meth:`nsa.NativeSparseAttention.select_blocks`."""
        arguments, compress, problem = self._arguments(
            layer, x, cu_seqlens, max_seqlen, cache, attends=False
        )
        return select_part(self.mesh, self.order, arguments, compress, problem)

    def _arguments(
        self,
        layer: Layer,
        x: Tensor,
        cu_seqlens: Bounds,
        max_seqlen: int | None,
        cache,
        *,
        attends: bool,
    ) -> tuple[dict[str, Any], Callable | None, Exception | None]:
        """Arguments of :func:`nsa.distributed.forward`, or of its ``select_blocks``, and the
        layer's compressor; or what is wrong, which the other ranks must learn."""
        try:
            _check_no_cache(cache)
            check_input(layer, x, cu_seqlens)
            if isinstance(cu_seqlens, Tensor) and has_readable_values(cu_seqlens):
                cu_seqlens = Packing(cu_seqlens)  # read once
            arguments, compress = self._project(layer, x, cu_seqlens, max_seqlen)
            if attends:
                gates, gate_proj_weight = layer._gates(x, arguments["q"].dtype)
                arguments |= dict(gates=gates, gate_proj_weight=gate_proj_weight)
                arguments["max_workspace_bytes"] = layer.max_workspace_bytes
                arguments["recompute_window"] = layer.recompute
        except Exception as problem:
            return {}, None, problem
        boundaries = dict(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        settings = dict(config=layer.config, backend=layer.backend)
        return arguments | boundaries | settings, compress, None

    def _project(self, layer: Layer, x: Tensor, cu_seqlens: Bounds, max_seqlen: int | None):
        q, keys, values = layer._heads(x)
        config = check_config(layer.config)
        fused = backends.uses_fused(layer.backend, q, values[0], config)
        compress = None
        if layer.compress_k is not None:
            # Wrapped linears get the dtype of x.
            dtype = keys[0].dtype if autocast_dtype(x.device) else x.dtype
            rows = (flat(keys[0].to(dtype)), flat(values[0].to(dtype)))
            compress = partial(_compress, layer, rows, fused)
        q, *rotated = self._rotate(layer, [q, *keys], cu_seqlens, max_seqlen, fused)
        if layer.num_kv_branches == 1:
            return dict(q=q, k=rotated[0], v=values[0]), compress
        return dict(q=q, k=tuple(rotated), v=values), compress

    @torch.compiler.disable(reason="nsa.distributed computes positions on the host")
    def _rotate(
        self,
        layer: Layer,
        tensors: list[Tensor],
        cu_seqlens: Bounds,
        max_seqlen: int | None,
        fused: bool,
    ) -> list[Tensor]:
        """``(B, N / P, H, D)`` or ``(N / P, H, D)``, rotated by the positions of own tokens."""
        if layer.rope_theta is None:
            return tensors
        config, group = check_config(layer.config), process_group(self.mesh)
        layout = part_layout(group, self.order, config, tensors[0], cu_seqlens, max_seqlen)
        rotated = rotate_heads(
            [flat(x) for x in tensors], layout.positions, layer.rope_theta, fused
        )
        return [y.view(x.shape) for x, y in zip(tensors, rotated, strict=True)]


def _check_no_cache(cache):
    if cache is not None:
        raise UnsupportedError(
            "a layer under context parallelism cannot use a cache; decode with one that has all of "
            "each sequence"
        )


def _compress(
    layer: Layer, rows: tuple[Tensor, Tensor], fused: bool, part: Part, group
) -> tuple[Tensor, Tensor]:
    """Compressed keys, rotated to the centres of their blocks, and values, of own blocks."""
    layout = part.layout
    k, v = block_rows(rows, layout, group)
    centres = layout.block_positions
    k_cmp, v_cmp = compress_tokens(layer, k, v, layout.block_boundaries, fused, centres)
    return k_cmp.to(part.q.dtype), v_cmp.to(part.q.dtype)
