"""Time from import to first output, with and without a kernel cache on disk, and recompilation.

    python benchmarks/cold_start.py --csv cold_start.csv

This process first trains on packed batches with new lengths in each step, the last two shorter, and
then on batches of equal sequences, the last two smaller. It counts kernel variants after each step.
The tool exits with 1 if the count grows after the second step of a kind, because training would
then wait for compilation. Next comes the accuracy gate, without which nothing is reported. Then new
processes are timed from their start: without a kernel cache on disk, with an empty one, and with
the one that this process left.

The CSV has one row for each training step, and for each kind of start:

- case: "packed" or "batched"; "no cache", "empty cache" or "full cache"
- step: of training, from 0; tokens; sequences
- variants: kernel variants that the process has compiled or loaded so far
- torch_s: from the start of the process until PyTorch is imported; nsa_s: import of nsa; forward_s:
  the first forward, CUDA context included; output_s: from the start of the process to that output;
  backward_s: the first forward with backward, after it; again_ms: a second one
- cache_mib: the cache on disk afterwards
- selection, heads, kv_heads, head_dim, dtype, gpu, host, torch, cuda, flash_attn_4, cutlass_dsl,
  nsa_commit, time
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from measuring import environment, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table, rounded
from measuring.variants import kernel_variants

SECONDS = ("torch_s", "nsa_s", "forward_s", "output_s", "backward_s")
FIELDS = (
    "case", "step", "tokens", "sequences", "variants", *SECONDS, "again_ms", "cache_mib",
    *workloads.SHAPE_FIELDS, *environment.FIELDS,
)  # fmt: skip
FREE_STEPS = 2
"""Steps of a kind in which kernels may be compiled."""


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    # Training comes first, because the gate's kernels would count later.
    training, grown = train(options)
    check_accuracy(options, workloads.make_config(options))
    table = Table(options.csv, FIELDS)
    for row in training:
        table.add(row)
    print(describe_training(training, grown))
    for row in tqdm(cold_starts(options), total=3, unit="process", desc="cold starts"):
        table.add(row)
        tqdm.write(describe_start(row), file=sys.stdout)
    sys.exit(bool(grown))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of a step and of a first call")
    parser.add_argument("--steps", type=int, default=12, help="packed, besides two shorter ones")
    workloads.add_shape_arguments(parser)
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def make_batches(tokens: int, steps: int) -> Iterator[tuple[str, tuple[int, ...], list | None]]:
    """(case, leading dimensions, packed lengths) of each training step."""
    rng = random.Random(0)
    for total in [tokens] * steps + [tokens // 5 + 13, 257]:
        cuts = sorted(rng.randrange(total + 1) for _ in range(rng.randrange(48)))
        bounds = [0, *cuts, total]
        lengths = [end - start for start, end in pairwise(bounds)]
        yield "packed", (total,), lengths
    quarter = tokens // 4
    for leading in ((4, quarter), (4, quarter), (3, quarter), (1, quarter), (2, quarter // 2 - 1)):
        yield "batched", leading, None


def train(options) -> tuple[list[dict], list[str]]:
    """The rows of the training steps, and what was compiled after the first two of a kind."""
    config = workloads.make_config(options)
    rows, grown, steps = [], [], {}
    batches = list(make_batches(options.tokens, options.steps))
    known = kernel_variants()
    for case, leading, lengths in tqdm(batches, desc="training", unit="step"):
        step = steps[case] = steps.get(case, -1) + 1
        tensors = workloads.make_tensors(leading, options, backward=True, lengths=lengths)
        workloads.make_step(workloads.nsa_attention(tensors, config), tensors)()
        torch.cuda.synchronize()
        counts = kernel_variants()
        new = sorted(name for name in counts if counts[name] > known.get(name, 0))
        if new and step >= FREE_STEPS:
            grown.append(f"{case} step {step}, {leading} tokens: {', '.join(new)}")
        known = counts
        sequences = leading[0] if lengths is None else len(lengths)
        row = dict.fromkeys(FIELDS) | dict(case=case, step=step, sequences=sequences)
        row |= dict(tokens=tensors.q.shape[:-2].numel(), variants=sum(counts.values()))
        rows.append(row | workloads.shape_columns(options) | environment.columns())
    return rows, grown


def cold_starts(options) -> Iterator[dict]:
    """The row of each kind of start."""
    with tempfile.TemporaryDirectory() as folder:
        for case in ("no cache", "empty cache", "full cache"):
            times = first_call(options, Path(folder), cached=case != "no cache")
            row = dict.fromkeys(FIELDS) | dict(case=case, sequences=1, tokens=options.tokens)
            row |= {name: rounded(times[name], 3) for name in SECONDS}
            row |= dict(variants=times["variants"], again_ms=rounded(times["again_ms"], 3))
            sizes = (file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            row["cache_mib"] = rounded(sum(sizes) / 2**20, 2)
            yield row | workloads.shape_columns(options) | environment.columns()


def first_call(options, folder: Path, *, cached: bool) -> dict:
    """The report of a new process on its first calls (``measuring.first_call``)."""
    here = Path(__file__).resolve().parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | {
        "QUACK_CACHE_ENABLED": "1" if cached else "0",
        "QUACK_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    settings = workloads.shape_columns(options) | dict(tokens=options.tokens, started=time.time())
    command = [sys.executable, "-m", "measuring.first_call", json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, env=environ)
    if result.returncode:
        sys.exit(f"the first call failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def describe_training(rows: list[dict], grown: list[str]) -> str:
    """What the training steps compiled, for the terminal."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        counts = [row["variants"] for row in rows if row["case"] == case]
        lines.append(f"{case}: kernel variants after each step {counts}")
    lines += [f"compiled late: {text}" for text in grown] or ["nothing was compiled late"]
    return "\n".join(lines)


def describe_start(row: dict) -> str:
    """A line for the terminal."""
    return (
        f"{row['case']:<12} import torch {row['torch_s']} s, nsa {row['nsa_s']} s, first forward "
        f"{row['forward_s']} s, so first output after {row['output_s']} s; first backward "
        f"{row['backward_s']} s, again {row['again_ms']} ms; {row['variants']} kernel variants, "
        f"{row['cache_mib']} MiB on disk"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
