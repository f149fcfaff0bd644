"""A table of stages that shows where the time of a forward, or forward and backward, goes.

    python benchmarks/profile_forward.py --csv forward.csv
    python benchmarks/profile_forward.py --backward --lengths 131072 --top-kernels 15

Stages are the functions that the fused pipeline calls. Their parts (block lists, kernel calls,
copies between layouts) are listed below them. GPU time is measured between CUDA events, while the
host runs ahead of a sleeping GPU, so that gaps between launches do not count. Host time comes from
another run. Nothing is reported unless the accuracy gate passes.

The floor of a stage is the larger of two times: its bytes over ``--bandwidth`` (that of a device
copy), and its operations over ``--rate`` (that of a matrix product). ``measuring.work.stage_work``
counts both from the shape, with every tensor moved once and no padding.

The CSV has one row for each length and stage:

- tokens, selection, heads, kv_heads, head_dim, dtype, cmp_groups, pass: batch 1
- stage: "stage", "stage/part", "rest" (between the stages) or "total"
- calls; gpu_ms and host_ms, medians, parts included; percent of the GPU time
- floor_ms, bound ("bytes" or "flops") and reached (floor over time), if the floor is known
- launches: kernels, copies and fills of the whole, in the row "total"
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from measuring import environment, stages, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table, rounded
from measuring.work import floor_milliseconds, stage_work
from measuring.workloads import PASSES, describe_groups

FIELDS = (
    "tokens", *workloads.SHAPE_FIELDS, "cmp_groups", "pass", "stage", "calls", "gpu_ms", "percent",
    "host_ms", "floor_ms", "bound", "reached", "launches", *environment.FIELDS,
)  # fmt: skip
# About 50 ms, which is longer than the host takes to launch a forward and backward.
SLEEP_CYCLES = 100_000_000


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    config = workloads.make_config(options, options.cmp_groups)
    check_accuracy(options, config)
    table = Table(options.csv, FIELDS)
    for length in (progress := tqdm(options.lengths, unit="length")):
        progress.set_description(f"{length} tokens")
        tensors = workloads.make_tensors((1, length), options, backward=options.backward)
        step = workloads.make_step(workloads.nsa_attention(tensors, config), tensors)
        # The first call compiles and the second fills the allocator's cache.
        step()
        step()
        times, calls = stage_times(step, options)
        kernels = profile_kernels(step)
        rows = make_rows(length, times, calls, kernels, config, options)
        for row in rows:
            table.add(row)
        tqdm.write(describe(rows, kernels, options))
        del tensors, step
        torch.cuda.empty_cache()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default_lengths = [8192, 32768, 131072, 524288, 1048576]
    parser.add_argument("--lengths", type=int, nargs="+", default=default_lengths)
    workloads.add_shape_arguments(parser)
    parser.add_argument("--cmp-groups", type=workloads.groups_argument, default=None)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2, help="1: stages only; 2: their parts too")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="of a copy, TB/s")
    parser.add_argument("--rate", type=float, default=770, help="of matrix products, TFLOP/s")
    parser.add_argument(
        "--top-kernels", type=int, default=0, metavar="K", help="list the K longest kernels"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def stage_times(step: Callable, options) -> tuple[dict, dict]:
    """(GPU, host) milliseconds of each path, medians over the repeats, and calls of each path."""
    kinds = (
        (stages.event_mark, stages.between_events, SLEEP_CYCLES),
        (stages.host_mark, stages.between_host, 0),
    )
    medians = []
    for now, between, cycles in kinds:
        samples = []
        for _ in range(options.repeats):
            torch.cuda.synchronize()
            watched = stages.StageTimes(now)
            if cycles:
                torch.cuda._sleep(cycles)
            watched.run(step, parts=options.depth > 1)
            torch.cuda.synchronize()
            samples.append(watched.milliseconds(between))
        medians.append({path: statistics.median(s[path] for s in samples) for path in samples[0]})
    gpu, host = medians
    return {path: (gpu[path], host[path]) for path in gpu}, watched.calls


def profile_kernels(step: Callable) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds) of each kernel, copy and fill, longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.count, event.self_device_time_total / 1e3)
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(kernels, key=lambda kernel: -kernel[2])


def make_rows(length: int, times: dict, calls: dict, kernels: list, config, options) -> list[dict]:
    """Rows of ``FIELDS``: stages in order of their first call, each followed by its parts."""
    work = stage_work(length, options, config)
    paths = [path for path in calls if len(path) <= options.depth]
    order = {path: i for i, path in enumerate(calls)}
    paths.sort(key=lambda path: [order[path[: i + 1]] for i in range(len(path))])
    total = times[()]
    rest = [
        whole - sum(times[path][i] for path in paths if len(path) == 1)
        for i, whole in enumerate(total)
    ]
    lines = [("/".join(path), calls[path], times[path]) for path in paths]
    lines += [("rest", None, rest), ("total", 1, total)]
    rows = []
    for stage, count, (gpu, host) in lines:
        row = dict(tokens=length, cmp_groups=describe_groups(options.cmp_groups), stage=stage)
        row |= workloads.shape_columns(options) | {"pass": PASSES[options.backward]}
        row |= dict(calls=count, gpu_ms=rounded(gpu, 4), host_ms=rounded(host, 4))
        row["percent"] = rounded(100 * gpu / total[0], 1)
        row |= dict(floor_ms=None, bound=None, reached=None, launches=None)
        if stage in work:
            floor, bound = floor_milliseconds(work[stage], options.bandwidth, options.rate)
            row |= dict(floor_ms=rounded(floor, 4), bound=bound, reached=rounded(floor / gpu, 3))
        if stage == "total" and kernels:
            row["launches"] = sum(count for _, count, _ in kernels)
        rows.append(row | environment.columns())
    return rows


def describe(rows: list[dict], kernels: list, options) -> str:
    """The table of one length for the terminal."""
    head = rows[0]
    launches = rows[-1]["launches"] or "unknown: the profiler saw no GPU"
    lines = [
        "",
        f"{head['tokens']} tokens, {head['pass']}, groups {head['cmp_groups']}; launches: "
        f"{launches}",
        f"{'stage':<44} {'calls':>5} {'GPU ms':>10} {'%':>6} {'host ms':>9} {'floor ms':>10} "
        f"{'bound':>6} {'reached':>8}",
    ]
    for row in rows:
        depth = row["stage"].count("/")
        name = "  " * depth + row["stage"].rpartition("/")[2]
        cells = {key: "" if value is None else value for key, value in row.items()}
        lines.append(
            f"{name:<44} {cells['calls']:>5} {cells['gpu_ms']:>10} {cells['percent']:>6} "
            f"{cells['host_ms']:>9} {cells['floor_ms']:>10} {cells['bound']:>6} "
            f"{cells['reached']:>8}"
        )
    lines += [
        f"{milliseconds:10.3f} ms {count:>5} x  {name[:100]}"
        for name, count, milliseconds in kernels[: options.top_kernels]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
