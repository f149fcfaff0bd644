"""Chunks of KV heads and recomputing: the same results, and the estimates that choose them."""

import pytest
import torch

import nsa
from nsa.blocks import num_compressed_blocks
from nsa.fused import autograd, entry, memory, ops
from nsa.fused.call import Call
from nsa.fused.memory import Problem, Schedule, choose, workspace_bytes
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.small_configs import tile_config, token_config

GIB = 1 << 30
LENGTHS = [70, 0, 1, 130]
HEADS, KV_HEADS, DIM = 6, 3, 8
DOUBLE = torch.float64


SPARSE = tile_config(num_cmp_selected_blocks=1, cmp_group_size=64, compress_block_size=1)
TOKEN = token_config()
TOKEN_NON_CAUSAL = nsa.NSAConfig.paper(num_selected_blocks=4, causal=False)
FORMS = {
    "shared k and v": {},
    "k and v of each branch": {"separate": True},
    "gates": {"gates": True},
    "gate weight": {"weight": True},
    "compress weights": {"compress": True},
    "compressed_kv": {"compressed_kv": True},
    "sparse compressed": {"config": SPARSE, "weight": True},
    "non-causal": {"config": tile_config(causal=False), "compress": True},
    "block_indices": {"indices": True, "separate": True},
    "token": {"config": TOKEN, "weight": True, "compress": True},
    "token, block_indices": {"config": TOKEN, "indices": True},
    "token, compressed_kv": {"config": TOKEN, "compressed_kv": True},
    "token, non-causal": {"config": TOKEN_NON_CAUSAL, "gates": True},
}


TOKEN_FORMS = [form for form in FORMS if form.startswith("token")]


def make_problem(packed, *, config=None, separate=False, gates=False, weight=False, compress=False,
                 compressed_kv=False, indices=False):  # fmt: skip
    """Function of a dict of differentiable tensors, and that dict."""
    config = config or tile_config()
    leading = (sum(LENGTHS),) if packed else (2, LENGTHS[-1])
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE, requires_grad=True)

    copies = 3 if separate else 1
    leaves = {"q": draw(*leading, HEADS, DIM)}
    for name in "kv":
        leaves |= {f"{name}{i}": draw(*leading, KV_HEADS, DIM) for i in range(copies)}
    if gates:
        leaves["gates"] = draw(*leading, HEADS, 3)
    if weight:
        leaves["gate_proj_weight"] = draw(HEADS, 3, DIM)
    if compress:
        leaves["compress_k_weight"] = draw(KV_HEADS, DIM, DIM)
        leaves["compress_v_weight"] = draw(KV_HEADS, DIM, DIM)
    if compressed_kv:
        lengths = LENGTHS if packed else LENGTHS[-1:]
        counts = [num_compressed_blocks(n, config) for n in lengths]
        shape = (sum(counts),) if packed else (2, *counts)
        leaves |= {f"{name}_cmp": draw(*shape, KV_HEADS, DIM) for name in "kv"}
    extras = {"cu_seqlens": make_cu_seqlens(LENGTHS)} if packed else {}

    def function(**leaves):
        q = leaves.pop("q")
        k, v = (tuple(leaves.pop(f"{name}{i}") for i in range(copies)) for name in "kv")
        k, v = (x if separate else x[0] for x in (k, v))
        call = extras | leaves
        if compressed_kv:
            call["compressed_kv"] = (call.pop("k_cmp"), call.pop("v_cmp"))
        if indices:
            call["block_indices"] = nsa.select_blocks(q, k, config=config, **extras)
        return nsa.forward(q, k, v, config=config, backend="fused", **call)

    return function, leaves


def run(function, leaves):
    out = function(**leaves)
    dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


@pytest.fixture
def scheduled(monkeypatch):
    """Sets the schedule of every call."""
    return lambda *args: monkeypatch.setattr(
        entry, "make_schedule", lambda *_, **__: Schedule(*args)
    )


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_schedule(form, packed, scheduled):
    function, leaves = make_problem(packed, **FORMS[form])
    expected = run(function, leaves)
    for schedule in [(1, True), (2, False), (2, True), (3, False), (3, True)]:
        scheduled(*schedule)
        actual = run(function, leaves)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("schedule", [(1, True), (2, False), (3, True)])
