"""Files that are either the old ones or the new ones, never half of each."""

import os
from collections.abc import Callable
from pathlib import Path

import torch


def write_atomically(path: Path, write: Callable[[Path], None]):
    """Let ``write`` fill a file beside ``path``, then put it in its place in one step.

    A crash at any moment leaves the former ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    # Without this a power cut could leave a renamed but empty file.
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def save_checkpoint(path: Path, state: dict):
    """Write ``state`` (tensors, numbers, strings, lists, dicts) to ``path`` atomically."""
    write_atomically(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path, settings: dict) -> dict | None:
    """The state at ``path``, None where there is none.

    Raises:
        ValueError: it was written under other ``settings``, the first of which the message names;
            or it is no checkpoint.
    """
    if not path.exists():
        return None
    state = read_checkpoint(path)
    check_settings(path, state["settings"], settings)
    return state


def read_checkpoint(path: Path) -> dict:
    """What :func:`save_checkpoint` wrote.

    Raises:
        ValueError: the file is something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # other bytes make an unpickler fail in any way
        state = None
    if not isinstance(state, dict) or "settings" not in state:
        raise ValueError(f"{path} is no checkpoint of tools/train_lm.py, or is damaged")
    return state


def check_settings(path: Path, written: dict, settings: dict):
    """Raise a ValueError that names the first of ``settings`` that was another when written."""
    for name, value in settings.items():
        if written.get(name) != value:
            raise ValueError(
                f"{path} was trained with {name}={written.get(name)!r}, not {value!r}; "
                f"use the same, another --output, or --fresh to start over"
            )
