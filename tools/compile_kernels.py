"""Compile every kernel of the fused backend for one GPU architecture, without a GPU.

    python tools/compile_kernels.py --arch sm_90a [--jobs 2] [--only sparse] [--list]

The cases (``cases`` below) cover what ``nsa.fused.constraints`` allows: each option of each call,
though not each combination. They call the compile functions of ``nsa.fused.kernels``, so they
compile what runs. The tool prints a line per case and exits with 1 if any fails. The kernels of
FlashAttention-4 are those for sm_90a. Only a GPU shows whether kernels compute the right results
and fit its shared memory.
"""

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

ARCHITECTURES = ("sm_100a", "sm_90a")
HEAD_DIMS = (64, 96, 128, 256)
SECONDS_A_CASE = 300


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, default="sm_90a")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    arguments = parser.parse_args()
    start = time.monotonic()
    target_without_gpu(arguments.arch)
    chosen = [(n, run) for n, run in cases(arguments.arch) if arguments.only in n]
    if arguments.list:
        print("\n".join(name for name, _ in chosen))
        return
    failed = compile_all(chosen, arguments.jobs)
    seconds = time.monotonic() - start
    compiled = len(chosen) - len(failed)
    print(f"{compiled} of {len(chosen)} compiled for {arguments.arch}, {seconds:.0f} s")
    for name in failed:
        print(f"failed: {name}")
    sys.exit(bool(failed) or not chosen)


def cases(arch: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, compile function) for each case. Add new kernels here."""
    if arch == "sm_90a":
        yield from dense_cases()
        yield from sparse_cases()
    yield from own_cases(arch)


def own_cases(arch: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Our own kernels. A case has all forms of one file, for one dtype if the file has dtypes."""
    from nsa.fused.kernels import (
        block_rows,
        column_sums,
        gated_sum,
        key_block_lists,
        means,
        product,
        query_gradient,
        rotation,
        sequence_tables,
        tile_scores,
        top_blocks,
    )

    by_dtype = [gated_sum, query_gradient, means, rotation, block_rows, column_sums, product]
    by_dtype += [tile_scores]
    others = [key_block_lists, top_blocks, sequence_tables]
    if arch == "sm_90a":
        # On Hopper's matrix instructions.
        from nsa.fused.kernels import (
            block_sums,
            decode_append,
            decode_attend,
            decode_compressed,
            decode_finish,
            decode_select,
            decode_tile_select,
            decode_units,
            few_keys,
            float_sums,
            importance,
            inverted_index,
            listed_backward,
            near_block_statistics,
            padded_rows,
            query_partials,
            query_sums,
            row_statistics,
            selected_backward,
            selected_band,
            selected_forward,
        )

        by_dtype += [importance, selected_forward, selected_band]
        by_dtype += [few_keys, selected_backward, query_partials, query_sums]
        by_dtype += [row_statistics, listed_backward, float_sums, block_sums]
        others += [padded_rows, inverted_index, near_block_statistics]
        others += [decode_append, decode_compressed]
        others += [decode_tile_select, decode_finish, decode_attend]
        others += [decode_select, decode_units]
    for kernels in by_dtype:
        for dtype in ("bfloat16", "float16"):
            forms = [run for name, run in kernels.compile_cases() if f"-{dtype}" in name]
            file = kernels.__name__.rpartition(".")[2]
            yield f"{file} {dtype}, {len(forms)} forms", partial(run_all, forms)
    for kernels in others:
        forms = [run for _, run in kernels.compile_cases()]
        file = kernels.__name__.rpartition(".")[2]
        yield f"{file}, {len(forms)} forms", partial(run_all, forms)


def run_all(functions: list[Callable[[], object]]):
    for function in functions:
        function()


