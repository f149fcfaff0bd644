"""Where the memory of a forward and backward goes: stages, saved tensors, allocator, driver.

    python benchmarks/diagnose_memory.py --length 131072

After the accuracy gate, the script prints:

- each stage in the order of calls: memory allocated before and after, and the peak inside above
  that before; then the peak of each pass, and the stage in which it lies;
- the estimated workspace (memory that is neither input nor result), and the actual one;
- the tensors that forward keeps for backward, with inputs as a separate entry;
- device memory that PyTorch's allocator does not hold: the CUDA context, and the code of kernels,
  which grows as they are compiled or loaded (on a shared GPU, also memory of other processes); and
  the most that the allocator holds, beside the most that is allocated;
- the size of the cache of compiled kernels on disk.

The CSV has one row for each line:

- section: "stage", "planned", "saved", "device" or "disk"; name
- tokens, selection, heads, kv_heads, head_dim, dtype, cmp_groups: batch 1
- before_gib, peak_gib (above before), after_gib; a single size is in after_gib
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from getpass import getuser
from pathlib import Path

import torch
from tqdm import tqdm

from measuring import environment, stages, workloads
from measuring.gate import check_accuracy
from measuring.tables import Table, rounded
from measuring.variants import kernel_variants
from measuring.workloads import describe_groups
from nsa.fused import memory, schedule

FIELDS = (
    "section", "name", "tokens", *workloads.SHAPE_FIELDS, "cmp_groups", "before_gib", "peak_gib",
    "after_gib", *environment.FIELDS,
)  # fmt: skip
GIB = 2**30
NOTABLE = 2**20
"""Bytes from which on memory that is no stage's is listed."""


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    with tqdm(total=4, unit="phase") as progress:
        rows = diagnose(options, lambda name: (progress.set_description(name), progress.update()))
    report(rows, options)


def diagnose(options, announce: Callable[[str], object]) -> list[tuple]:
    """(section, name, bytes before, peak above that, bytes after) of each line of the report."""
    torch.cuda.init()
    config = workloads.make_config(options, options.cmp_groups)
    device = [("CUDA context, before the first kernel", unaccounted_bytes())]
    announce("accuracy gate")
    check_accuracy(options, config)
    device.append(("after the accuracy gate, its kernels loaded", unaccounted_bytes()))
    extra = {}
    if options.max_workspace_gib is not None:
        extra["max_workspace_bytes"] = int(options.max_workspace_gib * GIB)
    tensors = workloads.make_tensors((1, options.length), options, backward=True)
    attention = workloads.nsa_attention(tensors, config, **extra)
    announce("whole passes")
    planned, peaks = plan_and_peaks(workloads.make_step(attention, tensors), tensors)
    device.append((f"after {options.length} tokens", unaccounted_bytes()))
    announce("stages")
    rows = [("stage", *line) for line in stage_memory(attention, tensors)]
    announce("saved tensors")
    sections = dict(
        planned=planned,
        saved=saved_tensors(attention, tensors),
        device=device + peaks,
        disk=disk_bytes(),
    )
    for section, lines in sections.items():
        rows += [(section, name, None, None, size) for name, size in lines]
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=131072)
    workloads.add_shape_arguments(parser)
    parser.add_argument("--cmp-groups", type=workloads.groups_argument, default=None)
    parser.add_argument("--max-workspace-gib", type=float, help="max_workspace_bytes of forward")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


class StagePeaks:
    """Allocated memory around each stage, and the peak in it. "rest" is between stages."""

    def __init__(self):
        self.lines: list[tuple[str, int, int, int]] = []  # name, before, peak above it, after
        self.nested = 0

    def run(self, name: str, step: Callable[[], object]):
        """Call ``step`` and note each stage in it as ``name/stage``."""
        self.run_name = name
        with stages.watch(self._enter, self._leave, parts=False):
            self._open("rest")
            result = step()
            self._close()
        return result

    def _enter(self, name: str):
        self.nested += 1
        if self.nested == 1:
            self._close()
            self._open(name)

    def _leave(self, _name: str):
        self.nested -= 1
        if self.nested == 0:
            self._close()
            self._open("rest")

    def _open(self, name: str):
        self.name, self.before = f"{self.run_name}/{name}", torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def _close(self):
        peak = torch.cuda.max_memory_allocated() - self.before
        self.lines.append((self.name, self.before, peak, torch.cuda.memory_allocated()))


