"""Run training steps of both modes under NVIDIA's compute-sanitizer: bad accesses and races.

    python tools/sanitize.py                # memcheck, then racecheck
    python tools/sanitize.py racecheck

A step is a forward and backward of few packed sequences of odd lengths, with ``NSAConfig.paper()``
in token mode and ``NSAConfig()`` in tile mode; one of a batch in token mode; one of a layer in each
mode, packed; and one of ``nsa.selected_attention`` with blocks of 128 keys, the first of each
sequence and the token's own, packed. The steps run once without a tool, to show that they run at
all, and then under each tool. Kernels are compiled with source lines, which
reports name, and kept in ``OUTPUT/kernels``.

The script prints a line and the reports for each tool, and writes the tool's full output to
``OUTPUT/TOOL.log``. It exits with 1 if a tool reports an error or does not finish. Reports about
``KNOWN`` kernels of others are counted separately, and not as errors.

compute-sanitizer is part of the CUDA toolkit. It must be on the PATH or in ``CUDA_HOME/bin``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import nsa
from nsa.testing import make_cu_seqlens, make_inputs

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LENGTHS = [300, 0, 1, 65, 700, 31]
BATCH = (2, 300)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
DIM = 128
"""Channels of the layers."""
MODES = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}
DONE = "all steps ran"

# FlashAttention-4's backward loads log-sum-exps with cp.async.bulk, and the class derived from it
# loads more of them so. racecheck does not follow their order after an mbarrier across warps, nor
# that of the products of cuBLAS, whose kernels are named nvjet.
KNOWN = {
    "racecheck": r"FlashAttentionBackwardSm90|flash_bwd_sm90|BackwardWithNearBlocks|at nvjet_sm90_"
}

MARK = "========="
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


class Verdict(NamedTuple):
    """The result of a tool: reports that count, reports about known kernels, why it failed."""

    reports: list[str]
    known: list[str]
    failure: str | None

    @property
    def passed(self) -> bool:
        return not self.reports and self.failure is None


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    require_gpu()
    if options.step:
        run_steps("cuda")
        return
    sanitizer = find_sanitizer()
    if subprocess.run(step_command(), env=step_environment(options.output)).returncode:
        sys.exit("the steps fail under no tool")
    passed = True
    for tool in options.tools or TOOLS[:2]:
        verdict = check(sanitizer, tool, options.output)
        print("\n".join(describe(tool, verdict)), flush=True)
        passed &= verdict.passed
    sys.exit(not passed)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", help=f"{', '.join(TOOLS)}; default the first two")
    parser.add_argument("--output", type=Path, default=Path("outputs/sanitizer"), help="for logs")
    parser.add_argument("--step", action="store_true", help="only run the steps, under no tool")
    options = parser.parse_args(argv)
    for tool in options.tools:
        if tool not in TOOLS:
            parser.error(f"no tool {tool!r}: choose from {', '.join(TOOLS)}")
    return options


def run_steps(device: str):
    """A forward and backward of each kind."""
    torch.manual_seed(0)
    cu_seqlens = make_cu_seqlens(LENGTHS, device)
    packed = (sum(LENGTHS),)
    for name, leading in (("token", BATCH), ("token", packed), ("tile", packed)):
        q, k, v = make_inputs(
            leading, HEADS, KV_HEADS, HEAD_DIM,
            dtype=torch.bfloat16, device=device, requires_grad=True,
        )  # fmt: skip
        weight = torch.randn(HEADS, 3, HEAD_DIM, device=device, dtype=q.dtype, requires_grad=True)
        out = nsa.forward(
            q, k, v, config=MODES[name](), gate_proj_weight=weight,
            cu_seqlens=cu_seqlens if leading is packed else None, backend="fused",
        )  # fmt: skip
        check_finite(f"{name} mode", [out], (q, k, v, weight))
    for name, config in MODES.items():
        kind = dict(device=device, dtype=torch.bfloat16)
        layer = nsa.NativeSparseAttention(
            DIM, HEADS, KV_HEADS, config(), head_dim=HEAD_DIM, backend="fused", **kind
        )
        x = torch.randn(*packed, DIM, **kind, requires_grad=True)
        check_finite(f"a {name} layer", [layer(x, cu_seqlens)], (x, *layer.parameters()))
    own = torch.cat([torch.arange(n, device=device) // 128 for n in LENGTHS])
    lists = torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], dim=-1).int()
    lists = lists[:, None].expand(-1, KV_HEADS, -1)
    options = dict(block_size=128, cu_seqlens=cu_seqlens, backend="fused")
    results = nsa.selected_attention(q, k, v, lists, **options)
    check_finite("selected_attention", results, (q, k, v))
    print(DONE)


def check_finite(name: str, results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]):
    """Exit if a result is not finite, or a gradient of the inputs."""
    grads = torch.autograd.grad(sum(x.float().square().sum() for x in results), inputs)
    if not all(x.isfinite().all() for x in (*results, *grads)):
        sys.exit(f"{name}: a result is not finite")


def require_gpu():
    """Exit with a message if there is no GPU to run on."""
    if not torch.cuda.is_available():
        sys.exit("the steps run on the fused backend and need an NVIDIA GPU; PyTorch sees none")


def step_command() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--step"]


def step_environment(output: Path) -> dict[str, str]:
    # Kernels in the default cache were compiled without source lines.
    kernels = str((output / "kernels").resolve())
    return os.environ | {
        # Each tensor is its own allocation, so that the tool sees reads past its end.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "CUTE_DSL_LINEINFO": "1",
        "QUACK_CACHE_DIR": kernels,
    }


def find_sanitizer() -> str:
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"]
    found = shutil.which("compute-sanitizer") or next((str(x) for x in places if x.exists()), None)
    if found is None:
        sys.exit(f"found no compute-sanitizer, neither on the PATH nor as {places[0]}")
    return found


def check(sanitizer: str, tool: str, output: Path) -> Verdict:
    """Run the steps under a tool of the sanitizer, and judge its output."""
    output.mkdir(parents=True, exist_ok=True)
    kept = step_environment(output)
    command = [sanitizer, "--tool", tool, "--print-limit", "1000", *step_command()]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kept
    )
    (output / f"{tool}.log").write_text(result.stdout)
    return judge(tool, result.stdout, result.returncode)


def judge(tool: str, said: str, code: int) -> Verdict:
    """The verdict on the output ``said`` of a tool and the exit ``code`` of the steps."""
    reports, totals = split_reports(said), [int(x) for x in SUMMARY.findall(said)]
    pattern = KNOWN.get(tool)
    known = [x for x in reports if pattern and re.search(pattern, x)]
    failure = None
    if DONE not in said:
        failure = f"the steps did not come to their end (exit code {code})"
    elif not totals:
        failure = "it printed no summary"
    elif sum(totals) > len(reports):
        failure = f"it counts {sum(totals)} errors, of which {len(reports)} were found in its log"
    return Verdict([x for x in reports if x not in known], known, failure)


def split_reports(said: str) -> list[str]:
    """The reports in a tool's output: each is a marked line and the indented lines after it."""
    reports = []
    for line in said.splitlines():
        text = line.removeprefix(f"{MARK} ").rstrip()
        if not line.startswith(f"{MARK} ") or text == "COMPUTE-SANITIZER" or SUMMARY.search(text):
            continue
        if text.startswith(" ") and reports:
            reports[-1] += f"\n{text}"
        elif text:
            reports.append(text)
    return reports


def describe(tool: str, verdict: Verdict) -> list[str]:
    """Lines for the terminal: the tool's verdict, then each report."""
    lines = []
    for kind, reports in (("report", verdict.reports), ("known report", verdict.known)):
        for report in reports:
            lines += [f"  {kind}:", *(f"    {line}" for line in report.splitlines())]
    if verdict.failure:
        lines.append(f"  {verdict.failure}")
    word = "passed" if verdict.passed else "FAILED"
    counts = f"{len(verdict.reports)} reports, {len(verdict.known)} about known kernels of others"
    return [*lines, f"{tool}: {word}, {counts}"]


if __name__ == "__main__":
    main()
