"""How much memory a call takes by estimate, and the schedule that is chosen for it."""

import pytest
import torch

import nsa
from nsa.blocks import num_compressed_blocks
from nsa.fused import compressed_forms
from nsa.fused.attention.compressed import compressed_backward_bytes
from nsa.fused.memory import workspace_bytes
from nsa.fused.schedule import USABLE, ChunkSchedule, choose
from nsa.fused.sizes import Sizes

GIB = 1 << 30


def test_pairs_that_the_kernels_cannot_count_run_in_chunks():
    config = nsa.NSAConfig.paper(num_selected_blocks=16)
    # 2^26 pairs of a head and token: 15 heads fit.
    sizes = dict(config=config, num_heads=64, num_kv_heads=16, batch=4)
    assert choose(problem(1 << 20, **sizes), True, 1 << 60).chunks == 2
    assert choose(problem(1 << 20, **(sizes | dict(num_kv_heads=8))), True, 1 << 60).chunks == 1
    assert choose(problem(1 << 20, **(sizes | dict(config=nsa.NSAConfig()))), True, 1 << 60) == (
        ChunkSchedule(1, False)
    )


def test_more_pairs_of_one_head_than_the_kernels_count_are_refused():
    q = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(64, 1 << 20, 4, 64)
    config = nsa.NSAConfig.paper(num_selected_blocks=16)
    said = nsa.explain_backend(q, q[:, :, :1], q[:, :, :1], config=config)
    assert f"it needs fewer than {1 << 30} pairs of tokens and selected blocks" in said
    assert f"got {1 << 30}; split the batch" in said


def problem(length: int = 1 << 20, **changes) -> Sizes:
    sizes = dict(
        batch=1, length=length, keys=length, sequences=None, key_bounds=False, longest=length,
        num_heads=32, num_kv_heads=8, head_dim=128, itemsize=2, config=nsa.NSAConfig(),
    )  # fmt: skip
    return Sizes(**(sizes | changes))


