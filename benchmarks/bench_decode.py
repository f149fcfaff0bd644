"""Time of a decoding step with a cache, beside dense attention at the speed of a device copy.

    python benchmarks/bench_decode.py --csv decode.csv
    python benchmarks/bench_decode.py --tokens 1 4 --shapes 65536x32:64/4
    python benchmarks/bench_decode.py --selection tile --shapes 65536x32:32/8
    python benchmarks/bench_decode.py --prefill --shapes 65536x1:64/4

A step is ``nsa.forward`` of new tokens behind ``keys`` tokens of each sequence, as a CUDA graph
that is replayed: append, compression, selection and attention. Small caches would stay in L2 from
step to step, so a graph has steps on several caches, and the time is divided by their number.

"Dense at copy speed" is what reading all keys and values takes at the rate of a device copy,
measured in the same run: no dense kernel is faster. "Floor" is the same for the bytes that this
step must read: all compressed keys and values, those of the blocks that any head of a KV head
selects, and of the window.

The CSV has one row for each shape:

- keys, batch, tokens, selection, heads, kv_heads, head_dim, dtype: the shape; the configuration is
  the paper's, or with "tile" the default
- p20_us, p50_us, p80_us: of one step
- dense_us, floor_us: at copy speed
- ratio: dense_us over p50_us
- copy_gb_per_s: bytes read and written
- caches: caches in a graph
- gpu, host, torch, cuda, flash_attn_4, cutlass_dsl, nsa_commit, time

With ``--prefill`` the shapes' keys are those of a prompt, which ``nsa.forward`` appends to an empty
cache and attends, without gradients. It takes turns with the same call without a cache. Columns are
then cached_ms, plain_ms (medians) and ratio, beside the shape and the environment.
"""

import argparse
from pathlib import Path
from statistics import median, quantiles

import torch

import nsa
from measuring import environment, timing
from measuring.tables import Table

FIELDS = (
    "keys", "batch", "tokens", "selection", "heads", "kv_heads", "head_dim", "dtype",
    "p20_us", "p50_us", "p80_us", "dense_us", "floor_us", "ratio", "copy_gb_per_s", "caches",
    *environment.FIELDS,
)  # fmt: skip
PREFILL_FIELDS = (
    "keys", "batch", "selection", "heads", "kv_heads", "head_dim", "dtype", "cached_ms", "plain_ms",
    "ratio", *environment.FIELDS,
)  # fmt: skip
SHAPES = (
    "65536x32:64/4", "131072x16:64/4", "32768x32:64/4", "8192x64:64/4", "65536x32:64/8",
    "65536x1:64/4", "8192x1:64/4",
)  # fmt: skip
COPY_BYTES = 1 << 30
# Caches in a graph together have at least this many bytes that a step reads.
ROTATED_BYTES = 256 << 20
MOST_CACHES = 64


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    environment.require_gpu()
    table = Table(options.csv, PREFILL_FIELDS if options.prefill else FIELDS)
    if options.prefill:
        for shape in options.shapes:
            row = bench_prefill(*shape, options)
            table.add(row)
            print(describe_prefill(row), flush=True)
        return
    rate = copy_rate(options)
    for shape in options.shapes:
        for tokens in options.tokens:
            row = bench(*shape, tokens, rate, options)
            table.add(row)
            print(describe(row), flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes",
        type=shape_argument,
        nargs="+",
        default=[shape_argument(text) for text in SHAPES],
        metavar="KEYSxBATCH:H/H_KV",
        help="keys, sequences, query heads and KV heads, as 65536x32:64/4",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1], help="new tokens of a step")
    parser.add_argument("--selection", choices=("token", "tile"), default="token")
    parser.add_argument("--prefill", action="store_true", help="time prompts instead of steps")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--csv", type=Path, help="write the rows here")
    return parser.parse_args(argv)


def shape_argument(text: str) -> tuple[int, int, int, int]:
    """Keys, sequences, query heads and KV heads from the command line."""
    sizes, _, heads = text.partition(":")
    keys, batch, num_heads, kv_heads = (*sizes.split("x"), *heads.split("/"))
    return int(keys), int(batch), int(num_heads), int(kv_heads)


