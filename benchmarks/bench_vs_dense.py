"""Time and peak memory of nsa's fused backend and of FlashAttention-4's dense causal attention.

    python benchmarks/bench_vs_dense.py --csv dense.csv
    python benchmarks/bench_vs_dense.py --lengths 8192 32768 --cmp-groups none --csv short.csv
    python benchmarks/bench_vs_dense.py --selection token --heads 64 --kv-heads 4 --csv token.csv

Both use the same tensors in the same run, and their blocks of repetitions alternate. Nothing is
reported unless the fused output and gradients first pass against the float64 reference. The host
launches calls ahead of the GPU. At short lengths it cannot keep ahead, and times are the host's. Up
to ``--graphs`` tokens each call is also timed as a CUDA graph, which removes the host's time. Up to
``--compiled`` tokens ours is also timed under ``torch.compile(mode="reduce-overhead")``, which
makes such graphs of user code and copies inputs into them. Up to ``--deterministic`` tokens ours
with its backward is also timed with ``deterministic=True``. A dense call over two seconds runs
once.

The CSV has one row for each length, pass and setting of ``--cmp-groups``, written when measured:

- tokens, selection, heads, kv_heads, head_dim, dtype: the shape, batch 1
- cmp_groups: ``num_cmp_selected_blocks``, "none" for the dense compressed branch
- pass: "forward" (no gradient wanted) or "forward+backward"
- dense_p20_ms, dense_p50_ms, dense_p80_ms, dense_repeats, and the same for nsa
- speedup: dense median over nsa's
- dense_graph_..._ms, nsa_graph_..._ms, graph_speedup: as CUDA graphs; empty if not measured
- nsa_compiled_..._ms, compiled_speedup: compiled, and the dense eager median over its median
- nsa_deterministic_..._ms, deterministic_ratio: the same bits each time, and its median over nsa's
- dense_peak_gib, nsa_peak_gib: peak allocated memory without a graph, inputs included
- note: what could not be measured, and why
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import nsa
from measuring import environment, timing, work, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table, crossover, quantile_columns, ratio_of_medians, rounded
from measuring.timing import Timing
from measuring.workloads import PASSES, describe_groups

SIDES = ("dense", "nsa", "dense_graph", "nsa_graph", "nsa_compiled", "nsa_deterministic")
FIELDS = (
    "tokens", *workloads.SHAPE_FIELDS, "cmp_groups", "pass",
    *(f"{side}_{quantile}_ms" for side in SIDES for quantile in ("p20", "p50", "p80")),
    "dense_repeats", "nsa_repeats", "speedup", "graph_speedup", "compiled_speedup",
    "deterministic_ratio",
    "dense_peak_gib", "nsa_peak_gib", "note", *environment.FIELDS,
)  # fmt: skip
# Operations per second that the time estimate assumes.
DENSE_RATE, NSA_RATE = 600e12, 250e12


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    configs = make_configs(options)
    for config in tqdm(configs.values(), desc="accuracy gate", unit="configuration"):
        check_accuracy(options, config)
    compile_dense(options)
    print(f"about {estimate_seconds(options, configs):.0f} s of GPU time, compiling not counted")
    table = Table(options.csv, FIELDS)
    rows = []
    cases = [(length, name) for length in options.lengths for name in PASSES]
    for length, name in (progress := tqdm(cases, unit="pass")):
        progress.set_description(f"{length} tokens, {name}")
        for row in bench(length, name, configs, options):
            table.add(row)
            rows.append(row)
            tqdm.write(describe(row), file=sys.stdout)
    print("\n".join(crossovers(rows)))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default_lengths = [8192, 32768, 131072, 524288, 1048576]
    parser.add_argument("--lengths", type=int, nargs="+", default=default_lengths)
    workloads.add_shape_arguments(parser)
    parser.add_argument(
        "--cmp-groups",
        type=workloads.groups_argument,
        nargs="+",
        default=[None, 16],
        help="num_cmp_selected_blocks in tile mode, several to compare; none: the dense branch",
    )
    parser.add_argument(
        "--graphs", type=int, default=131072, metavar="TOKENS", help="CUDA graphs up to this length"
    )
    parser.add_argument(
        "--compiled", type=int, default=8192, metavar="TOKENS", help="torch.compile up to this"
    )
    parser.add_argument(
        "--deterministic", type=int, default=131072, metavar="TOKENS", help="the same bits up to"
    )
    parser.add_argument("--repeats", type=int, default=10, help="at most; fewer where one is long")
    parser.add_argument("--seconds", type=float, default=3, help="for each call and its repeats")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def make_configs(options) -> dict[int | None, nsa.NSAConfig]:
    """What is measured, by ``num_cmp_selected_blocks``."""
    groups = [None] if options.selection == "token" else options.cmp_groups
    return {m: workloads.make_config(options, m) for m in groups}


def compile_dense(options):
    """Compile dense's kernels in short calls, because of a long one only the first may be timed."""
    for name in PASSES:
        tensors = workloads.make_tensors((1, 1024), options, backward=name != "forward")
        workloads.make_step(workloads.dense_attention(tensors), tensors)()