PROBLEMS = {
    "batched": problem(),
    "short tile": problem(1_000_001),
    "batch of 4": problem(1 << 18, batch=4),
    "packed": problem(sequences=100, longest=50_000),
    "one head a KV head": problem(num_kv_heads=32),
    "sparse compressed": problem(config=nsa.NSAConfig(num_cmp_selected_blocks=16)),
    "non-causal": problem(config=nsa.NSAConfig(causal=False)),
    "seven KV heads": problem(num_heads=28, num_kv_heads=7),
    "token": problem(config=nsa.NSAConfig.paper()),
    "token, packed": problem(config=nsa.NSAConfig.paper(), sequences=100, longest=50_000),
    "token, batch of 4": problem(1 << 16, config=nsa.NSAConfig.paper(), batch=4),
    "a chunk": problem(1 << 16, keys=1 << 20, longest=1 << 20),
    "token, a chunk": problem(1 << 16, keys=1 << 18, longest=1 << 18, config=nsa.NSAConfig.paper()),
    "packed chunks": problem(1 << 16, keys=1 << 18, sequences=9, key_bounds=True, longest=1 << 16),
}


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("save", [False, True], ids=["forward", "with backward"])
def test_the_cheapest_schedule_that_fits_is_chosen(case, save):
    sizes = PROBLEMS[case]
    heads = sizes.num_kv_heads
    schedules = [(chunks, False) for chunks in range(1, heads + 1)]
    if save:
        schedules += [(chunks, True) for chunks in range(1, heads + 1)]

    needed = {
        (chunks, recompute): workspace_bytes(
            sizes, -(-heads // chunks), save=save, recompute=recompute
        )
        for chunks, recompute in schedules
    }
    for limit in (needed[schedule] + extra for schedule in schedules for extra in (-1, 0)):
        fitting = [schedule for schedule in schedules if needed[schedule] <= limit]
        expected = fitting[0] if fitting else (heads, save)
        assert choose(sizes, save, limit) == ChunkSchedule(*expected)
    assert choose(sizes, save, 1 << 60) == ChunkSchedule(1, False)
    # Nothing fits: one KV head at a time, and what happens happens.
    assert choose(sizes, save, -1) == ChunkSchedule(heads, save)


def test_estimate_by_hand():
    """One sequence of 64K tokens: queries 64 MiB, keys 16, compressed keys 1/4."""
    sizes = problem(1 << 16, num_heads=8, num_kv_heads=2, head_dim=64)
    mib = 1 << 20
    # Three outputs with 2 MiB of log-sum-exp each.
    branches = 3 * 64 + 3 * 2
    # 256 tiles of 8 heads, 16 blocks each, against 1024 compressed keys; scores, all in one step,
    # and the first query of each tile, by head; indices and lists.
    forward = branches + 8 + 0.25 + 2 * 0.25 + 2 * 0.125
    assert workspace_bytes(sizes, 2, save=False, recompute=False) == forward * mib
    # In the selected branch: compressed keys; sums of q in float32, gradients of k and v of the
    # window and in float32 of compressed keys; those of q, k and v, and sums of keys in float32;
    # what was selected, twice; dlogits; statistics.
    others = 2 * 64 + 2 * 16 + 4 * 0.25
    backward = 2 * 0.25 + others + 64 + 2 * 16 + 4 * 16 + 2 * 0.125 + 6 + 2 * 6
    assert workspace_bytes(sizes, 2, save=True, recompute=False) == (branches + backward) * mib
    # With given gates, in the window branch: gradients of three outputs, and of k and v; FA4's
    # accumulators of them and of q with two numbers a query; the gates' gradients, statistics and
    # compressed keys as above.
    accumulators = 128 + 2 * 2 + 2 * 32
    given = 3 * 64 + 2 * 16 + accumulators + 6 + 2 * 6 + 0.125 + 2 * 0.25
    whole = sizes._replace(gated_gradients=True)
    assert workspace_bytes(whole, 2, save=True, recompute=False) == (branches + given) * mib
    # One of the two KV heads holds half of that, but all that was selected.
    one = (branches + backward + 0.125) / 2
    assert workspace_bytes(sizes, 1, save=True, recompute=True) == one * mib
    # With all branches saved, those of the other head too.
    saved = branches + 2 * 0.25
    assert workspace_bytes(sizes, 1, save=True, recompute=False) == (one + saved / 2) * mib


def test_token_estimate_by_hand():
    """One sequence of 64K tokens, G = 16: queries 1 GiB, keys 64 MiB, compressed keys 4."""
    config = nsa.NSAConfig.paper()
    sizes = problem(1 << 16, num_heads=64, num_kv_heads=4, config=config)
    mib = 1 << 20
    branches = 3 * 1024 + 3 * 16
    # A GiB of queries has 12 GiB of results of pairs, of which there are 1.7 at a time; the index
    # has three numbers a pair, beside what was selected.
    forward = branches + 16 + 1728 + 3 * 16
    keys = 2 * num_compressed_blocks(1 << 16, config) * 4 * 128 * 2
    assert workspace_bytes(sizes, 4, save=False, recompute=False) == forward * mib + keys


@pytest.mark.parametrize("case", ["batched", "token"])
def test_shared_sums_of_queries_take_no_more(case, monkeypatch):
    sizes = PROBLEMS[case]
    assert sizes.sums_queries
    shared = workspace_bytes(sizes, sizes.num_kv_heads, save=True, recompute=False)
    # A fixed order takes more: sums of keys for each segment of the queries.
    ordered = sizes._replace(deterministic=True)
    assert compressed_backward_bytes(ordered) > compressed_backward_bytes(sizes)
    for name in ("UNFOLDED_CTAS", "SINGLE_CTAS"):
        monkeypatch.setattr(compressed_forms, name, 1 << 60)
    assert not sizes.sums_queries
    assert shared <= workspace_bytes(sizes, sizes.num_kv_heads, save=True, recompute=False)


@pytest.mark.parametrize("case", PROBLEMS)
def test_workspace_grows_with_heads_and_length(case):
    sizes = PROBLEMS[case]
    for save, recompute in ((False, False), (True, False), (True, True)):
        amounts = [
            workspace_bytes(sizes, heads, save=save, recompute=recompute)
            for heads in range(1, sizes.num_kv_heads + 1)
        ]
        assert amounts == sorted(set(amounts))
        lengths = ("length", "keys", "longest")
        longer = sizes._replace(**{name: getattr(sizes, name) + 256 for name in lengths})
        assert workspace_bytes(longer, 1, save=save, recompute=recompute) > amounts[0]


def test_the_goals_fit_one_gpu():
    """139 GiB: 1M and 2M tokens with backward, and 4M forward."""
    free = 139 * GIB
    for length, save in ((1 << 20, True), (1 << 21, True), (1 << 22, False)):
        queries, keys = length * 32 * 128 * 2, length * 8 * 128 * 2
        inputs, results = queries + 2 * keys, queries
        if save:
            results += 2 * queries + 2 * keys
        limit = int(USABLE * (free - inputs)) - results
        chunks, recompute, *_ = choose(problem(length), save, limit)
        used = workspace_bytes(problem(length), -(-8 // chunks), save=save, recompute=recompute)
        assert inputs + results + used < free
