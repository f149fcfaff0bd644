"""The cost of packed sequences for a stack of layers: a bare tensor of boundaries, or a Packing.

    python benchmarks/bench_packing.py

A step is a forward and backward of 12 layers of ``NativeSparseAttention`` on sequences of mixed
length. It runs with each way to give boundaries: a batch with the same number of tokens, one
``nsa.Packing`` for all steps, a new one in each step, and a bare tensor with and without
``max_seqlen``. The ways take turns, so that the GPU's clock and the host's load affect all equally.
The script prints the median and the 95th percentile of the wall time of a step, in ms.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import nsa
from measuring import environment
from nsa.testing import make_cu_seqlens

LENGTHS = (7000, 300, 1, 3083, 4000, 1500, 400, 100)
PRESETS = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    print(torch.cuda.get_device_name(), "commit", environment.commit())
    for mode, preset in PRESETS.items():
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(
            nsa.NativeSparseAttention(
                options.dim, options.heads, options.kv_heads, preset(), backend="fused",
                device="cuda", dtype=torch.bfloat16,
            )
            for _ in range(options.layers)
        )  # fmt: skip
        times = bench(ways(layers, options.dim), options.repeats)
        for way, milliseconds in times.items():
            median = statistics.median(milliseconds)
            late = sorted(milliseconds)[int(0.95 * len(milliseconds))]
            print(f"{mode:6s} {way:24s} {median:8.2f} {late:8.2f}")


def ways(layers: torch.nn.ModuleList, dim: int) -> dict[str, Callable[[], None]]:
    """A step for each way to give the boundaries."""
    total, longest = sum(LENGTHS), max(LENGTHS)
    x = torch.randn(total, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = make_cu_seqlens(list(LENGTHS), "cuda")
    packing = nsa.Packing(cu_seqlens)

    def step(x: torch.Tensor, *boundaries):
        hidden = x
        for layer in layers:
            hidden = hidden + layer(hidden, *boundaries)
        hidden.sum().backward()

    return {
        "batch": lambda: step(x[None]),
        "one Packing": lambda: step(x, packing),
        "a Packing each step": lambda: step(x, nsa.Packing(cu_seqlens)),
        "tensor and max_seqlen": lambda: step(x, cu_seqlens, longest),
        "tensor": lambda: step(x, cu_seqlens),
    }


def bench(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each repetition of each step. The steps take turns."""
    times = {name: [] for name in steps}
    for repetition in range(repeats + 3):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            if repetition >= 3:  # the first ones compile
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