def stage_memory(attention: Callable, tensors) -> list[tuple[str, int, int, int]]:
    """(name, bytes before, peak above that, bytes after) of each stage, in order of calls."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    peaks = StagePeaks()
    out = peaks.run("forward", attention)
    peaks.run("backward", lambda: torch.autograd.grad(out, tensors.leaves, tensors.dout))
    # Little happens between stages, so only growth there is of interest.
    return [line for line in peaks.lines if not line[0].endswith("/rest") or line[2] >= NOTABLE]


def saved_tensors(attention: Callable, tensors) -> list[tuple[str, int]]:
    """(description, bytes) of what forward saves for backward; inputs are one entry."""
    inputs = {x.untyped_storage().data_ptr() for x in tensors.leaves}
    found = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        name = f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
        found.setdefault(storage.data_ptr(), (name, storage.nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention()
    lines = [line for pointer, line in found.items() if pointer not in inputs and line[1]]
    kept = sum(size for pointer, (_, size) in found.items() if pointer in inputs)
    return [*lines, ("inputs, which the caller holds anyway", kept)]


def unaccounted_bytes() -> int:
    """Device memory in use that PyTorch's allocator does not hold."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def plan_and_peaks(step: Callable, tensors) -> tuple[list, list]:
    """(name, bytes) of the estimate for a pass, and of what a second pass takes."""
    with (
        stages.results_of(schedule.make_schedule) as schedules,
        stages.results_of(memory.workspace_bytes) as estimates,
    ):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    # The output, and a gradient of each input.
    results = tensors.q.nbytes + sum(x.nbytes for x in tensors.leaves)
    planned = [("measured: peak without inputs and results", peak - before - results)]
    if estimates:
        planned.insert(0, (f"estimated, {schedules[-1]}", estimates[-1]))
    return planned, [("peak allocated", peak), ("peak reserved by the allocator", reserved)]


def disk_bytes() -> list[tuple[str, int]]:
    """Size of the kernel cache on disk, and whether this process uses it."""
    enabled = os.environ.get("QUACK_CACHE_ENABLED", "1") == "1"
    default = Path(tempfile.gettempdir()) / getuser() / "quack_cache"
    path = Path(os.environ.get("QUACK_CACHE_DIR") or default)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    state = "on" if enabled else "off"
    return [(f"kernel cache ({state}), {len(files)} files", sum(f.stat().st_size for f in files))]


def report(rows: list[tuple], options):
    """Print the lines section by section and write them to the CSV."""
    table = Table(options.csv, FIELDS)
    common = dict(tokens=options.length, cmp_groups=describe_groups(options.cmp_groups))
    common |= workloads.shape_columns(options) | environment.columns()
    titles = dict(
        stage="stages: GiB before, peak above that, after",
        planned="workspace of forward and backward, GiB",
        saved="saved for backward, GiB",
        device="device memory that PyTorch does not hold, then what it does, GiB",
        disk="on disk, GiB",
    )
    section = None
    for row in rows:
        if row[0] != section:
            section = row[0]
            print(f"\n{titles[section]}")
        sizes = [None if size is None else rounded(size / GIB, 4) for size in row[2:]]
        print(f"  {row[1]:<52}" + "".join(f"{size:>12}" for size in sizes if size is not None))
        columns = dict(zip(("before_gib", "peak_gib", "after_gib"), sizes, strict=True))
        table.add(common | dict(section=section, name=row[1]) | columns)
    print()
    for name in ("forward", "backward"):
        part = [row[1:4] for row in rows if row[0] == "stage" and row[1].startswith(f"{name}/")]
        stage, before, peak = max(part, key=lambda line: line[1] + line[2])
        print(f"peak of {name}: {(before + peak) / GIB:.3f} GiB, in {stage}")
    print(f"kernel variants compiled or loaded: {sum(kernel_variants().values())}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
