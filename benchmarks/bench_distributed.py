"""Context parallelism beside one GPU: time, bytes, memory and communication that nothing hides.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py --length 262144 --selection token \
        --heads 64 --kv-heads 4

The first rank computes the whole sequence alone, then all ranks compute it together with
``nsa.distributed.forward``. Times are medians of calls in a row, peaks the largest of the ranks.
"sent" is what the first rank receives of keys and blocks from the others, and sends to them in
sums. "exposed" is the share of the time in which NCCL's kernels run and no other kernel does, from
a profile of one more call.
Nothing is reported unless the ranks first agree with one GPU on a short sequence.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import distributed
from torch.profiler import ProfilerActivity, profile

import nsa
from measuring import environment, workloads
from measuring.timing import timed_in_a_row, timed_with_peak
from nsa.distributed import collectives

CHECKED = 16384
"""Tokens of a rank that are compared with one GPU: enough for a call for each of its pieces."""


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    # As docs/several-gpus.md advises.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    distributed.init_process_group("cpu:gloo,cuda:nccl")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    if rank == 0:
        print(torch.cuda.get_device_name(), "x", ranks, "commit", environment.commit())
        print(f"{options.selection} mode, {options.length} tokens, {options.heads} heads, "
              f"{options.kv_heads} KV heads, {options.head_dim} channels")  # fmt: skip
    for backward in (name == workloads.PASSES[1] for name in options.passes):
        check(options, backward)
        alone = None
        if rank == 0 and not options.skip_alone:
            alone = measure_alone(options, backward)
        waiting()
        together = measure_together(options, backward)
        if rank == 0:
            report(workloads.PASSES[backward], alone, together)
    distributed.destroy_process_group()


def shared_attention(tensors: workloads.Tensors, options) -> Callable[[], torch.Tensor]:
    """The attention of this rank's part."""
    q, k, v, weight = tensors.leaves
    arguments = dict(order=options.order, config=workloads.make_config(options), backend="fused")
    group = distributed.group.WORLD
    return lambda: nsa.distributed.forward(
        q, k, v, mesh=group, gate_proj_weight=weight, **arguments
    )


def check(options, backward: bool):
    """Exit unless this rank's output and gradients are those of one GPU, to rounding."""
    length = CHECKED * distributed.get_world_size()
    whole = workloads.make_tensors((1, length), options, backward=backward)

    def part(x: torch.Tensor) -> torch.Tensor:
        return nsa.distributed.shard(x.detach(), distributed.group.WORLD, 1, options.order)

    q, k, v = (part(x).requires_grad_() for x in whole.leaves[:3])
    dout = part(whole.dout) if backward else None
    own = whole._replace(q=q, k=k, v=v, dout=dout)
    config = workloads.make_config(options)
    sides = []
    for tensors, attention in (
        (whole, workloads.nsa_attention(whole, config)),
        (own, shared_attention(own, options)),
    ):
        out = attention()
        inputs = tensors.leaves[:3]
        grads = torch.autograd.grad(out, inputs, tensors.dout) if backward else ()
        sides.append([out.detach(), *grads])
    for name, expected, found in zip(("out", "dq", "dk", "dv"), *sides, strict=False):
        wanted = part(expected).double()
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        # A near tie of two blocks' scores may fall differently for a few queries.
        if not error < 0.02:
            raise SystemExit(f"{name} of the ranks differs from one GPU's by {error:.4f}")


def measure_alone(options, backward: bool) -> tuple[float, float]:
    """Milliseconds and peak GiB of the whole sequence on this GPU."""
    tensors = workloads.make_tensors((1, options.length), options, backward=backward)
    attention = workloads.nsa_attention(tensors, workloads.make_config(options))
    step = workloads.make_step(attention, tensors)
    result = time_and_peak(step, options.repeats)
    del tensors, attention, step
    torch.cuda.empty_cache()
    return result


def measure_together(options, backward: bool) -> dict:
    """Milliseconds, the largest peak in GiB, bytes and the exposed share of all ranks."""
    own = options.length // distributed.get_world_size()
    tensors = workloads.make_tensors((1, own), options, backward=backward)
    step = workloads.make_step(shared_attention(tensors, options), tensors)
    milliseconds, peak = time_and_peak(step, options.repeats)
    sent = bytes_sent(step)
    exposed = exposed_share(step)
    slowest = torch.tensor([milliseconds, peak, exposed], dtype=torch.float64)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    return dict(zip(("ms", "gib", "exposed"), slowest.tolist(), strict=True)) | {"sent": sent}


def time_and_peak(step: Callable, repeats: int) -> tuple[float, float]:
    step()
    _, peak = timed_with_peak(step)
    return statistics.median(timed_in_a_row(step, repeats, settle=1)), peak


def bytes_sent(step: Callable) -> int:
    """Bytes that this rank exchanges with others in one call."""
    others = distributed.get_world_size() - 1
    found = []

    def counted(original, parts: int):
        def call(out, x, **options):
            swaps = "output_split_sizes" in options
            found.append(out.nbytes if swaps else x.nbytes // parts * others)
            return original(out, x, **options)

        return call

    # Each part of the others' sums goes to its rank; a gathered tensor goes to all.
    parts = {"all_gather": 1, "reduce_scatter": others + 1, "all_to_all": others + 1}
    with ExitStack() as stack:
        for name, count in parts.items():
            original = getattr(collectives, name)
            stack.enter_context(patch.object(collectives, name, counted(original, count)))
        step()
    return sum(found)


def exposed_share(step: Callable) -> float:
    """The share of the GPU's time in which only communication runs."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end, "nccl" in event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return only_communication(spans)


def only_communication(spans: list[tuple[float, float, bool]]) -> float:
    """The share of the time from first to last in which only spans marked True lie."""
    if not spans:
        return float("nan")  # the profiler sees no kernels here
    edges = sorted((at, step, nccl) for a, b, nccl in spans for at, step in ((a, 1), (b, -1)))
    active, exposed = {True: 0, False: 0}, 0.0
    before = edges[0][0]
    for at, step, nccl in edges:
        if active[True] and not active[False]:
            exposed += at - before
        active[nccl] += step
        before = at
    return exposed / (edges[-1][0] - edges[0][0])


def report(name: str, alone: tuple[float, float] | None, together: dict):
    line = (
        f"{name:17s} {together['ms']:9.2f} ms {together['gib']:7.2f} GiB a rank, "
        f"{together['sent'] / 1e6:8.1f} MB sent, {100 * together['exposed']:5.1f} % exposed"
    )
    if alone is not None:
        line += (
            f"; one GPU {alone[0]:9.2f} ms {alone[1]:7.2f} GiB: {alone[0] / together['ms']:.3f} "
            f"times as fast, {together['gib'] / alone[1]:.2f} of the memory"
        )
    print(line, flush=True)


def waiting():
    """Wait for all ranks without work for the GPU."""
    torch.cuda.synchronize()
    distributed.all_reduce(torch.zeros(1))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=262144, help="tokens of the sequence")
    parser.add_argument("--order", default="head-tail")
    parser.add_argument("--passes", nargs="+", choices=workloads.PASSES, default=workloads.PASSES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--skip-alone", action="store_true", help="for lengths that do not fit one GPU"
    )
    workloads.add_shape_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
