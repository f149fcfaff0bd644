"""Time, launches and memory of a stack of layers, forward and backward, beside its dense twin.

    python benchmarks/bench_layer.py --csv layer.csv
    python benchmarks/bench_layer.py --dims 1024 --shapes 1x16384 --runs eager --forms batch

``bench_vs_dense.py`` times the attention of tensors at hand. This times what users run:
projections, RoPE, compressor, gates and autograd. Steps follow each other without waiting, as in
training, so the host's time shows where the GPU waits for it. A row that does not fit memory says
so.

The CSV has one row for each shape, side, way to run and form of input, written when measured:

- dim, heads, kv_heads, layers, batch, tokens: the model and the input, bfloat16
- side: nsa's layer with NSAConfig.paper() ("token") or NSAConfig() ("tile"), or its twin with SDPA
  ("dense"); recompute: whether nsa's layers recompute
- run: "eager", "compiled" (torch.compile), or "graphs" (torch.compile(mode="reduce-overhead"))
- form: "batch"; the same tokens as packed sequences of mixed length, with one Packing for all steps
  ("packing") or other boundaries in each step, on the GPU ("boundaries") or as a data loader has
  them ("loaded"); not for the dense twin
- wall_p50_ms, wall_p95_ms: from the end of a step to the end of the next
- gpu_ms, launches: time during which some kernel runs, and kernels and copies, in one step
- peak_gib: peak allocated memory of a step, weights included; of "graphs" without what lies in the
  memory of torch.compile's graphs, which is all but weights and inputs
- repeats, note, gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import nsa
from measuring import environment, timing
from measuring.layers import SIDES, Stack
from measuring.tables import Table, rounded
from nsa.testing import make_cu_seqlens

HEADS = {1024: (16, 1), 4096: (32, 2)}
"""Query and KV heads by ``dim``."""

RUNS = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
FORMS = ("batch", "packing", "boundaries", "loaded")
FIELDS = (
    "dim", "heads", "kv_heads", "layers", "batch", "tokens", "side", "recompute", "run", "form",
    "wall_p50_ms", "wall_p95_ms", "gpu_ms", "launches", "peak_gib", "repeats", "note",
    *environment.FIELDS,
)  # fmt: skip
WARMUP_STEPS = {"eager": 2, "compiled": 3, "graphs": 4}
"""The first step compiles; the second captures a graph of torch.compile."""

LONG_MILLISECONDS = 1000
"""A step that takes longer is measured once."""

SHARES = (0.43, 0.02, 0.0, 0.18, 0.25, 0.09, 0.03)
"""Lengths of packed sequences, as shares of all tokens."""


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    table = Table(options.csv, FIELDS)
    for case in (progress := tqdm(list(cases(options)), unit="row")):
        progress.set_description(" ".join(map(str, case.values())))
        row = bench(case, options) | environment.columns()
        table.add(row)
        tqdm.write(describe(row), file=sys.stdout)
        sys.stdout.flush()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dims", type=int, nargs="+", choices=tuple(HEADS), default=list(HEADS))
    shapes = ["4x4096", "1x16384", "1x65536"]
    add("--shapes", type=shape_argument, nargs="+", default=list(map(shape_argument, shapes)))
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--runs", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--layers", type=int, default=4)
    add("--recompute", action="store_true", help="nsa's layers with recompute=True")
    add("--repeats", type=int, default=20, help="at most; fewer where a step is long")
    add("--seconds", type=float, default=2, help="for the repeats of a row")
    add("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def shape_argument(text: str) -> tuple[int, int]:
    """Batch and tokens of an entry from the command line, such as 4x4096."""
    batch, _, length = text.partition("x")
    try:
        shape = int(batch), int(length)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 4x4096, got {text}") from None
    if min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be two positive numbers, got {text}")
    return shape


def cases(options):
    """The first columns of each row."""
    for dim, (batch, length), run, side, form in product(
        options.dims, options.shapes, options.runs, options.sides, options.forms
    ):
        if side != "dense" or form == "batch":
            heads, kv_heads = HEADS[dim]
            yield dict(
                dim=dim, heads=heads, kv_heads=kv_heads, layers=options.layers, batch=batch,
                tokens=length, side=side, recompute=options.recompute and side != "dense", run=run,
                form=form,
            )  # fmt: skip


def bench(case: dict, options) -> dict:
    """The row of a case, without the columns of the environment."""
    row = case | dict.fromkeys(FIELDS[len(case) : FIELDS.index("gpu")])
    try:
        return row | measure(make_step(case), case["run"], options)
    except torch.OutOfMemoryError:
        return row | dict(note="out of memory")
    finally:
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def make_step(case: dict) -> Callable[[], None]:
    """A forward and backward of the case."""
    torch.manual_seed(0)
    kind = dict(device="cuda", dtype=torch.bfloat16)
    sizes = (case[name] for name in ("side", "dim", "heads", "kv_heads", "layers", "recompute"))
    model = Stack(*sizes, **kind)
    leading = (case["batch"], case["tokens"])
    x = torch.randn(*leading, case["dim"], **kind)
    if case["form"] != "batch":
        x = x.flatten(0, 1)
    x.requires_grad_()
    dout = torch.randn_like(x)
    call: Callable = model
    if case["run"] != "eager":
        call = torch.compile(model, mode=RUNS[case["run"]], fullgraph=True)
    boundaries = make_boundaries(case["form"], case["batch"] * case["tokens"])

    def step():
        x.grad = None
        model.zero_grad()
        call(x, *boundaries()).backward(dout)

    return step


def make_boundaries(form: str, total: int) -> Callable[[], tuple]:
    """What each step passes beside the hidden states."""
    if form == "batch":
        return tuple
    orders = [packed_lengths(total, first) for first in range(len(SHARES))]
    tensors = [make_cu_seqlens(x, "cpu" if form == "loaded" else "cuda") for x in orders]
    if form == "packing":
        packing = nsa.Packing(tensors[0])
        return lambda: (packing,)
    turns = cycle(tensors)
    return lambda: (nsa.Packing(next(turns), device="cuda"),)


def packed_lengths(total: int, first: int) -> list[int]:
    """Lengths of ``total`` tokens; ``first`` says which of ``SHARES`` comes first."""
    lengths = [int(share * total) for share in (*SHARES[first:], *SHARES[:first])]
    lengths[0] += total - sum(lengths)
    return lengths


def measure(step: Callable[[], None], run: str, options) -> dict:
    """The columns that are measured."""
    for _ in range(WARMUP_STEPS[run]):
        step()
    milliseconds, peak = timing.timed_with_peak(step)
    repeats, settle = max(3, min(options.repeats, int(1000 * options.seconds / milliseconds))), 3
    if milliseconds > LONG_MILLISECONDS:
        repeats = settle = 1
    wall = timing.timed_in_a_row(step, repeats, settle)
    busy, launches = gpu_work(step)
    return dict(
        wall_p50_ms=rounded(statistics.median(wall), 2),
        wall_p95_ms=rounded(sorted(wall)[int(0.95 * len(wall))], 2),
        gpu_ms=rounded(busy, 2),
        launches=launches,
        peak_gib=rounded(peak, 2),
        repeats=repeats,
    )


def gpu_work(step: Callable[[], None]) -> tuple[float, int]:
    """Milliseconds during which the GPU does something, and the number of things, in one step."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    return covered(spans) / 1000, len(spans)


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of sorted intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def describe(row: dict) -> str:
    """A line for the terminal."""
    line = (
        f"dim {row['dim']} {row['batch']:>2}x{row['tokens']:<7} {row['side']:5} {row['run']:8} "
        f"{row['form']:10} "
    )
    if row["note"]:
        return line + row["note"]
    return line + (
        f"wall {row['wall_p50_ms']:>8} p95 {row['wall_p95_ms']:>8}  gpu {row['gpu_ms']:>8} ms  "
        f"{row['launches']:>5} launches  {row['peak_gib']:>6} GiB"
    )


if __name__ == "__main__":
    main()
