"""Time and peak memory of nsa's fused backend beside FlashAttention-4 dense causal attention.

Same tensors, same run, medians of interleaved repetitions. Nothing is reported unless the fused
output first passes against the float64 reference. One CSV row for each length and pass.

    python tools/bench_vs_dense.py --lengths 8192 32768 131072 --csv dense.csv
"""

import argparse
import csv
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

import nsa
from nsa.testing import assert_as_accurate, make_inputs

FIELDS = (
    "tokens", "heads", "kv_heads", "head_dim", "dtype", "cmp_groups", "pass",
    "dense_p20_ms", "dense_p50_ms", "dense_p80_ms", "nsa_p20_ms", "nsa_p50_ms", "nsa_p80_ms",
    "speedup", "dense_peak_gib", "nsa_peak_gib", "gpu", "torch", "flash_attn_4", "nsa_commit",
    "time",
)  # fmt: skip


def main():
    options = parse_arguments()
    torch.manual_seed(0)
    config = nsa.NSAConfig(num_cmp_selected_blocks=options.cmp_groups)
    check_accuracy(options, config)
    rows = []
    progress = tqdm(options.lengths, unit="length")
    for length in progress:
        progress.set_description(f"{length} tokens")
        for row in bench_length(length, options, config):
            rows.append(row)
            tqdm.write(describe(row))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--cmp-groups", type=int, help="num_cmp_selected_blocks; default: dense")
    parser.add_argument("--repeats", type=int, default=10, help="at most; fewer where one is long")
    parser.add_argument("--seconds", type=float, default=8, help="for each length and pass")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args()


def inputs(length: int, options) -> tuple[torch.Tensor, ...]:
    dtype = getattr(torch, options.dtype)
    shape = (options.heads, options.kv_heads, options.head_dim)
    q, k, v = make_inputs((1, length), *shape, dtype=dtype, device="cuda", requires_grad=True)
    weight = torch.randn(options.heads, 3, options.head_dim, device="cuda") * options.head_dim**-0.5
    return q, k, v, weight.to(dtype).requires_grad_()


def check_accuracy(options, config, length: int = 2048):
    """The gate: fused output and gradients against the reference, with its block indices."""
    tensors = inputs(length, options)
    indices = nsa.select_blocks(*tensors[:2], config=config, backend="reference")
    results = []
    for dtype, backend in (
        (torch.float64, "reference"),
        (tensors[0].dtype, "reference"),
        (tensors[0].dtype, "fused"),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = nsa.forward(
            *leaves[:3], config=config, gate_proj_weight=leaves[3], block_indices=indices,
            backend=backend,
        )  # fmt: skip
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for name, exact, same_dtype, actual in zip(
        ("out", "dq", "dk", "dv", "dgate_proj_weight"), *results, strict=True
    ):
        assert_as_accurate(name, actual, same_dtype, exact)


def bench_length(length: int, options, config) -> list[dict]:
    q, k, v, weight = inputs(length, options)
    dout = torch.randn_like(q)
    from flash_attn.cute import flash_attn_func

    def dense():
        return flash_attn_func(q, k, v, causal=True)[0]

    def sparse():
        return nsa.forward(q, k, v, config=config, gate_proj_weight=weight, backend="fused")

    leaves = (q, k, v, weight)

    def forward(function):
        with torch.no_grad():
            function()

    def forward_backward(function):
        torch.autograd.grad(function(), leaves, dout, allow_unused=True)

    rows = []
    for name, step in (("forward", forward), ("forward+backward", forward_backward)):
        times, peaks = measure([lambda: step(dense), lambda: step(sparse)], options)  # noqa: B023
        rows.append(make_row(length, name, times, peaks, options))
    return rows


def measure(functions: list, options) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of interleaved repetitions, and peak GiB, of each function."""
    peaks, first = [], []
    for function in functions:
        function()  # compiles
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        first.append(timed(function))
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    repeats = max(3, min(options.repeats, int(options.seconds * 1000 / sum(first))))
    times = [[] for _ in functions]
    for _ in range(repeats):
        for series, function in zip(times, functions, strict=True):
            series.append(timed(function))
    return times, peaks


def timed(function) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make_row(length: int, name: str, times, peaks, options) -> dict:
    quantiles = [statistics.quantiles(series, n=10, method="inclusive") for series in times]
    (dense, sparse) = [(q[1], q[4], q[7]) for q in quantiles]
    numbers = [f"{x:.3f}" for x in (*dense, *sparse)]
    values = (
        length, options.heads, options.kv_heads, options.head_dim, options.dtype,
        options.cmp_groups, name, *numbers, f"{dense[1] / sparse[1]:.2f}",
        *(f"{peak:.2f}" for peak in peaks), torch.cuda.get_device_name(), torch.__version__,
        metadata.version("flash-attn-4"), commit(), time.strftime("%Y-%m-%dT%H:%M:%S"),
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or "unknown"


def describe(row: dict) -> str:
    return (
        f"{row['tokens']:>8} tokens {row['pass']:<17} dense {row['dense_p50_ms']:>9} ms "
        f"{row['dense_peak_gib']:>6} GiB   nsa {row['nsa_p50_ms']:>9} ms "
        f"{row['nsa_peak_gib']:>6} GiB   {row['speedup']}x"
    )


if __name__ == "__main__":
    main()
