"""Cost of packed sequences of mixed length beside a batch of equal ones, per attended key.

    python tools/bench_varlen.py --total 262144 --sequences 64 --longest 32768

Work is the number of (query, key) pairs of the three branches; the same tokens, heads and
configuration on both sides, medians of interleaved repetitions.
"""

import argparse
import random
import statistics

import torch

import nsa
from bench_vs_dense import timed
from nsa.testing import make_cu_seqlens, make_inputs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--total", type=int, default=262144, help="tokens on each side")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    config = nsa.NSAConfig()
    mixed = mixed_lengths(options)
    equal = [options.longest] * (options.total // options.longest)
    shape = (options.heads, options.kv_heads, options.head_dim)
    kind = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
    packed = make_inputs((options.total,), *shape, **kind)
    batched = make_inputs((len(equal), options.longest), *shape, **kind)
    extra = dict(cu_seqlens=make_cu_seqlens(mixed, "cuda"), max_seqlen=options.longest)
    print(f"packed: {len(mixed)} sequences of {min(mixed)} to {max(mixed)} tokens")
    for name, step in (("forward", forward), ("forward+backward", forward_backward)):
        calls = (
            lambda: step(packed, config, **extra),  # noqa: B023
            lambda: step(batched, config),  # noqa: B023
        )
        per_key = []
        for call, lengths in zip(calls, (mixed, equal), strict=True):
            call()
            time = statistics.median(timed(call) for _ in range(options.repeats))
            work = options.heads * sum(attended_keys(length, config) for length in lengths)
            per_key.append(time / work)
            print(f"{name:<17} {time:9.2f} ms  {work / 1e9:8.1f} G pairs  {1e9 * time / work:.4f}")
        print(f"{name:<17} packed / batched per attended key: {per_key[0] / per_key[1]:.3f}")


def mixed_lengths(options) -> list[int]:
    """Log-uniform lengths from 1 to the longest, one of each included, that sum to the total."""
    rng = random.Random(0)
    lengths = [1, options.longest]
    while len(lengths) < options.sequences:
        lengths.append(int(options.longest ** rng.random()))
    while sum(lengths) != options.total:
        index = rng.randrange(2, len(lengths))
        lengths[index] += options.total - sum(lengths)
        lengths[index] = min(max(lengths[index], 1), options.longest)
    rng.shuffle(lengths)
    return lengths


def attended_keys(length: int, config: nsa.NSAConfig) -> int:
    """(query, key) pairs of one head in the three branches of one causal sequence."""
    position = torch.arange(1, length + 1)
    compressed = position // config.compress_block_size
    selected = position.clamp(max=config.num_selected_blocks * config.select_block_size)
    window = position.clamp(max=config.window_size)
    return int((compressed + selected + window).sum())


def forward(tensors, config, **extra):
    with torch.no_grad():
        nsa.forward(*tensors, config=config, backend="fused", **extra)


def forward_backward(tensors, config, **extra):
    out = nsa.forward(*tensors, config=config, backend="fused", **extra)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


if __name__ == "__main__":
    main()
