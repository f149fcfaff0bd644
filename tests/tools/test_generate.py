"""tools/lm/generate.py and examples/generate.py: text from caches, streamed."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsa
import train_lm
from lm.generate import Sampling, generate
from lm.model import ByteTransformer, ModelConfig
from lm.parallel import Alone
from tests.helpers.forked import run_python

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [b"def step(self):", b"x", b"    return " * 9]
CONFIGS = {
    "tile": train_lm.PRESETS["demo"].model.nsa_config,
    "token": nsa.NSAConfig.paper(
        compress_block_size=8,
        compress_stride=4,
        select_block_size=8,
        num_selected_blocks=4,
        window_size=16,
    ),
}


def make_model(name: str, attention: str = "nsa") -> ByteTransformer:
    torch.manual_seed(0)
    sizes = ModelConfig(32, 2, 4, 2, CONFIGS[name])
    model = ByteTransformer(sizes, attention, "reference").double()
    # A sharper head, so that greedy choices hang on the text.
    torch.nn.init.normal_(model.head.weight)
    return model


def greedy(model, prompts: list[bytes], length: int, use_cache: bool) -> list[bytes]:
    tokens = [torch.tensor(list(text)) for text in prompts]
    sampling = Sampling(0.0, 1.0, torch.Generator())
    steps = torch.stack(list(generate(model, tokens, length, sampling, use_cache)), 1)
    return [bytes(row) for row in steps.tolist()]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_with_a_cache_equals_text_without(name):
    model = make_model(name)
    without = greedy(model, PROMPTS, 20, use_cache=False)
    assert len(set(without)) == len(PROMPTS)
    assert greedy(model, PROMPTS, 20, use_cache=True) == without
    assert [greedy(model, [text], 20, use_cache=True)[0] for text in PROMPTS] == without


def test_the_cache_is_used(monkeypatch):
    model = make_model("token")
    seen = []
    forward = ByteTransformer.forward

    def counted(self, tokens, *args, **options):
        seen.append(tokens.numel())
        return forward(self, tokens, *args, **options)

    monkeypatch.setattr(ByteTransformer, "forward", counted)
    greedy(model, [b"some prompt"], 5, use_cache=True)
    assert seen == [11, 1, 1, 1, 1]


def test_dense_models_generate_without_a_cache():
    model = make_model("token", "dense")
    assert greedy(model, PROMPTS, 3, use_cache=True) == greedy(model, PROMPTS, 3, use_cache=False)


def test_sampling():
    logits = torch.full((1000, 256), -torch.inf)
    logits[:, [3, 7, 9]] = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        chosen = Sampling(temperature, top_p, generator).choose(logits)
        return [(chosen == byte).float().mean().item() for byte in (3, 7, 9)]

    assert shares(0, 1.0) == [1, 0, 0]
    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    # The first two have 0.8 together, and the first alone less than 0.6.
    assert shares(1.0, 0.6) == pytest.approx([0.625, 0.375, 0], abs=0.05)
    assert shares(1.0, 0.4) == [1, 0, 0]
    hot = [x**0.5 for x in (0.5, 0.3, 0.2)]
    assert shares(2.0, 1.0) == pytest.approx([x / sum(hot) for x in hot], abs=0.05)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint as tools/train_lm.py writes it, without the training."""
    folder = tmp_path_factory.mktemp("run")
    preset = replace(train_lm.PRESETS["demo"], steps=1)
    args = train_lm.parse_args(["--output", str(folder)])
    corpus = train_lm.Corpus(torch.arange(9), torch.arange(9), "text", "digest")
    train_lm.Trainer(preset, "nsa", corpus, args, Alone("cpu")).save()
    return folder / "nsa.pt"


def run_example(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return run_python(ROOT / "examples" / "generate.py", *arguments, folder=folder)


def test_the_example_generates_from_a_checkpoint(checkpoint, tmp_path):
    options = ("--bytes", "20", "--temperature", "0")
    result = run_example(str(checkpoint), *options, "--prompt", "abc", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert "prompt: 3 bytes in " in result.stdout
    assert re.search(r"then \d+ bytes a second, batch 1$", result.stdout.strip())
    batch = run_example(
        str(checkpoint), *options, "--prompt", "abc", "--prompt", "de", folder=tmp_path
    )
    assert batch.returncode == 0, batch.stderr
    assert "\n[1] de" in "\n" + batch.stdout
    assert batch.stdout.strip().endswith("batch 2")


def test_the_example_says_what_it_needs(tmp_path):
    result = run_example(folder=tmp_path)
    assert result.returncode == 2
    assert "is no file; `make demo` writes outputs/demo/nsa.pt" in result.stderr


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_text("text")
    result = run_example("model.pt", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("generate: model.pt is no checkpoint of tools/train_lm.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", str(2**64)], "--seed: must lie in [-2**63, 2**64), got"),
        (["--device", "gpu"], "--device: must be cpu or cuda, got 'gpu'"),
        (["--device", "cuda"], "--device: needs an NVIDIA GPU, and PyTorch finds none, got 'cuda'"),
        (["--temperature", "nan"], "--temperature 0 or more"),
    ],
)
def test_options_that_the_example_refuses(checkpoint, tmp_path, options, message):
    result = run_example(str(checkpoint), *options, folder=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
