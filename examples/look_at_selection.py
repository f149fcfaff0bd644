"""Which blocks do tokens select? A picture of nsa.select_blocks, and a selection of your own.

    python examples/look_at_selection.py

Blocks of 64 tokens have one of four topics, in turn. The keys and queries of a topic match, so
tokens should select the earlier blocks of their own topic, every fourth one. The script prints the
map as text, and with matplotlib writes outputs/selection.png. It runs on a CPU and on a GPU.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

import nsa

BLOCKS, SIZE, TOPICS = 16, 64, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
CONFIG = nsa.NSAConfig.paper(num_selected_blocks=5)  # 1 initial, 2 local, and 2 by score


def draw(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """``q``, ``k`` and ``v`` of one sequence, whose queries and keys share topics."""
    topic = torch.arange(BLOCKS).repeat_interleave(SIZE) % TOPICS
    direction = 2 * torch.randn(TOPICS, 1, HEAD_DIM)[topic]
    noise = [torch.randn(BLOCKS * SIZE, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = noise[0] + direction, noise[1] + direction, noise[2]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return tuple(x[None].to(device, dtype) for x in (q, k, v))


def as_map(indices: Tensor) -> Tensor:
    """Whether each token selects each block, bool ``(N, BLOCKS)``, from lists ``(N, n)``."""
    # An empty slot is -1. It goes to an extra column, which is dropped.
    indices = torch.where(indices < 0, BLOCKS, indices).long()
    chosen = torch.zeros(len(indices), BLOCKS + 1, dtype=torch.bool, device=indices.device)
    return chosen.scatter(1, indices, True)[:, :BLOCKS].cpu()


def print_map(chosen: Tensor):
    print("last token of each block (rows), blocks (columns): # selected, . not, blank: later")
    for row in range(BLOCKS):
        marks = ("#" if x else "." for x in chosen[(row + 1) * SIZE - 1, : row + 1].tolist())
        print(f"{(row + 1) * SIZE - 1:5d} {''.join(marks)}")


def save_map(chosen: Tensor):
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib, so no PNG")
        return
    from matplotlib.image import imsave

    path = Path("outputs/selection.png")
    path.parent.mkdir(exist_ok=True)
    # Draw each block as wide as it is long, so that the picture is square.
    imsave(path, ~chosen.repeat_interleave(SIZE, 1).numpy(), cmap="gray")
    print(f"wrote {path.resolve()}")


def main():
    torch.manual_seed(0)
    q, k, v = draw("cuda" if torch.cuda.is_available() else "cpu")
    blocks = nsa.select_blocks(q, k, config=CONFIG)  # (B, N, H_kv, n) int32
    chosen = as_map(blocks[0, :, 0])
    print_map(chosen)
    save_map(chosen)

    out = nsa.forward(q, k, v, config=CONFIG)
    given = nsa.forward(q, k, v, config=CONFIG, block_indices=blocks)
    print(f"the same selection given: largest difference {(given - out).abs().max().item():.1e}")

    # Your own selection: the first block and the token's, ascending, -1 in empty slots at the end.
    own = torch.arange(BLOCKS * SIZE, device=q.device) // SIZE
    mine = torch.full_like(blocks, -1)
    mine[..., 0] = 0
    mine[..., 1] = torch.where(own > 0, own, -1)[:, None]
    changed = nsa.forward(q, k, v, config=CONFIG, block_indices=mine)
    print(f"two blocks of my own: largest difference {(changed - out).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
