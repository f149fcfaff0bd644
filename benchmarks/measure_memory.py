"""Print the peak memory of a forward and backward pass of the reference on a CPU.

    python benchmarks/measure_memory.py --tokens 16384

Each configuration runs in its own process. The peak resident set also counts the interpreter and
PyTorch.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

import nsa
from nsa.testing import make_inputs

CONFIGS = {"default": nsa.NSAConfig, "paper": nsa.NSAConfig.paper}


def measure(args: argparse.Namespace) -> str:
    """Run one configuration in this process and describe it."""
    dtype = getattr(torch, args.dtype)
    shape = (args.batch_size, args.tokens), args.heads, args.kv_heads, args.head_dim
    q, k, v = make_inputs(*shape, dtype=dtype, requires_grad=True)
    before = peak_gib()
    started = time.perf_counter()
    out = nsa.forward(q, k, v, config=CONFIGS[args.config](), backend="reference")
    forward = time.perf_counter()
    out.sum().backward()
    ended = time.perf_counter()
    return (
        f"{args.config}: peak {peak_gib():.2f} GiB ({before:.2f} GiB before the first call), "
        f"forward {forward - started:.1f} s, backward {ended - forward:.1f} s"
    )


def peak_gib() -> float:
    """Largest resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", choices=(*CONFIGS, "all"), default="all")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, ...")
    args = parser.parse_args()
    if args.config != "all":
        print(measure(args))
        return 0
    print(
        f"{args.batch_size} x {args.tokens} tokens, H={args.heads}, H_kv={args.kv_heads}, "
        f"D={args.head_dim}, {args.dtype}, {torch.get_num_threads()} threads"
    )
    for config in CONFIGS:
        # The last --config counts. Each process has its own peak.
        subprocess.run([sys.executable, *sys.argv, "--config", config], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