def dense_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Window branch, and the compressed branch with queries folded into heads."""
    for dim in HEAD_DIMS:
        for group, packed, dtype in ((1, True, "bfloat16"), (4, False, "float16")):
            name = f"window D={dim} G={group} {'packed' if packed else 'batched'} {dtype}"
            yield name, partial(compile_dense, dim, group, packed, True, (511, None), dtype)
        for group, packed in ((16, False), (64, False), (256, True)):
            name = f"folded D={dim} G={group} {'packed' if packed else 'batched'}"
            yield name, partial(compile_dense, dim, group, packed, True, (None, None), "bfloat16")
        for group, step in ((1, 64), (4, 16)):
            name = f"seen blocks D={dim} G={group} step={step}"
            yield name, partial(compile_seen_blocks, dim, group, step)
        for group, packed, dtype in (
            (1, False, "float16"),
            (4, False, "bfloat16"),
            (16, True, "bfloat16"),
        ):
            name = f"block ends D={dim} G={group} {'packed' if packed else 'batched'} {dtype}"
            ends = partial(compile_dense, dim, group, packed, False, (None, None), dtype)
            yield name, partial(ends, block_ends=(64, 63))
    for dim, group, form, keep, dtype in (
        (128, 4, "weight", False, "bfloat16"),
        (128, 64, "weight", False, "bfloat16"),
        (128, 16, "weight", True, "bfloat16"),
        (128, 1, "weight", True, "bfloat16"),
        (128, 4, "gates", True, "float16"),
        (64, 8, "mean", False, "float16"),
        (64, 3, "gates", True, "float16"),
        (64, 1, "weight", False, "bfloat16"),
    ):
        name = f"closing window D={dim} G={group} {form} {'kept' if keep else 'alone'} {dtype}"
        yield name, partial(compile_closing, dim, group, form, keep, dtype)
    # TMA loads groups that divide the rows of a tile, and no others.
    some = partial(compile_dense, 128, 48, False, True, (None, None), "bfloat16")
    yield "folded D=128 G=48 batched", some
    full_tile = partial(compile_dense, 128, 64, True, True, (None, None), "bfloat16")
    yield "folded D=128 G=64 packed", full_tile
    started = partial(compile_dense, 128, 256, True, False, (None, 1), "bfloat16")
    yield "folded started packed", started
    for packed in (False, True):
        form = "packed" if packed else "batched"
        visible = partial(compile_dense, 128, 4, packed, False)
        yield f"compressed non-causal {form}", partial(visible, (None, None), "bfloat16")
        yield f"window two-sided {form}", partial(visible, (511, 511), "bfloat16")
    many = partial(compile_dense, 128, 4, True, True, (511, None), "bfloat16", many=True)
    yield "window of many sequences", many
    for dim, group, packed in ((64, 1, True), (96, 4, True), (128, 4, False), (256, 4, True)):
        for left in (None, 511):
            form = f"D={dim} G={group} {'packed' if packed else 'batched'}"
            name = f"deterministic {'causal' if left is None else 'window'} {form}"
            variant = partial(compile_dense, dim, group, packed, True, (left, None), "bfloat16")
            yield name, partial(variant, deterministic=True)

    for dim, group in ((64, 1), (64, 16), (96, 3), (128, 16)):
        for deterministic in (False, True):
            name = f"near blocks D={dim} G={group}{' deterministic' if deterministic else ''}"
            yield name, partial(compile_near_blocks, dim, group, deterministic)

    for dim in HEAD_DIMS:
        for segments, deterministic in ((True, False), (True, True), (False, False)):
            form = "segments" if segments else "one segment"
            form += " deterministic" if deterministic else ""
            yield f"blocks D={dim} {form}", partial(compile_blocks, dim, segments, deterministic)


def sparse_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Selected branch (causal) and sparse compressed branch (a limit of keys)."""
    for dim in HEAD_DIMS:
        for key_block in (64, 128):
            if key_block == 128 and dim > 128:
                continue
            for group, mask, dtype in ((1, "limit", "float16"), (4, "causal", "bfloat16")):
                name = f"sparse D={dim} key_block={key_block} G={group} {mask} {dtype}"
                yield name, partial(compile_sparse, dim, group, 256, key_block, mask, dtype)
    both = partial(compile_sparse, 128, 4, 256, 128, "limit", "bfloat16")
    yield "sparse D=128 key_block=128 G=4 limit bfloat16", both
    for query_block in (64, 128, 192):
        name = f"sparse query_block={query_block}"
        yield name, partial(compile_sparse, 128, 4, query_block, 64, "causal", "bfloat16")


def compile_dense(
    dim, group, packed, causal, window, dtype, *, many=False, block_ends=None, deterministic=False
):
    """Forward and backward of ``nsa.fused.fa4``'s dense calls."""
    from nsa.fused.fa4_call import MOST_HEADS_PER_CTA
    from nsa.fused.fa4_variants import Variant, dense_mask
    from nsa.fused.kernels import fa4_sm90

    mask, _ = dense_mask(causal, window, block_ends)
    variant = Variant(getattr_torch(dtype), dim, dim, group, mask, packed, many)
    fa4_sm90.forward_kernels(variant)
    fa4_sm90.backward_kernels(variant._replace(deterministic=deterministic))
    heads = math.gcd(group, MOST_HEADS_PER_CTA)
    if heads > 1 and (not deterministic or (mask.left and not packed)):
        whole = variant._replace(heads_per_cta=heads, deterministic=deterministic)
        fa4_sm90.backward_kernels(whole)


