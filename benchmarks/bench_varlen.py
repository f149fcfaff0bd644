"""Cost per attended key of packed sequences of mixed length, compared with a batch.

    python benchmarks/bench_varlen.py --csv varlen.csv

There are two cases of 256K tokens: 64 sequences of 1 to 32K, and 8 that halve from 128K to 2K. Both
are compared with 8 sequences of 32K. The second is also compared with one of 256K, because its
number of attended keys lies between the two. Work is (query, key) pairs of the three branches. Both
sides have the same heads and configuration and take turns. Nothing is reported unless packed
sequences first pass against the float64 reference.

The CSV has one row for each case, baseline and pass, written as soon as it is measured:

- case, sequences, shortest, longest, tokens: the packed side
- batch, length: the batched side, with the same number of tokens
- selection, heads, kv_heads, head_dim, dtype, cmp_groups, pass
- packed_gpairs, batched_gpairs: attended pairs of all heads, in billions
- packed_p20_ms, packed_p50_ms, packed_p80_ms, packed_repeats, and the same for batched
- time_ratio: packed median over batched; pair_ratio: the same for the time per pair
- packed_peak_gib, batched_peak_gib
- note, gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import nsa
from measuring import environment, timing, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table, quantile_columns, ratio_of_medians, rounded
from measuring.work import attended_pairs
from measuring.workloads import PASSES, describe_groups

SIDES = ("packed", "batched")
FIELDS = (
    "case", "sequences", "shortest", "longest", "tokens", "batch", "length",
    *workloads.SHAPE_FIELDS, "cmp_groups", "pass", "packed_gpairs", "batched_gpairs",
    *(f"{side}_{quantile}_ms" for side in SIDES for quantile in ("p20", "p50", "p80")),
    "packed_repeats", "batched_repeats", "time_ratio", "pair_ratio",
    "packed_peak_gib", "batched_peak_gib", "note", *environment.FIELDS,
)  # fmt: skip
GATE_LENGTHS = [1, 700, 0, 64, 1283]


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    config = workloads.make_config(options, options.cmp_groups)
    check_accuracy(options, config, lengths=GATE_LENGTHS)
    table = Table(options.csv, FIELDS)
    cases = [(case, name) for case in make_cases(options) for name in PASSES]
    for (case, lengths, baselines), name in (progress := tqdm(cases, unit="pass")):
        progress.set_description(f"{case}, {name}")
        for row in bench(case, lengths, baselines, name, config, options):
            table.add(row)
            tqdm.write(describe(row), file=sys.stdout)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--total", type=int, default=262144, help="tokens on each side")
    parser.add_argument("--sequences", type=int, default=64, help="of the case of many")
    parser.add_argument("--longest", type=int, default=32768, help="of the case of many")
    parser.add_argument("--few", type=int, default=8, help="sequences of the case of few")
    workloads.add_shape_arguments(parser)
    parser.add_argument("--cmp-groups", type=workloads.groups_argument, default=None)
    parser.add_argument("--repeats", type=int, default=10, help="at most; fewer where one is long")
    parser.add_argument("--seconds", type=float, default=3, help="for each call and its repeats")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    if options.total % options.longest:
        parser.error(f"--longest must divide --total={options.total}, got {options.longest}")
    if not options.longest < options.total < options.longest * options.sequences:
        parser.error("--total must lie between --longest and --longest times --sequences")
    return options


def make_cases(options) -> list[tuple[str, list[int], list[tuple[int, int]]]]:
    """(name, packed lengths, baselines ``(B, N)``) of each case."""
    many = mixed_lengths(options.sequences, options.longest, options.total)
    few = halving_lengths(options.few, options.total)
    equal = (options.total // options.longest, options.longest)
    return [
        (f"{len(many)} of {min(many)} to {max(many)} tokens", many, [equal]),
        (f"{len(few)} of {min(few)} to {max(few)} tokens", few, [equal, (1, options.total)]),
    ]


def mixed_lengths(sequences: int, longest: int, total: int) -> list[int]:
    """Log-uniform lengths that sum to ``total`` and include 1 and ``longest``."""
    rng = random.Random(0)
    lengths = [1, longest]
    while len(lengths) < sequences:
        lengths.append(int(longest ** rng.random()))
    while sum(lengths) != total:
        index = rng.randrange(2, len(lengths))
        lengths[index] += total - sum(lengths)
        lengths[index] = min(max(lengths[index], 1), longest)
    rng.shuffle(lengths)
    return lengths


def halving_lengths(sequences: int, total: int) -> list[int]:
    """Half of the total, a quarter and so on, moved off multiples of a tile."""
    lengths, rest = [], total
    for _ in range(sequences - 1):
        lengths.append(rest - rest // 2)
        rest //= 2
    lengths.append(rest)
    for i in range(0, sequences - 1, 2):
        lengths[i] += 37
        lengths[i + 1] -= 37
    if min(lengths) < 1:
        raise ValueError(f"{total} tokens are too few for {sequences} sequences that halve")
    return lengths


def bench(
    case: str, lengths: list[int], baselines: list, name: str, config: nsa.NSAConfig, options
) -> list[dict]:
    """The rows of one case and pass, one for each baseline."""
    packed = workloads.make_tensors(
        (sum(lengths),), options, backward=name != "forward", lengths=lengths
    )
    sides = {"packed": packed} | {shape: workloads.reshaped(packed, shape) for shape in baselines}
    steps = {
        side: workloads.make_step(workloads.nsa_attention(tensors, config), tensors)
        for side, tensors in sides.items()
    }
    timings = timing.measure(steps, repeats=options.repeats, seconds=options.seconds)
    return [
        make_row(case, lengths, shape, name, config, timings["packed"], timings[shape], options)
        for shape in baselines
    ]


def make_row(
    case: str,
    lengths: list[int],
    shape: tuple[int, int],
    name: str,
    config: nsa.NSAConfig,
    packed: timing.Timing,
    batched: timing.Timing,
    options,
) -> dict:
    """One row of ``FIELDS`` from the measurements of both sides."""
    batch, length = shape
    pairs = [
        options.heads * sum(sum(attended_pairs(n, config)) for n in side)
        for side in (lengths, [length] * batch)
    ]
    row = dict(case=case, sequences=len(lengths), shortest=min(lengths), longest=max(lengths))
    row |= dict(tokens=sum(lengths), batch=batch, length=length, **{"pass": name})
    row |= workloads.shape_columns(options)
    row["cmp_groups"] = describe_groups(config.num_cmp_selected_blocks)
    for side, measured, count in zip(SIDES, (packed, batched), pairs, strict=True):
        row |= quantile_columns(side, measured.eager)
        row[f"{side}_repeats"] = len(measured.eager)
        row[f"{side}_gpairs"] = rounded(count / 1e9, 3)
        row[f"{side}_peak_gib"] = rounded(measured.peak_gib, 3)
    ratio = ratio_of_medians(packed.eager, batched.eager)
    row["time_ratio"] = rounded(ratio, 4)
    row["pair_ratio"] = None if ratio is None else rounded(ratio * pairs[1] / pairs[0], 4)
    notes = zip(SIDES, (packed.note, batched.note), strict=True)
    row["note"] = "; ".join(f"{side}: {note}" for side, note in notes if note)
    return row | environment.columns()


def describe(row: dict) -> str:
    """A line for the terminal."""
    return (
        f"{row['case']:<28} {row['pass']:<16} {row['packed_p50_ms'] or '-':>9} ms "
        f"{row['packed_gpairs']:>8} G pairs   {row['batch']} x {row['length']:<7}"
        f"{row['batched_p50_ms'] or '-':>9} ms {row['batched_gpairs']:>8} G pairs   "
        f"time {row['time_ratio'] or '-'}   per pair {row['pair_ratio'] or '-'}"
        + (f"   ({row['note']})" if row["note"] else "")
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
