"""Time of token mode's selected branch alone, compared with fla-core on the same block indices.

    pip install fla-core==0.6.0
    python benchmarks/bench_selected.py --csv selected.csv
    python benchmarks/bench_selected.py --call public --indices local --block-size 128 --shapes 64/4

Each token and KV head attends random blocks among those that start at or before it. With "forced",
they include those of the paper's rule: the first block and the last ones. With "local", they
include the token's own block. With "random", no rule applies. Ours is the stage of ``nsa.forward``,
``nsa.fused.attention.selected``, inverted index included; or with ``--call public``
``nsa.selected_attention``, which checks its arguments too. The peer is the function under
``fla.ops.nsa.parallel_nsa``, which needs at least 16 query heads per KV head. Its output and
gradients must first agree with ours. The backward is timed alone, on the results of one forward.

The CSV has one row for each shape and pass:

- tokens, selection, heads, kv_heads, head_dim, dtype, blocks, block_size: the shape, batch 1
- indices: "forced", "local" or "random"
- call: "stage" or "public"
- pass: "forward" or "backward"
- fla_p20_ms, fla_p50_ms, fla_p80_ms and the same of nsa; empty where the peer does not run
- ratio: the peer's median over ours
- tflops: ours, of useful work: for each query head and key that it attends 4 D operations forward
  and 10 D backward
- gib: gibibytes of keys and values that the selection names, once for each token and KV head, and
  gib_per_s
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time
"""

import argparse
import statistics
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import nsa
from measuring import environment, timing, workloads
from measuring.tables import Table, quantile_columns, ratio_of_medians, rounded
from measuring.workloads import Tensors
from nsa.config import NSAConfig
from nsa.fused.attention import selected_attention, selected_attention_backward
from nsa.fused.kernel_calls import row_statistics
from nsa.fused.planning import make_plan

FIELDS = (
    "tokens", *workloads.SHAPE_FIELDS, "blocks", "block_size", "indices", "call", "pass",
    *(f"{side}_{quantile}_ms" for side in ("fla", "nsa") for quantile in ("p20", "p50", "p80")),
    "ratio", "tflops", "gib", "gib_per_s", *environment.FIELDS,
)  # fmt: skip
INDICES = ("forced", "random", "local")
PEER_GROUP = 16
# The largest relative difference of two 16-bit results, in norm.
AGREEMENT = 2e-2


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    table = Table(options.csv, FIELDS)
    for heads, kv_heads in options.shapes:
        options.heads, options.kv_heads = heads, kv_heads
        for indices in options.indices:
            for row in bench(indices, options):
                table.add(row)
                print(describe(row))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument(
        "--shapes",
        type=shape_argument,
        nargs="+",
        default=[(64, 4), (32, 8)],
        metavar="H/H_KV",
        help="query heads and KV heads, as 64/4",
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--block-size", type=int, choices=(32, 64, 128), default=64)
    parser.add_argument("--blocks", type=int, default=16, help="blocks that a token attends")
    parser.add_argument("--indices", nargs="+", choices=INDICES, default=INDICES[:2])
    parser.add_argument("--call", choices=("stage", "public"), default="stage")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=3, help="for each call and its repeats")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    options.selection = "token"
    return options


def shape_argument(text: str) -> tuple[int, int]:
    """Query heads and KV heads from the command line."""
    heads, kv_heads = map(int, text.split("/"))
    return heads, kv_heads


