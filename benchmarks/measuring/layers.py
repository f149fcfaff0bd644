"""Stacks of attention layers to measure: nsa's layer and its dense twin."""

import torch.nn.functional as F
from torch import Tensor, nn

import nsa
from measuring.workloads import PRESETS
from nsa.fused.layer_ops import rotate
from nsa.rope import Positions

THETA = 10000.0
SIDES = (*PRESETS, "dense")
"""nsa in each selection mode, and its dense twin."""


class DenseLayer(nn.Module):
    """Causal ``scaled_dot_product_attention`` with the projections and the RoPE of nsa's layer."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, **factory):
        super().__init__()
        self.head_dim = dim // num_heads
        kv_dim = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, dim, bias=False, **factory)
        self.k_proj = nn.Linear(dim, kv_dim, bias=False, **factory)
        self.v_proj = nn.Linear(dim, kv_dim, bias=False, **factory)
        self.o_proj = nn.Linear(dim, dim, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate([q, k], Positions(), THETA)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Layers, each added to its input."""

    def __init__(
        self,
        side: str,
        dim: int,
        heads: int,
        kv_heads: int,
        num_layers: int,
        recompute: bool,
        **factory,
    ):
        super().__init__()
        if side == "dense":
            layers = [DenseLayer(dim, heads, kv_heads, **factory) for _ in range(num_layers)]
        else:
            layers = [
                nsa.NativeSparseAttention(
                    dim, heads, kv_heads, PRESETS[side](), rope_theta=THETA, recompute=recompute,
                    backend="fused", **factory,
                )
                for _ in range(num_layers)
            ]  # fmt: skip
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *boundaries) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, *boundaries)
        return x
