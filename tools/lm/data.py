"""Bytes of real text to train on: the Python standard library, or the user's own files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Tests and vendored packages repeat themselves; what remains is about 15 MB of code and docs.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
HELDOUT_SHARE = 0.05


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, uint8 ``(length,)``, and where it came from."""

    train: Tensor
    heldout: Tensor
    description: str
    digest: str


def load_corpus(path: Path | None) -> Corpus:
    """Read a text file, every text file of a folder, or (None) the standard library.

    About one byte in twenty is held out: whole files where there are several, else the end of the
    only one.

    Raises:
        FileNotFoundError: ``path`` does not exist, or holds no text.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            f
            for f in root.rglob("*.py")
            if not _SKIPPED_FOLDERS.intersection(f.relative_to(root).parts)
        ]
        name = f"the standard library of Python {sysconfig.get_python_version()}"
    else:
        if not path.exists():
            raise FileNotFoundError(f"--text: {path} does not exist")
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        root, name = path if path.is_dir() else path.parent, str(path)
    texts = {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(files)}
    texts = {key: text for key, text in texts.items() if text and b"\0" not in text}
    if not texts:
        raise FileNotFoundError(f"--text: {name} holds no text file")
    train, heldout = _split(texts)
    description = f"{name}: {len(train) / 1e6:.1f} MB, and {len(heldout) / 1e6:.2f} MB held out"
    digest = hashlib.sha256(train + b"\0" + heldout).hexdigest()
    return Corpus(_as_tensor(train), _as_tensor(heldout), description, digest)


def _split(texts: dict[str, bytes]) -> tuple[bytes, bytes]:
    train, heldout = [], []
    for key, text in texts.items():
        # A file's side depends on its own name alone.
        share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
        (heldout if share < HELDOUT_SHARE else train).append(text)
    if not train or not heldout:
        text = b"\n".join(texts.values())
        cut = int(len(text) * (1 - HELDOUT_SHARE))
        return text[:cut], text[cut:]
    return b"\n".join(train), b"\n".join(heldout)


def _as_tensor(text: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy())


def random_batch(
    text: Tensor, batch_size: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random crops: inputs and the bytes that follow them, int64 ``(batch_size, context)``.

    Raises:
        ValueError: the text is shorter than one crop.
    """
    if len(text) <= context:
        raise ValueError(f"text must be longer than context={context} bytes, got {len(text)}")
    start = torch.randint(len(text) - context, (batch_size, 1), generator=generator)
    crop = text[start + torch.arange(context + 1)].long()
    return crop[:, :-1], crop[:, 1:]
