"""Time of some queries of a sequence, compared with their share of the whole sequence's time.

    python benchmarks/bench_positions.py --csv positions.csv
    python benchmarks/bench_positions.py --selection tile --heads 32 --kv-heads 8

There are four cases: a prefill in chunks, whose sum is compared with the whole forward; pieces of a
longer sequence; all its pieces with backward in sums that they share, as ranks run them, whose sum
is compared with the whole; and a chunk at the end of a very long one. A forward gets compressed
keys and values, as prefill with a cache has them. A pass with backward computes its own, pieces
that share sums once.

A query's time has a part that grows with its position, in the compressed branch and the selection,
and one that does not. The whole sequence's time of each part follows from its time and that of half
the length. The share of queries ``start`` to ``end - 1`` of ``N`` is then
``(a * (end^2 - start^2) / N^2 + b * (end - start) / N) / (a + b)``, for parts ``a`` and ``b``.
Whole, half and pieces take turns, eight times. The host may take longer for a chunk of tile mode
than the GPU, so the prefill is also timed as CUDA graphs. Nothing is reported unless the fused
output and gradients first pass against the float64 reference.

The CSV has one row for each case, piece and pass, written when measured:

- case, tokens, start, end, chunks: queries ``start`` to ``end - 1`` of ``tokens``, in so many calls
- selection, heads, kv_heads, head_dim, dtype, pass
- piece_p20_ms, piece_p50_ms, piece_p80_ms, piece_repeats, and the same for whole
- half_p50_ms: of a sequence half as long
- share: the piece's part of the whole's time
- ratio: median of the piece over its share of the whole's median
- piece_graph_p50_ms, whole_graph_p50_ms, graph_ratio: as CUDA graphs; empty if not measured
- bar: what the ratios should be at most
- piece_peak_gib, whole_peak_gib
- note, gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import nsa
from measuring import environment, timing, workloads
from measuring.gate import check_accuracy
from measuring.shared_keys import shared_step
from measuring.tables import Table, quantile_columns, ratio_of_medians, rounded
from measuring.workloads import PASSES, Tensors
from nsa.blocks import num_compressed_blocks

SIDES = ("piece", "whole")
FIELDS = (
    "case", "tokens", "start", "end", "chunks", *workloads.SHAPE_FIELDS, "pass",
    *(f"{side}_{quantile}_ms" for side in SIDES for quantile in ("p20", "p50", "p80")),
    "piece_repeats", "whole_repeats", "half_p50_ms", "share", "ratio",
    "piece_graph_p50_ms", "whole_graph_p50_ms", "graph_ratio", "bar",
    "piece_peak_gib", "whole_peak_gib", "note", *environment.FIELDS,
)  # fmt: skip


class Case(NamedTuple):
    """Queries ``start`` to ``end - 1`` of ``tokens``, in calls of ``chunk`` queries."""

    name: str
    tokens: int
    start: int
    end: int
    chunk: int
    bar: float = 1.0

    @property
    def chunks(self) -> int:
        return -(-(self.end - self.start) // self.chunk)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    config = workloads.make_config(options)
    check_accuracy(options, config)
    table = Table(options.csv, FIELDS)
    runs = [run for run in make_runs(options) if run[0] in options.cases]
    for name, cases, pass_name in (progress := tqdm(runs, unit="case")):
        progress.set_description(f"{name}, {pass_name}")
        for row in bench(cases, pass_name, config, options):
            table.add(row)
            tqdm.write(describe(row), file=sys.stdout)


TURNS = 8
"""Those of the whole, the half and the pieces."""

CASES = ("prefill", "pieces", "shared", "end")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--prefill", type=int, default=65536, help="tokens of the prefill")
    parser.add_argument("--chunk", type=int, default=8192, help="queries of a chunk")
    parser.add_argument("--long", type=int, default=262144, help="tokens that are cut into pieces")
    parser.add_argument("--piece", type=int, default=65536, help="queries of a piece")
    parser.add_argument("--longest", type=int, default=1048576, help="tokens before the last chunk")
    workloads.add_shape_arguments(parser)
    parser.set_defaults(selection="token", heads=64, kv_heads=4)
    parser.add_argument("--repeats", type=int, default=40, help="at most; fewer where one is long")
    parser.add_argument("--seconds", type=float, default=3, help="for each call and its repeats")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def make_runs(options) -> list[tuple[str, list[Case], str]]:
    """(case, its pieces, pass): what is measured together."""
    prefill = Case("prefill", options.prefill, 0, options.prefill, options.chunk, 1.05)
    starts = range(0, options.long, options.piece)
    pieces = [
        Case("pieces", options.long, at, at + options.piece, options.piece, 1.03) for at in starts
    ]
    shared = Case("shared", options.long, 0, options.long, options.piece, 1.03)
    first = options.longest - options.chunk
    end = Case("end", options.longest, first, options.longest, options.chunk, 1.15)
    runs = [("prefill", [prefill], "forward")]
    runs += [("pieces", pieces, name) for name in PASSES]
    return [*runs, ("shared", [shared], PASSES[1]), ("end", [end], "forward")]


def share(case: Case, whole: float, half: float) -> float:
    """The piece's part of the time of the whole, which is known, as that of half its length."""
    square, linear = 2 * whole - 4 * half, 4 * half - whole
    start, end = case.start / case.tokens, case.end / case.tokens
    return (square * (end**2 - start**2) + linear * (end - start)) / whole


