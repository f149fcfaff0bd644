"""tools/train_lm.py: learns, resumes bit for bit, survives crashes, writes its files."""

import csv
import signal
from pathlib import Path

import pytest
import torch

import nsa
import train_lm
from lm import checkpoint, data, plot

# A second of training: two layers of the demo's shape on short sequences.
TINY = ["--context", "48", "--batch-size", "2", "--backend", "reference", "--log-every", "2"]


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return path


def train(text: Path, output: Path, *options: str) -> int:
    return train_lm.main(["--text", str(text), "--output", str(output), *TINY, *options])


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(path: Path) -> dict:
    state = torch.load(path, weights_only=True)
    # How long it took is all that may differ.
    del state["seconds"]
    state["log"] = [row[:-1] for row in state["log"]]
    return state


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_interrupted_and_resumed_equals_uninterrupted(text, tmp_path, attention, monkeypatch):
    options = ("--attention", attention, "--steps", "6")
    monkeypatch.setattr(train_lm, "SAMPLE_BYTES", 2)
    assert train(text, tmp_path / "whole", *options) == 0

    step = train_lm.Trainer.train_step

    def interrupted_step(self):
        loss = step(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train_lm.Trainer, "train_step", interrupted_step)
        assert train(text, tmp_path / "parts", *options) == 130
    assert state_of(tmp_path / "parts" / f"{attention}.pt")["step"] == 3
    torch.rand(5)  # the resumed process need not have the same random state
    assert train(text, tmp_path / "parts", *options) == 0
    whole, parts = (state_of(tmp_path / name / f"{attention}.pt") for name in ("whole", "parts"))
    assert same(whole, parts)


def test_a_run_of_both_writes_everything(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_lm, "SAMPLE_BYTES", 4)
    assert train(text, tmp_path, "--steps", "20", "--log-every", "10") == 0
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("held-out loss after 20 steps, nats per byte: nsa ")
    assert ", dense " in last_line
    for attention in ("nsa", "dense"):
        with open(tmp_path / f"{attention}.csv") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["10", "20"]
        # It starts at ln 256 = 5.5.
        assert float(rows[-1]["heldout_loss"]) < 4
    assert (tmp_path / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoint_survives_a_crash_while_writing(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.save_checkpoint(path, {"settings": {}, "step": 1})

    def crash(state, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", crash)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save_checkpoint(path, {"settings": {}, "step": 2})
    assert checkpoint.load_checkpoint(path, {})["step"] == 1
    checkpoint.save_checkpoint(path, {"settings": {}, "step": 2})
    assert checkpoint.load_checkpoint(path, {})["step"] == 2


def test_other_settings_are_refused(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_lm, "SAMPLE_BYTES", 1)
    assert train(text, tmp_path, "--attention", "dense", "--steps", "1") == 0
    assert train(text, tmp_path, "--attention", "dense", "--steps", "2") == 2
    assert "trained with steps=1, not 2; use the same" in capsys.readouterr().err
    assert train(text, tmp_path, "--attention", "dense", "--steps", "2", "--fresh") == 0


@pytest.mark.parametrize("content", ["bytes", "tensor", "nothing"])
def test_a_damaged_checkpoint_is_named(text, tmp_path, capsys, content):
    path = tmp_path / "dense.pt"
    path.write_bytes(b"damaged" if content == "bytes" else b"")
    if content == "tensor":
        torch.save(torch.zeros(1), path)
    assert train(text, tmp_path, "--attention", "dense", "--steps", "1") == 2
    assert f"train_lm: {path} is no checkpoint of" in capsys.readouterr().err


def test_seeds_of_more_than_64_bits_are_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(text, tmp_path, "--seed", str(2**64))
    assert f"--seed: must lie in [-2**63, 2**64), got {2**64}" in capsys.readouterr().err


def test_missing_and_short_text(tmp_path, capsys):
    assert train(tmp_path / "none", tmp_path / "out") == 2
    assert "none does not exist" in capsys.readouterr().err
    (tmp_path / "short").write_text("short")
    assert train(tmp_path / "short", tmp_path / "out") == 2
    assert "longer than context=48 bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(tmp_path / "short", tmp_path / "out", "--steps", "0")
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


def test_devices_that_are_refused(text, tmp_path, capsys):
    for device in ("gpu", "meta"):
        with pytest.raises(SystemExit):
            train(text, tmp_path, "--device", device)
        assert f"--device: must be cpu or cuda, got '{device}'" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_at_once(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_lm.Trainer, "run", None)
    (tmp_path / "file").touch()
    assert train(text, tmp_path / "file") == 2
    assert "train_lm: [Errno 17] File exists" in capsys.readouterr().err


def test_corpus_holds_out_whole_files(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"{i:04d}")
    (tmp_path / "binary").write_bytes(b"\0\1")
    corpus = data.load_corpus(tmp_path)
    pieces = [bytes(part.tolist()).decode().split() for part in (corpus.train, corpus.heldout)]
    assert sorted(pieces[0] + pieces[1]) == [f"{i:04d}" for i in range(100)]
    assert 1 <= len(pieces[1]) <= 15
    standard = data.load_corpus(None)
    assert len(standard.train) > 2e6
    assert len(standard.heldout) > 1e5


def test_batches_are_crops_and_the_bytes_that_follow():
    text = torch.arange(100, dtype=torch.uint8)
    inputs, targets = data.random_batch(text, 7, 10, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (7, 10)
    assert torch.equal(inputs + 1, targets)


def test_selection_map_in_both_modes():
    token = nsa.NSAConfig(selection="token", compress_block_size=4, num_selected_blocks=2)
    indices = torch.tensor([[0, -1], [0, 1]])[None, :, None].repeat(1, 4, 1, 1)  # (1, 8, 1, 2)
    share, queries = plot.selection_map(indices, 8, token)
    assert share.shape == (8, 2)
    assert queries == list(range(8))
    assert share[0].tolist() == [1, 0]
    assert share[1].tolist() == [1, 1]
    tile = nsa.NSAConfig(compress_block_size=4, num_selected_blocks=1, q_tile_size=4)
    indices = torch.tensor([[[0], [1]], [[0], [0]]])[None]  # (1, H, tiles, 1)
    share, queries = plot.selection_map(indices, 8, tile)
    assert queries == [0, 4]
    assert share.tolist() == [[1, 0], [0.5, 0.5]]
