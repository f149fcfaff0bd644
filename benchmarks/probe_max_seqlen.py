"""The longest sequence that fits this GPU, with the time and memory of each length tried.

    python benchmarks/probe_max_seqlen.py --backward --csv longest.csv
    python benchmarks/probe_max_seqlen.py --cmp-groups 16 --max-workspace-gib 8 --bisect 3

Lengths double from ``--start`` until memory does not suffice. Then the gap is halved ``--bisect``
times. Each length runs twice in its own process, and the second call is timed. Nothing is reported
unless the first process passes the accuracy gate. Later processes load the kernels that the first
one compiled from FlashAttention-4's cache on disk, which is turned on unless the environment says
otherwise.

The CSV has one row for each length tried, written as soon as it is measured:

- tokens, selection, heads, kv_heads, head_dim, dtype, cmp_groups, pass: batch 1
- max_workspace_gib: ``max_workspace_bytes`` of nsa.forward, empty for its default
- fits: "yes" or "no"
- ms, peak_gib: of the second call, inputs included; reserved_gib: held by PyTorch's allocator
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from measuring import environment, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table
from measuring.timing import timed_with_peak
from measuring.workloads import PASSES, describe_groups

FIELDS = (
    "tokens", *workloads.SHAPE_FIELDS, "cmp_groups", "pass", "max_workspace_gib", "fits", "ms",
    "peak_gib", "reserved_gib", *environment.FIELDS,
)  # fmt: skip
MARK = "result: "


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    if options.single is not None:
        print(MARK + json.dumps(run_single(options)))
        return
    table = Table(options.csv, FIELDS)
    gated = False

    def fits(length: int) -> bool:
        nonlocal gated
        row = run_child(length, options, sys.argv[1:] if argv is None else argv, gate=not gated)
        gated = True
        table.add(row)
        tqdm.write(describe(row), file=sys.stdout)
        return row["fits"] == "yes"

    longest = search(fits, options.start, options.limit, options.bisect)
    name = PASSES[options.backward]
    print(f"longest {name} that fits: {longest} tokens" if longest else f"no {name} fits")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--start", type=int, default=262144, help="the first length")
    parser.add_argument("--limit", type=int, default=1 << 24, help="no longer than this")
    parser.add_argument("--bisect", type=int, default=0, help="halvings of the last gap")
    workloads.add_shape_arguments(parser)
    parser.add_argument("--cmp-groups", type=workloads.groups_argument, default=None)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--max-workspace-gib", type=float, help="max_workspace_bytes of forward")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    # The argument of a process that measures one length.
    parser.add_argument("--single", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gate", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def search(fits: Callable[[int], bool], start: int, limit: int, halvings: int) -> int | None:
    """The longest length found to fit: ``start`` doubled, then the last gap halved.

    Args:
        fits: tries one length.
        start: the first length.
        limit: no longer length is tried.
        halvings: of the gap between the longest that fits and the shortest that does not.
    """
    longest, length = None, start
    with tqdm(unit="length") as progress:
        while length <= limit:
            progress.set_description(f"{length} tokens")
            if not fits(length):
                break
            progress.update()
            longest, length = length, 2 * length
        else:
            return longest
        for _ in range(halvings if longest is not None else 0):
            middle = (longest + length) // 2
            progress.set_description(f"{middle} tokens")
            if fits(middle):
                longest = middle
            else:
                length = middle
            progress.update()
    return longest


def run_child(length: int, options, argv: list[str], *, gate: bool) -> dict:
    """The row of one length, measured in a new process."""
    command = [sys.executable, __file__, *argv, "--single", str(length)]
    command = [*command, "--gate"] if gate else command
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode or not lines:
        sys.exit(f"{length} tokens failed for another reason than memory:\n{result.stderr}")
    row = dict(tokens=length, max_workspace_gib=options.max_workspace_gib)
    row |= dict(
        cmp_groups=describe_groups(options.cmp_groups), **{"pass": PASSES[options.backward]}
    )
    return row | workloads.shape_columns(options) | json.loads(lines[-1].removeprefix(MARK))


def run_single(options) -> dict:
    """Measure one length in this process."""
    config = workloads.make_config(options, options.cmp_groups)
    if options.gate:
        check_accuracy(options, config)
    extra = {}
    if options.max_workspace_gib is not None:
        extra["max_workspace_bytes"] = int(options.max_workspace_gib * 2**30)
    result = dict(fits="no", ms=None, peak_gib=None, reserved_gib=None)
    try:
        tensors = workloads.make_tensors((1, options.single), options, backward=options.backward)
        step = workloads.make_step(workloads.nsa_attention(tensors, config, **extra), tensors)
        step()
        milliseconds, peak = timed_with_peak(step)
    except torch.OutOfMemoryError:
        return result | environment.columns()
    reserved = torch.cuda.max_memory_reserved() / 2**30
    result |= dict(fits="yes", ms=f"{milliseconds:.2f}", peak_gib=f"{peak:.3f}")
    return result | dict(reserved_gib=f"{reserved:.3f}") | environment.columns()


def describe(row: dict) -> str:
    """A line for the terminal."""
    if row["fits"] == "no":
        return f"{row['tokens']:>10} tokens {row['pass']}: out of memory"
    return (
        f"{row['tokens']:>10} tokens {row['pass']}: {row['ms']} ms, peak {row['peak_gib']} GiB, "
        f"reserved {row['reserved_gib']} GiB"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
