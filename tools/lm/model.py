"""A byte-level transformer whose attention is NSA, or dense with everything else the same."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nsa
from nsa.rope import apply_rope

VOCABULARY = 256
ROPE_THETA = 10000.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the transformer; heads have ``dim / num_heads`` channels."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    nsa_config: nsa.NSAConfig


class DenseAttention(nn.Module):
    """Causal grouped-query attention with RoPE: what the NSA layer replaces."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        kv_dim = config.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        heads = (-1, self.head_dim)
        q = apply_rope(self.q_proj(x).unflatten(-1, heads), positions, ROPE_THETA)
        k = apply_rope(self.k_proj(x).unflatten(-1, heads), positions, ROPE_THETA)
        v = self.v_proj(x).unflatten(-1, heads)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer MLP, each normalised first and added to its input."""

    def __init__(self, attention: nn.Module, dim: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False)
        )

    def forward(self, x: Tensor, **attention) -> Tensor:
        x = x + self.attention(self.attention_norm(x), **attention)
        return x + self.mlp(self.mlp_norm(x))


class ByteTransformer(nn.Module):
    """Next-byte logits ``(B, N, 256)`` for bytes ``(B, N)``.

    Args:
        config: sizes.
        attention: ``"nsa"`` or ``"dense"``.
        backend: of the NSA layers, as in :func:`nsa.forward`.
    """

    def __init__(self, config: ModelConfig, attention: str, backend: str = "auto"):
        super().__init__()
        self.attention = attention
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(
            Block(_attention(config, attention, backend), config.dim)
            for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCABULARY, bias=False)
        # Predictions start near uniform, at a loss of ln 256.
        nn.init.normal_(self.head.weight, std=0.1 * config.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | nsa.Packing | None = None,
        caches: list[nsa.Cache] | None = None,
    ) -> Tensor:
        """Logits of each byte; with NSA also for packed ``(T,)``, and behind caches."""
        x = self.embedding(tokens)
        for layer, block in enumerate(self.blocks):
            own = {} if caches is None else {"cu_seqlens": cu_seqlens, "cache": caches[layer]}
            x = block(x, **own)
        return self.head(self.norm(x))

    @torch.no_grad()
    def selected_blocks(self, tokens: Tensor, layer: int) -> Tensor:
        """What an NSA layer selects for bytes ``(B, N)``, as from :func:`nsa.select_blocks`."""
        x = self.embedding(tokens)
        for block in self.blocks[:layer]:
            x = block(x)
        block = self.blocks[layer]
        return block.attention.select_blocks(block.attention_norm(x))

    def make_caches(self, batch_size: int, max_length: int) -> list[nsa.Cache] | None:
        """A cache for each layer, for up to ``max_length`` bytes; None with dense attention."""
        if self.attention == "dense":
            return None
        return [block.attention.make_cache(batch_size, max_length) for block in self.blocks]


def _attention(config: ModelConfig, attention: str, backend: str) -> nn.Module:
    if attention == "dense":
        return DenseAttention(config)
    return nsa.NativeSparseAttention(
        config.dim,
        config.num_heads,
        config.num_kv_heads,
        config.nsa_config,
        rope_theta=ROPE_THETA,
        backend=backend,
    )
