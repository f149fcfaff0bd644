"""Checkpoints that any number of ranks can write and read, by torch.distributed.checkpoint."""

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lm.checkpoint import check_settings, read_checkpoint
from lm.parallel import Alone

KEPT = 2
"""Finished checkpoints that stay."""


def save(folder: Path, model: nn.Module, optimizer, progress: dict, ranks: Alone):
    """Write ``folder/step-N``, ``N = progress["step"]``; until it is whole it has another name.

    Args:
        progress: what is equal on all ranks.
    """
    target = folder / f"step-{progress['step']}"
    partial = target.with_name(target.name + ".partial")
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.wait()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=partial)
    if ranks.first:
        torch.save(progress, partial / "progress.pt")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in finished(folder)[:-KEPT]:
            shutil.rmtree(old)
    ranks.wait()


def load(folder: Path, model: nn.Module, optimizer, settings: dict) -> dict | None:
    """Restore the model and the optimizer, and return the ``progress``; None if there is none.

    Raises:
        ValueError: it was written under other ``settings``.
    """
    found = finished(folder)
    if not found:
        return None
    progress = read_checkpoint(found[-1] / "progress.pt")
    check_settings(found[-1], progress["settings"], settings)
    weights, state = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return progress


def remove(folder: Path, ranks: Alone):
    """Remove the checkpoints of an earlier run, which may have more steps than the new ones."""
    if ranks.first and folder.exists():
        shutil.rmtree(folder)
    ranks.wait()


def finished(folder: Path) -> list[Path]:
    """The checkpoints that are whole, oldest first."""
    steps = [path for path in folder.glob("step-*") if path.suffix != ".partial"]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))
