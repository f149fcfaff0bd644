"""The CSV log, and the picture of losses and selected blocks."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from lm.checkpoint import write_atomically
from nsa import NSAConfig

COLUMNS = ("step", "train_loss", "heldout_loss", "seconds")
_COLORS = {"nsa": "tab:blue", "dense": "tab:orange"}
_MAX_ROWS = 32


def write_csv(path: Path, log: list[list]):
    """Write rows of ``COLUMNS``; losses in nats per byte."""

    def write(partial: Path):
        with open(partial, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *log])

    write_atomically(path, write)


def selection_map(indices: Tensor, length: int, config: NSAConfig) -> tuple[Tensor, list[int]]:
    """Which blocks a few queries of one sequence selected.

    Args:
        indices: :func:`nsa.select_blocks` of a batch of one sequence of ``length`` tokens.
        length: tokens.
        config: of the layer.

    Returns:
        The share of heads that selected each block, ``(rows, blocks)``, and each row's query (tile
        mode: the first of its tile).
    """
    if config.selection == "token":
        lists, queries = indices[0].transpose(0, 1), range(length)  # (H_kv, N, n)
    else:
        lists, queries = indices[0], range(0, length, config.q_tile_size)  # (H, tiles, n)
    blocks = -(-length // config.select_block_size)
    # Empty slots (-1) go to an extra last column.
    taken = torch.zeros(*lists.shape[:2], blocks + 1)
    taken.scatter_(-1, torch.where(lists < 0, blocks, lists).long().cpu(), 1.0)
    rows = torch.linspace(0, len(queries) - 1, min(len(queries), _MAX_ROWS)).round().int().tolist()
    return taken[:, rows, :blocks].mean(dim=0), [queries[row] for row in rows]


def plot_run(path: Path, logs: dict[str, list[list]], selection, config: NSAConfig):
    """Write a PNG: loss curves of each attention, and beside them the map of selected blocks.

    Args:
        path: the PNG.
        logs: rows of ``COLUMNS`` by attention.
        selection: what :func:`selection_map` returned, or None.
        config: of the NSA layers.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if selection else 1, figsize=(12, 5), squeeze=False)
    losses = axes[0, 0]
    for attention, log in logs.items():
        steps, train, heldout, _ = zip(*log, strict=True)
        color = _COLORS[attention]
        losses.plot(steps, train, color=color, alpha=0.4, label=f"{attention}, training")
        losses.plot(steps, heldout, color=color, marker="o", label=f"{attention}, held out")
    losses.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    losses.grid(alpha=0.3)
    losses.legend()
    if selection:
        _plot_selection(axes[0, 1], *selection, config)
    figure.tight_layout()
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    pyplot.close(figure)


def _plot_selection(axes, share: Tensor, queries: list[int], config: NSAConfig):
    image = axes.imshow(share.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.figure.colorbar(image, label="share of heads that selected the block")
    last = [query // config.select_block_size for query in queries]
    axes.plot(last, range(len(queries)), "r.", label="the query's own block")
    axes.legend(loc="upper right")
    ticks = range(0, len(queries), max(1, len(queries) // 16))
    axes.set_yticks(list(ticks), [str(queries[tick]) for tick in ticks])
    unit = "query" if config.selection == "token" else "first query of the tile"
    axes.set(
        xlabel=f"block of {config.select_block_size} bytes",
        ylabel=f"{unit} (byte)",
        title="Blocks selected in the last layer, on held-out text",
    )
