"""The figures of the site, each drawn by what it shows: the library, or a table of measurements."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

import nsa
import plot_performance
from measuring.tables import read_rows

ROOT = Path(__file__).resolve().parents[2]
BRANCHES = {"compressed": "#1f6fb4", "selected": "#d1603d", "window": "#2f8f4e"}

# The paper's rules with sizes that can be seen.
SMALL = nsa.NSAConfig(
    selection="token",
    compress_block_size=8,
    num_selected_blocks=4,
    num_initial_blocks=1,
    num_local_blocks=1,
    window_size=12,
)


def three_branches(path: Path):
    """The weights of every token for every token before it, in each branch."""
    tokens = 96
    q, k = topics(tokens, lengths=(8, 24), seed=3)
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 4.2), sharey=True)
    notes = (
        f"one key for each block of {SMALL.compress_block_size} tokens that has ended",
        f"all tokens of {SMALL.num_selected_blocks} blocks: the first, its own, 2 by score",
        f"the last {SMALL.window_size} tokens",
    )
    named = zip(panels, BRANCHES.items(), notes, range(3), strict=True)
    for panel, (name, color), note, branch in named:
        seen = branch_weights(q, k, SMALL, branch)
        # Pale is visible; the darker, the larger the weight beside the largest of its row.
        darker = (seen / seen.amax(-1, keepdim=True).clamp(min=1e-9)).sqrt()
        seen = torch.where(seen > 0, 0.25 + 0.75 * darker, 0)
        shades = LinearSegmentedColormap.from_list(name, ["#ffffff", color])
        panel.imshow(seen, cmap=shades, vmin=0, vmax=1, interpolation="nearest")
        _after_the_token(panel, tokens)
        panel.set_title(f"{name}\n", fontsize=12, color=color)
        panel.text(0.5, 1.03, note, transform=panel.transAxes, ha="center", fontsize=8.5)
        panel.set_xlabel("token that is attended")
        ticks = range(0, tokens + 1, 16)
        panel.set(xticks=ticks, yticks=ticks, xlim=(-0.5, tokens - 0.5), ylim=(tokens - 0.5, -0.5))
    panels[0].set_ylabel("token that attends")
    _save(figure, path)


def selections(path: Path):
    """The blocks that tokens select in both modes, for the same queries and keys."""
    tokens, size = 4096, 64
    q, k = topics(tokens, lengths=(128, 600), seed=5)
    shown = {
        "token mode: each token selects": nsa.NSAConfig.paper(num_selected_blocks=10),
        "tile mode: each tile of 256 tokens selects": nsa.NSAConfig(
            num_selected_blocks=10, num_initial_blocks=1, num_local_blocks=4
        ),
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for panel, (title, config) in zip(panels, shown.items(), strict=True):
        chosen = selected(q, k, config, size)
        shades = LinearSegmentedColormap.from_list("selected", ["#ffffff", BRANCHES["selected"]])
        extent = (0, tokens, tokens, 0)
        panel.imshow(chosen, cmap=shades, extent=extent, aspect="auto", interpolation="nearest")
        panel.plot([0, tokens], [0, tokens], color="#6b6b6b", linewidth=0.8)
        ticks = range(0, tokens + 1, 512)
        panel.set(title=title, xlabel="token of the block", xticks=ticks, yticks=ticks)
    panels[0].set_ylabel("token that selects")
    _save(figure, path)


def token_mode_speed(path: Path):
    """The chart of the README, for token mode."""
    plot_performance.draw(read_rows([ROOT / "benchmarks" / "h200" / "token.csv"]), [], path)


def losses_of_ranks(path: Path):
    """The losses of one training by one process and by two ranks, side by side."""
    rows = read_rows([ROOT / "benchmarks" / "ranks" / "losses.csv"])
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for panel, ranks in zip(panels, ("1", "2"), strict=True):
        own = [row for row in rows if row["ranks"] == ranks]
        steps = [int(row["step"]) for row in own]
        for name, color in (("train_loss", "#1f6fb4"), ("heldout_loss", "#d1603d")):
            label = "held out" if name == "heldout_loss" else "training"
            panel.plot(steps, [float(row[name]) for row in own], color=color, label=label)
        title = "one process" if ranks == "1" else "two ranks that share each sequence"
        panel.set(title=title, xlabel="step")
        panel.grid(color="#e4e4e4", linewidth=0.6)
    panels[0].set_ylabel("nats per byte")
    panels[1].legend(frameon=False)
    _save(figure, path)


FIGURES: dict[str, Callable[[Path], None]] = {
    "three_branches.svg": three_branches,
    "selections.svg": selections,
    "token_mode_speed.svg": token_mode_speed,
    "losses_of_ranks.svg": losses_of_ranks,
}
"""Figures by file name."""


def topics(tokens: int, lengths: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(1, N, 1, D)`` of a text whose topics last for some tokens and return."""
    generator = torch.Generator().manual_seed(seed)
    dim, count = 32, 5
    topic: list[int] = []
    while len(topic) < tokens:
        length = int(torch.randint(*lengths, (), generator=generator))
        topic += [int(torch.randint(count, (), generator=generator))] * length
    direction = 1.2 * torch.randn(count, dim, generator=generator)[topic[:tokens]]
    q, k = (direction + torch.randn(tokens, dim, generator=generator) for _ in range(2))
    return q[None, :, None], k[None, :, None]


def branch_weights(q: Tensor, k: Tensor, config: nsa.NSAConfig, branch: int) -> Tensor:
    """The weight of each token (columns) for each token (rows) in one branch, ``(N, N)``."""
    tokens = q.shape[1]
    # A value that is 1 in the channel of its own token makes the output the weights.
    v = torch.eye(tokens)[None, :, None]
    gates = torch.nn.functional.one_hot(torch.tensor(branch), 3).float().expand(1, tokens, 1, 3)
    return nsa.forward(q, k, v, config=config, gates=gates, backend="reference")[0, :, 0]


def selected(q: Tensor, k: Tensor, config: nsa.NSAConfig, size: int) -> Tensor:
    """Whether each token selects each block and it is not later, float ``(N, blocks)``."""
    tokens = q.shape[1]
    blocks = -(-tokens // size)
    indices = nsa.select_blocks(q, k, config=config, backend="reference")[0]
    if config.selection == "tile":
        indices = indices[0].repeat_interleave(config.q_tile_size, 0)[:tokens]
    else:
        indices = indices[:, 0]
    chosen = torch.zeros(tokens, blocks + 1)
    chosen.scatter_(1, torch.where(indices < 0, blocks, indices).long(), 1.0)
    later = torch.arange(blocks) * size > torch.arange(tokens)[:, None]
    return chosen[:, :blocks].masked_fill(later, 0)


def _after_the_token(panel, tokens: int):
    """Grey where nothing is visible because it is later."""
    corners = [(-0.5, -0.5), (tokens - 0.5, -0.5), (tokens - 0.5, tokens - 0.5)]
    panel.fill(*zip(*corners, strict=True), color="#f2f2f2", zorder=2, linewidth=0)
    panel.plot([-0.5, tokens - 0.5], [-0.5, tokens - 0.5], color="#6b6b6b", linewidth=0.8, zorder=3)


def _save(figure, path: Path):
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
