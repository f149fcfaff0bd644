"""The layer in a small pre-norm transformer, and a few training steps.

    python examples/transformer_block.py

The data need attention: each sequence draws from 2 of 16 symbols, and only its earlier tokens tell
which. A model that ignores them has a loss of log 16 = 2.77. A model that reads them reaches about
log 2 = 0.69. The script runs on a CPU and on a GPU.
"""

import torch
from torch import Tensor, nn

import nsa

SYMBOLS, KNOWN = 16, 2
DIM, HEADS, KV_HEADS, LAYERS = 64, 4, 2, 2
BATCH, LENGTH, STEPS = 4, 96, 21
CONFIG = nsa.NSAConfig(
    selection="token",
    compress_block_size=16,
    select_block_size=32,
    num_selected_blocks=2,
    window_size=32,
)


class Block(nn.Module):
    """Attention and an MLP, each normalised first and added to its input."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        # Projections, RoPE, compressor and gates are inside.
        self.attention = nsa.NativeSparseAttention(DIM, HEADS, KV_HEADS, config=CONFIG)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, DIM)
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def draw(device: str) -> Tensor:
    """Symbols ``(BATCH, LENGTH)``. Each sequence draws from its own KNOWN symbols."""
    known = torch.rand(BATCH, SYMBOLS, device=device).argsort(1)[:, :KNOWN]
    return known.gather(1, torch.randint(KNOWN, (BATCH, LENGTH), device=device))


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(
        nn.Embedding(SYMBOLS, DIM),
        *(Block() for _ in range(LAYERS)),
        nn.RMSNorm(DIM),
        nn.Linear(DIM, SYMBOLS),
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    for step in range(STEPS):
        symbols = draw(device)
        # Weights stay float32. On a GPU, autocast runs the projections in bfloat16, and so the
        # fused backend too.
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(symbols[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), symbols[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 0:
            print(f"step {step:2d}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