def test_what_is_kept_for_backward(schedule, scheduled, monkeypatch):
    """With recomputing nothing as long as the queries, and without a gradient nothing at all."""
    kept = []
    original = Call.forward

    def forward(*arguments, **options):
        kept.append(original(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr(Call, "forward", forward)
    scheduled(*schedule)
    function, leaves = make_problem(False)
    function(**leaves)
    with torch.no_grad():
        function(**leaves)
    (out, saved), (_, nothing) = kept
    assert len(nothing) == 0
    chunks, recompute = schedule
    assert len(saved) == chunks
    tensors = [x for part in saved for x in part if x is not None]
    values = sum(x.numel() for x in tensors if x.is_floating_point())
    # Three outputs and their log-sum-exps, or nothing.
    assert values == 0 if recompute else values >= 3 * out.numel()


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("schedule", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    "form", ["gates", "sparse compressed", "non-causal", "block_indices", *TOKEN_FORMS]
)
def test_fakes_agree_with_the_ops(form, schedule, packed, scheduled, monkeypatch):
    calls = []
    monkeypatch.setattr(autograd, "is_traced", lambda *_: True)
    for name in ("attention", "attention_backward"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops,
            name,
            lambda *args, op=op, **kwargs: calls.append((op, args, kwargs)) or op(*args, **kwargs),
        )
    scheduled(*schedule)
    function, leaves = make_problem(packed, **FORMS[form])
    # The log-sum-exp of the kernels, and so of the fakes, is float32.
    run(function, {name: x.detach().float().requires_grad_() for name, x in leaves.items()})
    assert len(calls) == 2
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_max_workspace_bytes_compiles_once_for_all_lengths(packed):
    torch._dynamo.reset()
    config = tile_config()
    weight = torch.randn(4, 3, 8, dtype=DOUBLE, requires_grad=True)

    def function(q, k, v, cu_seqlens, max_seqlen):
        return nsa.forward(
            q, k, v, config=config, gate_proj_weight=weight, cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen, max_workspace_bytes=1, backend="fused",
        ).sin()  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(([200, 5, 0], [17, 100, 140], [300, 1, 2])):
        leading = (sum(lengths),) if packed else (2, sum(lengths))
        q, k, v = make_inputs(leading, 4, 2, 8, dtype=DOUBLE, requires_grad=True)
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else (None, None)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            results = [f(q, k, v, *extra) for f in (function, compiled)]
        grads = [torch.autograd.grad(out.sum(), (q, k, v, weight)) for out in results]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fused_on_cpu")
def test_max_workspace_bytes_reaches_the_planner(monkeypatch):
    seen = []
    monkeypatch.setattr(
        entry,
        "make_schedule",
        lambda *_, max_workspace_bytes, **__: (
            seen.append(max_workspace_bytes) or Schedule(1, False)
        ),
    )
    q, k, v = make_inputs((1, 70), 2, 1, 8)
    nsa.forward(q, k, v, config=tile_config(), max_workspace_bytes=12345, backend="fused")
    layer = nsa.NativeSparseAttention(
        16, 2, 1, config=tile_config(), max_workspace_bytes=99, backend="fused"
    )
    layer(torch.randn(1, 70, 16))
    assert seen == [12345, 99]


def test_pairs_that_the_kernels_cannot_count_run_in_chunks():
    config = nsa.NSAConfig.paper(num_selected_blocks=16)
    # 2^26 pairs of a head and token: 15 heads fit.
    sizes = dict(config=config, num_heads=64, num_kv_heads=16, batch=4)
    assert choose(problem(1 << 20, **sizes), True, 1 << 60).chunks == 2
    assert choose(problem(1 << 20, **(sizes | dict(num_kv_heads=8))), True, 1 << 60).chunks == 1
    assert choose(problem(1 << 20, **(sizes | dict(config=nsa.NSAConfig()))), True, 1 << 60) == (
        Schedule(1, False)
    )


def test_more_pairs_of_one_head_than_the_kernels_count_are_refused():
    q = torch.empty(1, dtype=torch.bfloat16, device="meta").expand(64, 1 << 20, 4, 64)
    config = nsa.NSAConfig.paper(num_selected_blocks=16)
    said = nsa.explain_backend(q, q[:, :, :1], q[:, :, :1], config=config)
    assert f"it needs fewer than {1 << 30} pairs of tokens and selected blocks" in said
    assert f"got {1 << 30}; split the batch" in said


def problem(length: int = 1 << 20, **changes) -> Problem:
    sizes = dict(
        batch=1, length=length, sequences=None, longest=length, num_heads=32, num_kv_heads=8,
        head_dim=128, itemsize=2, config=nsa.NSAConfig(),
    )  # fmt: skip
    return Problem(**(sizes | changes))


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
}


@pytest.mark.parametrize("case", PROBLEMS)
@pytest.mark.parametrize("save", [False, True], ids=["forward", "with backward"])
def test_the_cheapest_schedule_that_fits_is_chosen(case, save):
    sizes = PROBLEMS[case]
    heads = sizes.num_kv_heads
    schedules = [(chunks, False) for chunks in range(1, heads + 1)]
    if save:
        schedules += [(chunks, True) for chunks in range(1, heads + 1)]

    def needed(chunks, recompute):
        return workspace_bytes(sizes, -(-heads // chunks), save=save, recompute=recompute)

    for limit in (needed(*schedule) + extra for schedule in schedules for extra in (-1, 0)):
        fitting = [schedule for schedule in schedules if needed(*schedule) <= limit]
        expected = fitting[0] if fitting else (heads, save)
        assert choose(sizes, save, limit) == expected
    assert choose(sizes, save, 1 << 60) == (1, False)
    # Nothing fits: one KV head at a time, and what happens happens.
    assert choose(sizes, save, -1) == (heads, save)


def test_estimate_by_hand():
    """One sequence of 64K tokens: queries 64 MiB, keys 16, compressed keys 1/4."""
    sizes = problem(1 << 16, num_heads=8, num_kv_heads=2, head_dim=64)
    mib = 1 << 20
    # Three outputs with 2 MiB of log-sum-exp each.
    branches = 3 * 64 + 3 * 2
    # 256 tiles of 8 heads, 16 blocks each, against 1024 compressed keys; two steps of scores, the
    # float32 summaries twice and compressed keys; indices and lists.
    forward = branches + 2 * 8 + (2 * 0.5 + 0.5) + 2 * 0.25 + 2 * 0.125
    assert workspace_bytes(sizes, 2, save=False, recompute=False) == forward * mib
    # In the window branch: gradients of three outputs, and of q, k and v; FA4's accumulators of
    # them with two numbers a query; dlogits; what was selected.
    accumulators = 128 + 2 * 2 + 2 * 32
    backward = 3 * 64 + (64 + 2 * 16) + accumulators + 6 + 0.125
    assert workspace_bytes(sizes, 2, save=True, recompute=False) == (branches + backward) * mib
    # One of the two KV heads holds half of that, but all that was selected.
    one = (branches + backward + 0.125) / 2
    assert workspace_bytes(sizes, 1, save=True, recompute=True) == one * mib
    # With all branches saved, those of the other head too.
    assert workspace_bytes(sizes, 1, save=True, recompute=False) == (one + branches / 2) * mib


def test_token_estimate_by_hand():
    """One sequence of 64K tokens, G = 16: queries 1 GiB, keys 64 MiB, compressed keys 4."""
    config = nsa.NSAConfig.paper()
    sizes = problem(1 << 16, num_heads=64, num_kv_heads=4, config=config)
    mib = 1 << 20
    branches = 3 * 1024 + 3 * 16
    # A GiB of queries has 16 GiB of results of pairs, of which there are 2 GiB at a time; the index
    # has three numbers a pair, beside what was selected.
    forward = branches + 16 + 2048 + 3 * 16
    keys = 2 * num_compressed_blocks(1 << 16, config) * 4 * 128 * 2
    assert workspace_bytes(sizes, 4, save=False, recompute=False) == forward * mib + keys


@pytest.mark.parametrize("case", PROBLEMS)
def test_workspace_grows_with_heads_and_length(case):
    sizes = PROBLEMS[case]
    for save, recompute in ((False, False), (True, False), (True, True)):
        amounts = [
            workspace_bytes(sizes, heads, save=save, recompute=recompute)
            for heads in range(1, sizes.num_kv_heads + 1)
        ]
        assert amounts == sorted(set(amounts))
        longer = sizes._replace(length=sizes.length + 256, longest=sizes.longest + 256)
        assert workspace_bytes(longer, 1, save=save, recompute=recompute) > amounts[0]


def test_the_goals_fit_one_gpu():
    """139 GiB: 1M and 2M tokens with backward, and 4M forward."""
    free = 139 * GIB
    for length, save in ((1 << 20, True), (1 << 21, True), (1 << 22, False)):
        queries, keys = length * 32 * 128 * 2, length * 8 * 128 * 2
        inputs, results = queries + 2 * keys, queries
        if save:
            results += 2 * queries + 2 * keys
        limit = int(memory.USABLE * (free - inputs)) - results
        chunks, recompute = choose(problem(length), save, limit)
        used = workspace_bytes(problem(length), -(-8 // chunks), save=save, recompute=recompute)
        assert inputs + results + used < free