def random_blocks(length: int, kv_heads: int, config: NSAConfig) -> Tensor:
    """Distinct blocks at or before each token, ascending, -1 at the end: ``(1, N, H_kv, n)``.

    Those that ``config`` forces are among them.
    """
    slots, size = config.num_selected_blocks, config.select_block_size
    blocks = -(-length // size)
    taken = torch.empty(1, length, kv_heads, slots, dtype=torch.int32, device=workloads.DEVICE)
    generator = torch.Generator(device=workloads.DEVICE).manual_seed(0)
    step = 4096
    for start in range(0, length, step):
        rows = torch.arange(start, min(start + step, length), device=workloads.DEVICE)
        draw = torch.rand(len(rows), kv_heads, blocks, device=rows.device, generator=generator)
        block = torch.arange(blocks, device=rows.device)
        own = (rows // size)[:, None, None]
        local = block > own - config.num_local_blocks
        draw.masked_fill_(local | (block < config.num_initial_blocks), 2)
        draw.masked_fill_(block > own, -1)
        value, index = draw.topk(min(slots, blocks), dim=-1)
        index = index.masked_fill(value < 0, blocks).sort(-1).values
        index = torch.nn.functional.pad(index, (0, slots - index.shape[-1]), value=blocks)
        taken[0, start : start + len(rows)] = index.masked_fill(index == blocks, -1).int()
    return taken


def bench(indices: str, options) -> list[dict]:
    """The rows of one shape and kind of ``INDICES``."""
    config = make_config(indices, options)
    tensors = workloads.make_tensors((1, options.length), options, backward=True)
    blocks = random_blocks(options.length, options.kv_heads, config)
    make_ours = our_steps if options.call == "stage" else public_steps
    steps = {"nsa": make_ours(tensors, blocks, config)}
    if find_spec("fla") and options.heads // options.kv_heads >= PEER_GROUP:
        steps["fla"] = peer_steps(tensors, blocks, config)
        check_agreement(*(forward_backward() for _, _, forward_backward in steps.values()))
    counted = int((blocks >= 0).sum()) * config.select_block_size
    gib = counted * 2 * options.head_dim * tensors.q.element_size() / 2**30
    rows = []
    for i, name in enumerate(("forward", "backward")):
        timings = timing.measure(
            {side: passes[i] for side, passes in steps.items()},
            repeats=options.repeats,
            seconds=options.seconds,
        )
        pairs = attended_pairs(blocks, config.select_block_size)
        work = (10 if i else 4) * options.head_dim * pairs * options.heads // options.kv_heads
        rows.append(make_row(name, indices, timings, gib, work, config, options))
    return rows


def make_config(indices: str, options) -> NSAConfig:
    """The paper's configuration with the blocks of the command line."""
    forced = {"random": (0, 0), "local": (0, 1), "forced": (1, 2)}[indices]
    return replace(
        workloads.make_config(options),
        select_block_size=options.block_size,
        num_selected_blocks=options.blocks,
        num_initial_blocks=forced[0],
        num_local_blocks=forced[1],
    )


def attended_pairs(blocks: Tensor, block_size: int) -> int:
    """Pairs of a query and a key at or before it, for one head of each KV head's group."""
    position = torch.arange(blocks.shape[1], device=blocks.device)[:, None, None]
    seen = (position - blocks * block_size + 1).clamp(max=block_size)
    return int(seen.masked_fill(blocks < 0, 0).sum())


def our_steps(tensors: Tensors, blocks: Tensor, config) -> tuple:
    """Our forward, our backward, and both with their results, as calls without arguments."""
    q, k, v = (x.detach() for x in tensors.leaves[:3])
    plan = make_plan(q, config)

    def forward():
        return selected_attention(q, k, v, blocks, plan)

    out, lse = forward()

    def backward():
        of_rows = row_statistics(tensors.dout[0], out[0], lse, None)
        return selected_attention_backward(tensors.dout, q, k, v, of_rows, blocks, plan)

    return forward, backward, lambda: (out, *backward())


def public_steps(tensors: Tensors, blocks: Tensor, config: NSAConfig) -> tuple:
    """The same for ``nsa.selected_attention``."""
    leaves = [x.detach().requires_grad_() for x in tensors.leaves[:3]]

    def attention():
        size = config.select_block_size
        return nsa.selected_attention(*leaves, blocks, block_size=size, backend="fused")[0]

    def forward():
        with torch.no_grad():
            return attention()

    out = attention()

    def backward():
        return torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)

    return forward, backward, lambda: (out.detach(), *backward())


def peer_steps(tensors: Tensors, blocks: Tensor, config) -> tuple:
    """The same for fla-core."""
    from fla.ops.nsa.parallel import ParallelNSAFunction

    leaves = [x.detach().requires_grad_() for x in tensors.leaves[:3]]
    counts = (blocks >= 0).sum(-1)
    rest = (
        blocks.long(),
        counts,
        config.select_block_size,
        config.softmax_scale(leaves[0].shape[-1]),
    )

    def attention():
        return ParallelNSAFunction.apply(*leaves, *rest, None)

    def forward():
        with torch.no_grad():
            return attention()

    out = attention()

    def backward():
        return torch.autograd.grad(out, leaves, tensors.dout, retain_graph=True)

    return forward, backward, lambda: (out.detach(), *backward())


def check_agreement(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]):
    """Compare outputs and gradients of both sides.

    Raises:
        AssertionError: they differ by more than ``AGREEMENT`` in norm.
    """
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        x, y = x.float(), y.float()
        difference = float((x - y).norm() / y.norm())
        if not difference < AGREEMENT:
            raise AssertionError(f"{name} differs by {difference:.3g}, want below {AGREEMENT}")


def make_row(
    name: str, indices: str, timings: dict, gib: float, work: int, config, options
) -> dict:
    """One row of ``FIELDS``; ``work`` are operations."""
    row = dict(tokens=options.length, blocks=config.num_selected_blocks, indices=indices)
    row |= dict(block_size=config.select_block_size, call=options.call)
    row["pass"] = name
    row |= workloads.shape_columns(options)
    ours, theirs = timings["nsa"].eager, timings["fla"].eager if "fla" in timings else []
    row |= quantile_columns("fla", theirs) | quantile_columns("nsa", ours)
    row["ratio"] = rounded(ratio_of_medians(theirs, ours), 3)
    row["tflops"] = rounded(work / statistics.median(ours) / 1e9, 0)
    row["gib"] = rounded(gib, 3)
    row["gib_per_s"] = rounded(1e3 * gib / statistics.median(ours), 0)
    return row | environment.columns()


def describe(row: dict) -> str:
    """A line for the terminal."""
    return (
        f"{row['tokens']} tokens, {row['heads']} heads, {row['kv_heads']} KV heads, "
        f"{row['indices']} blocks of {row['block_size']}, {row['call']}, {row['pass']}: "
        f"fla {row['fla_p50_ms'] or '-'} ms, nsa {row['nsa_p50_ms']} ms, {row['ratio'] or '-'}x, "
        f"{row['tflops']} TFLOP/s, {row['gib_per_s']} GiB/s"
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