def bench(length: int, name: str, configs: dict, options) -> list[dict]:
    """The rows of one length and pass, one for each configuration."""
    tensors = workloads.make_tensors((1, length), options, backward=name != "forward")
    attentions = {g: workloads.nsa_attention(tensors, config) for g, config in configs.items()}
    steps = {g: workloads.make_step(x, tensors) for g, x in attentions.items()}
    steps["dense"] = workloads.make_step(workloads.dense_attention(tensors), tensors)
    measure = partial(timing.measure, repeats=options.repeats, seconds=options.seconds)
    graphs = tuple(steps) if length <= options.graphs else ()
    if name != "forward" and length <= options.deterministic:
        for g, config in configs.items():
            same_bits = workloads.nsa_attention(tensors, config, deterministic=True)
            steps["deterministic", g] = workloads.make_step(same_bits, tensors)
    timings, compiled = measure(steps, graphs=graphs, once=("dense",)), {}
    if length <= options.compiled:
        # This comes last, because afterwards PyTorch captures no backward of the same tensors.
        compiled = measure(
            {g: workloads.make_compiled_step(x, tensors) for g, x in attentions.items()}
        )
    return [
        make_row(
            *(length, name, g, timings["dense"], timings[g]),
            *(compiled.get(g, Timing()), timings.get(("deterministic", g), Timing()), options),
        )
        for g in configs
    ]


def make_row(
    length: int,
    name: str,
    groups: int | None,
    dense: Timing,
    ours: Timing,
    compiled: Timing,
    deterministic: Timing,
    options,
) -> dict:
    """One row of ``FIELDS`` from the measurements of both sides, and of ours compiled, and with the
    same bits each time."""
    row = dict(tokens=length, cmp_groups=describe_groups(groups), **{"pass": name})
    row |= workloads.shape_columns(options)
    for side, measured in (("dense", dense), ("nsa", ours)):
        row |= quantile_columns(side, measured.eager)
        row |= quantile_columns(f"{side}_graph", measured.graph)
        row[f"{side}_repeats"] = len(measured.eager)
        row[f"{side}_peak_gib"] = rounded(measured.peak_gib, 3)
    row |= quantile_columns("nsa_compiled", compiled.eager)
    row |= quantile_columns("nsa_deterministic", deterministic.eager)
    row["speedup"] = rounded(ratio_of_medians(dense.eager, ours.eager), 3)
    row["graph_speedup"] = rounded(ratio_of_medians(dense.graph, ours.graph), 3)
    row["compiled_speedup"] = rounded(ratio_of_medians(dense.eager, compiled.eager), 3)
    row["deterministic_ratio"] = rounded(ratio_of_medians(deterministic.eager, ours.eager), 3)
    notes = (("dense", dense.note), ("nsa", ours.note), ("compiled", compiled.note))
    notes += (("deterministic", deterministic.note),)
    row["note"] = "; ".join(f"{side}: {note}" for side, note in notes if note)
    return row | environment.columns()


def estimate_seconds(options, configs: dict) -> float:
    """GPU time of the whole run, from operations at an assumed rate."""
    total = 0.0
    for length in options.lengths:
        sides = [(work.dense_pairs(length), DENSE_RATE, True)]
        sides += [(sum(work.attended_pairs(length, c)), NSA_RATE, False) for c in configs.values()]
        for pairs, rate, once in sides:
            forward, backward = (
                options.heads * work.attention_flops(pairs, options.head_dim, flag) / rate
                for flag in (False, True)
            )
            for seconds in (forward, forward + backward):
                repeats = max(3, min(options.repeats, int(options.seconds / seconds)))
                if once and seconds > timing.LONG_SECONDS:
                    repeats = 0
                kinds = 1 + (length <= options.graphs) + (not once and length <= options.compiled)
                kinds += not once and seconds > forward and length <= options.deterministic
                total += seconds * (1 + kinds * repeats)
    return total


def describe(row: dict) -> str:
    """A line for the terminal."""
    times = [
        f"{row[f'{side}_p50_ms'] or '-':>10} ms {row[f'{side}_peak_gib'] or '-':>7} GiB"
        for side in ("dense", "nsa")
    ]
    line = (
        f"{row['tokens']:>8} tokens {row['pass']:<16} groups {row['cmp_groups']:<4} "
        f"dense {times[0]}   nsa {times[1]}   {row['speedup'] or '-'}x"
    )
    if row["graph_speedup"]:
        line += (
            f"   graphs {row['dense_graph_p50_ms']} / {row['nsa_graph_p50_ms']} ms "
            f"{row['graph_speedup']}x"
        )
    if row["compiled_speedup"]:
        line += f"   compiled {row['nsa_compiled_p50_ms']} ms {row['compiled_speedup']}x"
    if row["deterministic_ratio"]:
        line += f"   deterministic {row['deterministic_ratio']} of the time"
    return line + (f"   ({row['note']})" if row["note"] else "")


def crossovers(rows: list[dict]) -> list[str]:
    """For each pass and configuration, the length from which nsa is faster."""
    lines = []
    for name, groups in dict.fromkeys((row["pass"], row["cmp_groups"]) for row in rows):
        for kind, column in (("eager", "speedup"), ("CUDA graphs", "graph_speedup")):
            points = [
                (row["tokens"], float(row[column]))
                for row in rows
                if (row["pass"], row["cmp_groups"]) == (name, groups) and row[column]
            ]
            if not points:
                continue
            length = crossover(points)
            if length is not None:
                found = f"faster than dense from {length:.0f} tokens on"
            elif min(ratio for _, ratio in points) >= 1:
                found = "faster than dense at every length measured"
            else:
                found = "no crossover among the lengths measured"
            lines.append(f"{name}, groups {groups}, {kind}: {found}")
    return lines


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