def bench(cases: list[Case], pass_name: str, config: nsa.NSAConfig, options) -> list[dict]:
    """The rows of some pieces of one sequence."""
    tokens = cases[0].tokens
    tensors = workloads.make_tensors((1, tokens), options, backward=pass_name != "forward")
    compressed = None
    if tensors.dout is None:
        size, stride = config.compress_block_size, config.compress_stride
        windows = (x.detach().unfold(1, size, stride) for x in (tensors.k, tensors.v))
        compressed = tuple(x.mean(dim=-1) for x in windows)
    whole = Case("", tokens, 0, tokens, tokens)
    half = Case("", tokens // 2, 0, tokens // 2, tokens // 2)
    steps = {case: make_step(case, tensors, compressed, config) for case in (whole, half, *cases)}
    limits = dict(repeats=options.repeats, seconds=options.seconds, blocks=TURNS)
    graphs = (whole, *cases) if cases[0].name == "prefill" else ()
    timings = timing.measure(steps, **limits, graphs=graphs, once=(whole,))
    sides = (timings[whole], timings[half])
    return [make_row(x, pass_name, timings[x], *sides, options) for x in cases]


def make_step(
    case: Case, tensors: Tensors, compressed: tuple | None, config: nsa.NSAConfig
) -> Callable[[], None]:
    """One pass over the queries of a case, chunk by chunk."""
    if case.name == "shared":
        return shared_step(tensors, case.chunk, config)
    steps = []
    for start in range(case.start, case.end, case.chunk):
        end = min(start + case.chunk, case.end)
        steps.append(_piece_step(start, end, tensors, compressed, config))

    def run():
        for step in steps:
            step()

    return run


def _piece_step(
    start: int, end: int, tensors: Tensors, compressed: tuple | None, config: nsa.NSAConfig
) -> Callable[[], None]:
    q = tensors.q.detach()[:, start:end].requires_grad_()
    k, v = (x.detach()[:, :end].requires_grad_() for x in (tensors.k, tensors.v))
    dout = None if tensors.dout is None else tensors.dout[:, start:end]
    given = {}
    if compressed is not None:
        blocks = num_compressed_blocks(end, config)
        given["compressed_kv"] = tuple(x[:, :blocks] for x in compressed)
    piece = Tensors(q, k, v, tensors.gate_proj_weight, dout, {})
    return workloads.make_step(workloads.nsa_attention(piece, config, **given), piece)


def make_row(
    case: Case,
    pass_name: str,
    piece: timing.Timing,
    whole: timing.Timing,
    half: timing.Timing,
    options,
) -> dict:
    """One row of ``FIELDS`` from the measurements of both sides and of half the length."""
    row = dict(case=case.name, tokens=case.tokens, start=case.start, end=case.end)
    row |= dict(chunks=case.chunks, **{"pass": pass_name}) | workloads.shape_columns(options)
    for side, measured in zip(SIDES, (piece, whole), strict=True):
        row |= quantile_columns(side, measured.eager)
        row[f"{side}_repeats"] = len(measured.eager)
        row[f"{side}_peak_gib"] = rounded(measured.peak_gib, 3)
        row[f"{side}_graph_p50_ms"] = quantile_columns(side, measured.graph)[f"{side}_p50_ms"]
    row["half_p50_ms"] = quantile_columns("half", half.eager)["half_p50_ms"]
    part = 1.0
    if (case.start, case.end) != (0, case.tokens):
        part = share(case, *(statistics.median(x.eager) for x in (whole, half)))
    row["share"] = rounded(part, 5)
    for kind, name in (("eager", "ratio"), ("graph", "graph_ratio")):
        ratio = ratio_of_medians(getattr(piece, kind), getattr(whole, kind))
        row[name] = None if ratio is None else rounded(ratio / part, 4)
    row["bar"] = case.bar
    notes = zip(SIDES, (piece.note, whole.note), strict=True)
    row["note"] = "; ".join(f"{side}: {note}" for side, note in notes if note)
    return row | environment.columns()


def describe(row: dict) -> str:
    """A line for the terminal."""
    return (
        f"{row['case']:<8} {row['selection']:<6} {row['pass']:<16} queries {row['start']:>7} to "
        f"{row['end']:>7} of {row['tokens']:>7} in {row['chunks']} calls "
        f"{row['piece_p50_ms'] or '-':>9} ms   whole {row['whole_p50_ms'] or '-':>9} ms   "
        f"share {row['share']}   ratio {row['ratio'] or '-'}, as graphs "
        f"{row['graph_ratio'] or '-'} (at most {row['bar']})"
        + (f"   ({row['note']})" if row["note"] else "")
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
