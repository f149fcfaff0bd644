"""Time and memory that each of several ranks would take, from one GPU.

    python benchmarks/model_ranks.py --length 262144 --selection token --heads 64 --kv-heads 4
    python benchmarks/model_ranks.py --length 1048576 --ranks 8 --selection token --heads 64 \
        --kv-heads 4

PyTorch's "fake" process group lets this process be any rank of ``--ranks``. It runs that rank's
code, kernels, copies and collectives, which return at once. So compute and memory are measured.
Transfers are assumed: a collective takes ``--latency`` and its received bytes over ``--rate``, one
after another, beside the compute between its issue and the wait for it. Compute is slower beside
NCCL's kernels: it loses ``--contention`` times the transfers. The defaults are what two H200 showed
(NVLink, 450 GB/s in each direction by its makers): NCCL's rate, and the contention with which tile
mode's time there is met to 1 %. Not in the model: the memory of NCCL's own buffers.

Printed for each number of ranks, of the slowest of the first and the last one: milliseconds, of
which waiting; peak GiB; and the speed-up over one rank, which is measured as it is. With
``--kernels K``, the K longest kernels of the first rank and of one GPU follow.
"""

import argparse
import statistics

import torch

import nsa
from measuring import environment, ranks, workloads
from measuring.timing import timed, timed_with_peak
from profile_forward import profile_kernels


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    print(torch.cuda.get_device_name(), "commit", environment.commit())
    print(f"{options.selection} mode, {options.length} tokens, {options.heads} heads, "
          f"{options.kv_heads} KV heads, {options.head_dim} channels")  # fmt: skip
    print(
        f"transfers of {options.latency} ms, {options.rate} GB/s, {options.contention} contention"
    )
    for name in options.passes:
        alone = None
        for count in options.ranks:
            measured = [measure(rank, count, name, options) for rank in sorted({0, count - 1})]
            slowest = {key: max(x[key] for x in measured) for key in measured[0]}
            alone = slowest["ms"] if count == 1 else alone
            print(describe(name, count, slowest, alone), flush=True)


def measure(rank: int, count: int, name: str, options) -> dict[str, float]:
    """Milliseconds, those of waiting and of transfers, and the peak in GiB, of one rank."""
    backward = name == workloads.PASSES[1]
    tensors = workloads.make_tensors((1, options.length // count), options, backward=backward)
    config = workloads.make_config(options)
    if count == 1:
        step = workloads.make_step(workloads.nsa_attention(tensors, config), tensors)
        step()
        _, peak = timed_with_peak(step)
        found = dict(ms=statistics.median(timed(step) for _ in range(options.repeats)))
        found |= dict(exposed=0.0, transfers=0.0, gib=peak)
        show_kernels("one GPU", step, options)
    else:
        with ranks.one_rank(rank, count) as group:
            q, k, v, weight = tensors.leaves
            arguments = dict(order=options.order, config=config, backend="fused")

            def attention():
                return nsa.distributed.forward(
                    q, k, v, mesh=group, gate_proj_weight=weight, **arguments
                )

            step = workloads.make_step(attention, tensors)
            step()
            _, peak = timed_with_peak(step)
            link = ranks.Link(options.latency, options.rate * 1e6)
            runs = [ranks.replay(ranks.marks_of(step), link) for _ in range(options.repeats)]
            run = sorted(runs)[len(runs) // 2]
            slower = options.contention * run.transfers
            found = dict(ms=run.total + slower, exposed=run.exposed, transfers=run.transfers)
            found |= dict(gib=peak)
            if rank == 0:
                show_kernels(f"rank 0 of {count}", step, options)
    del tensors, step
    torch.cuda.empty_cache()
    return found


def show_kernels(title: str, step, options):
    if not options.kernels:
        return
    print(title)
    for kernel, launches, milliseconds in profile_kernels(step)[: options.kernels]:
        print(f"{milliseconds:10.3f} ms {launches:>5} x  {kernel[:110]}")


def describe(name: str, count: int, found: dict[str, float], alone: float | None) -> str:
    line = (
        f"{name:17s} {count:3d} ranks {found['ms']:9.2f} ms, {found['exposed']:6.2f} waiting of "
        f"{found['transfers']:7.2f} of transfers, {found['gib']:7.2f} GiB a rank"
    )
    if alone is not None:
        speed_up = alone / found["ms"]
        line += f", {speed_up:.3f} times as fast, efficiency {speed_up / count:.3f}"
    return line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=262144, help="tokens of the sequence")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--order", default="head-tail")
    parser.add_argument("--passes", nargs="+", choices=workloads.PASSES, default=workloads.PASSES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rate", type=float, default=250, help="GB/s that a rank receives")
    parser.add_argument("--latency", type=float, default=0.04, help="ms of a collective")
    parser.add_argument(
        "--contention", type=float, default=1, help="compute lost, as a share of transfers"
    )
    parser.add_argument("--kernels", type=int, default=0, metavar="K")
    workloads.add_shape_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