def compile_near_blocks(dim, group, deterministic):
    """The backward of a window that attends near blocks too, of one head and of several a CTA."""
    from nsa.fused.fa4_call import MOST_HEADS_PER_CTA
    from nsa.fused.fa4_variants import Mask, Variant
    from nsa.fused.kernels import fa4_sm90

    mask, options = Mask(left=True, right=True), dict(deterministic=deterministic)
    shape = (getattr_torch("bfloat16"), dim, dim, group, mask)
    for heads in sorted({1, math.gcd(group, MOST_HEADS_PER_CTA)}):
        variant = Variant(*shape, heads_per_cta=heads, near_block=64, **options)
        fa4_sm90.backward_kernels(variant)


def compile_blocks(dim, segments, deterministic):
    """The backward of the compressed branch of a batch, with queries in one segment or several."""
    from nsa.fused.fa4_variants import Mask, Variant
    from nsa.fused.kernels import fa4_sm90

    mask = Mask(left=True, right=True, block_stride=16)
    repeated = ((), (0,), (0,), ()) if segments else ()
    shape = (getattr_torch("bfloat16"), dim, dim, 4, mask)
    fa4_sm90.compile_backward(Variant(*shape, repeated=repeated, deterministic=deterministic))


def compile_closing(dim, group, form, keep, dtype):
    """A window that ends with the sum of the branches."""
    from nsa.fused.fa4_variants import Mask, Variant
    from nsa.fused.kernels import fa4_closing

    variant = Variant(getattr_torch(dtype), dim, dim, group, Mask(left=True, right=True))
    fa4_closing.compile_closing(variant, form, keep)


def compile_seen_blocks(dim, group, step):
    """The forward of the compressed branch of a batch."""
    from nsa.fused.fa4_variants import Mask, Variant
    from nsa.fused.kernels import fa4_sm90

    mask = Mask(right=True, block_stride=step)
    fa4_sm90.forward_kernels(Variant(getattr_torch("bfloat16"), dim, dim, group, mask))


def compile_sparse(dim, group, query_block, key_block, mask, dtype):
    """Forward, and backward if it is FA4's, of the calls of ``nsa.fused.fa4`` with lists."""
    from nsa.fused.block_lists import goes_by_query
    from nsa.fused.fa4_variants import Mask, Variant
    from nsa.fused.kernels import fa4_sm90

    mask = Mask(causal=mask == "causal", limited=mask == "limit")
    blocks = (query_block, key_block)
    variant = Variant(getattr_torch(dtype), dim, dim, group, mask, blocks=blocks)
    fa4_sm90.forward_kernels(variant)
    if not goes_by_query(key_block, dim):
        fa4_sm90.backward_kernels(variant)


def getattr_torch(dtype: str):
    import torch

    return getattr(torch, dtype)


def target_without_gpu(arch: str):
    """Make the CuTe DSL act as if it had a GPU of ``arch``, and import what all cases need."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "CUTE_DSL_ARCH": arch, "QUACK_CACHE_ENABLED": "0"}
    import nsa.fused.kernels.compiled  # noqa: F401


def compile_all(chosen: list[tuple[str, Callable[[], None]]], jobs: int) -> list[str]:
    """Compile the cases, each in a fork of this process; return the names of those that failed.

    A fork saves the seconds of importing FA4. Each case needs its own process, because the DSL's
    compiler ends the process on an internal failure.
    """
    context, waiting, running, failed = get_context("fork"), list(chosen), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            name, run = waiting.pop(0)
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=compile_case, args=(run, writer))
            process.start()
            writer.close()
            running[process.sentinel] = name, process, reader, time.monotonic()
        ended = set(wait(list(running), timeout=1))
        for sentinel in list(running):
            name, process, reader, start = running[sentinel]
            seconds = time.monotonic() - start
            if sentinel not in ended and seconds < SECONDS_A_CASE:
                continue
            process.kill()
            process.join()
            try:
                error = reader.recv()
            except EOFError:
                error = f"the process ended with exit code {process.exitcode}"
            print(f"{'FAIL' if error else 'ok  '} {seconds:5.1f} s  {name}", flush=True)
            if error:
                print(error, flush=True)
                failed.append(name)
            del running[sentinel]
    return failed


def compile_case(run: Callable[[], None], writer):
    """Compile in the forked process, and send None or the error."""
    # FA4 and the DSL warn about themselves.
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        run()
        writer.send(None)
    except Exception:
        writer.send(traceback.format_exc(limit=-6))


if __name__ == "__main__":
    main()