def copy_rate(options) -> float:
    """Bytes per second that a device copy reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    times = timing.timed_in_a_row(lambda: target.copy_(source), options.repeats, settle=20)
    return 2 * COPY_BYTES / (1e-3 * sorted(times)[len(times) // 2])


def bench(
    keys: int, batch: int, heads: int, kv_heads: int, tokens: int, rate: float, options
) -> dict:
    """The row of a shape."""
    config = nsa.NSAConfig.paper() if options.selection == "token" else nsa.NSAConfig()
    dim = options.head_dim
    key_bytes = 2 * dim * 2
    compressed = keys // config.compress_stride
    always = batch * kv_heads * (compressed + config.window_size) * key_bytes
    count = min(MOST_CACHES, -(-ROTATED_BYTES // always))
    steps = [Step(keys, batch, heads, kv_heads, tokens, config, options) for _ in range(count)]

    def run():
        for step in steps:
            step()

    replay = timing.capture(run)
    for step in steps:
        step.cache.lengths.fill_(keys)
    times = timing.timed_in_a_row(replay, options.repeats, settle=10)
    dense = batch * kv_heads * keys * key_bytes
    floor = always + steps[0].selected_blocks() * config.select_block_size * key_bytes
    cuts = quantiles([1000 * x / count for x in times], n=5)
    dense_us, floor_us = (1e6 * x / rate for x in (dense, floor))
    p50 = sorted(times)[len(times) // 2] * 1000 / count
    shape = (keys, batch, tokens, options.selection, heads, kv_heads, dim, options.dtype)
    values = (cuts[0], p50, cuts[3], dense_us, floor_us, dense_us / p50, rate / 1e9)
    row = dict(zip(FIELDS, (*shape, *(round(x, 2) for x in values), count), strict=False))
    return row | environment.columns()


def bench_prefill(keys: int, batch: int, heads: int, kv_heads: int, options) -> dict:
    """The row of prompts of a shape."""
    config = nsa.NSAConfig.paper() if options.selection == "token" else nsa.NSAConfig()
    kind, dim = dict(dtype=getattr(torch, options.dtype), device="cuda"), options.head_dim
    cache = nsa.Cache(config, batch, keys, kv_heads, dim, **kind)
    q = torch.randn(batch, keys, heads, dim, **kind)
    k, v = (torch.randn(batch, keys, kv_heads, dim, **kind) for _ in range(2))
    gates = torch.rand(batch, keys, heads, 3, **kind)

    def plain():
        nsa.forward(q, k, v, config=config, gates=gates, backend="fused")

    def cached():
        cache.reset()
        nsa.forward(q, k, v, cache=cache, gates=gates, backend="fused")

    with torch.no_grad():
        timings = timing.measure(
            {"plain": plain, "cached": cached}, repeats=options.repeats, seconds=2.0
        )
    plain_ms, cached_ms = (median(timings[name].eager) for name in ("plain", "cached"))
    shape = (keys, batch, options.selection, heads, kv_heads, dim, options.dtype)
    values = (round(x, 3) for x in (cached_ms, plain_ms, cached_ms / plain_ms))
    return dict(zip(PREFILL_FIELDS, (*shape, *values), strict=False)) | environment.columns()


def describe_prefill(row: dict) -> str:
    return (
        f"{row['keys']:>7} x {row['batch']:<3} {row['heads']}/{row['kv_heads']} "
        f"{row['selection']}: prompt with a cache {row['cached_ms']:.2f} ms, without "
        f"{row['plain_ms']:.2f}: {row['ratio']:.3f} x"
    )


class Step:
    """A cache of ``keys`` tokens a sequence, and new tokens."""

    def __init__(self, keys, batch, heads, kv_heads, tokens, config, options):
        kind = dict(dtype=getattr(torch, options.dtype), device="cuda")
        dim = options.head_dim
        empty = nsa.Cache(config, batch, keys + 1024 * tokens, kv_heads, dim, **kind)
        for x in (empty.k_pages, empty.v_pages):
            x.normal_()
        for x in (empty.k_cmp_pages, empty.v_cmp_pages):
            # A mean of normal numbers.
            x.normal_(std=config.compress_block_size**-0.5)
        self.cache = nsa.Cache.from_pages(
            config,
            k_pages=empty.k_pages,
            v_pages=empty.v_pages,
            k_cmp_pages=empty.k_cmp_pages,
            v_cmp_pages=empty.v_cmp_pages,
            page_table=empty.page_table,
            lengths=torch.full((batch,), keys, dtype=torch.int32, device="cuda"),
            num_heads=heads,
        )
        self.q = torch.randn(batch, tokens, heads, dim, **kind)
        self.k, self.v = (torch.randn(batch, tokens, kv_heads, dim, **kind) for _ in range(2))
        self.gates = torch.rand(batch, tokens, heads, 3, **kind)

    def __call__(self):
        return nsa.forward(
            self.q, self.k, self.v, cache=self.cache, gates=self.gates, backend="fused"
        )

    def selected_blocks(self) -> int:
        """Blocks that any query head of a KV head selects, of all sequences and KV heads."""
        config, kv_heads = self.cache.config, self.cache.num_kv_heads
        if config.selection == "token":
            # Tokens of a step are counted as if they shared their blocks.
            return self.cache.batch_size * kv_heads * config.num_selected_blocks
        # The list of the tile that the first token behind ``keys`` began.
        lists = self.cache.block_lists[:, 0].unflatten(1, (kv_heads, -1)).flatten(2)
        ordered = lists.sort(-1).values
        return int(((ordered[..., 1:] != ordered[..., :-1]).sum(-1) + 1).sum())


def describe(row: dict) -> str:
    return (
        f"{row['keys']:>7} x {row['batch']:<3} {row['heads']}/{row['kv_heads']} {row['selection']} "
        f"tokens {row['tokens']}: {row['p50_us']:>8.1f} us (p80 {row['p80_us']:.1f}), floor "
        f"{row['floor_us']:.1f}, dense at {row['copy_gb_per_s']:.0f} GB/s {row['dense_us']:.1f}: "
        f"{row['ratio']:.2f} x"
    )


if __name__ == "__main__":
    main()
