"""Chunks of KV heads and recomputing change no result, and are what was asked for."""

from types import SimpleNamespace

import pytest
import torch

import nsa
from nsa import recordings
from nsa.blocks import num_compressed_blocks
from nsa.fused import compressed_forms, entry, ops
from nsa.fused.call_tensors import Inputs
from nsa.fused.memory import workspace_bytes
from nsa.fused.schedule import ALWAYS_FITS, ChunkSchedule, make_schedule, run_forward
from nsa.fused.sizes import Sizes, make_sizes
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.small_configs import tile_config, token_config

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
        entry, "make_schedule", lambda *_, **__: ChunkSchedule(*args)
    )


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_results_do_not_depend_on_the_schedule(form, packed, scheduled):
    function, leaves = make_problem(packed, **FORMS[form])
    expected = run(function, leaves)
    # The last of two chunks is shorter, and of three all are alike.
    for schedule in [(2, False), (3, True)] if packed else [(1, True), (2, True), (3, False)]:
        scheduled(*schedule)
        actual = run(function, leaves)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("schedule", [(1, True), (2, False), (3, True)])
def test_what_is_kept_for_backward(schedule, scheduled, monkeypatch):
    """With recomputing nothing as long as the queries, and without a gradient nothing at all."""
    kept = []

    def noted(*arguments, **options):
        kept.append(run_forward(*arguments, **options))
        return kept[-1]

    for module in (entry, ops):
        monkeypatch.setattr(module, "run_forward", noted)
    scheduled(*schedule)
    function, leaves = make_problem(False)
    function(**leaves)
    with torch.no_grad():
        function(**leaves)
    (out, saved), (_, nothing) = kept
    assert len(nothing) == 0
    chunks, recompute = schedule
    assert len(saved) == chunks
    tensors = [x for part in saved for x in part.tensors() if x is not None]
    values = sum(x.numel() for x in tensors if x.is_floating_point())
    # Three outputs and their log-sum-exps, or nothing.
    assert values == 0 if recompute else values >= 3 * out.numel()


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize(
    ("packed", "schedule"),
    [(False, (1, False)), (False, (2, True)), (True, (1, False)), (True, (2, False))],
)
@pytest.mark.parametrize(
    "form", ["gates", "sparse compressed", "non-causal", "block_indices", *TOKEN_FORMS]
)
def test_fakes_agree_with_the_ops(form, schedule, packed, scheduled, monkeypatch):
    calls = []
    monkeypatch.setattr(entry, "is_traced", lambda *_: True)
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


@pytest.mark.unmeasured
@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("mode", ["token", "tile"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_max_workspace_bytes_compiles_once_for_all_lengths(packed, mode, monkeypatch):
    torch._dynamo.reset()
    # Packs on both sides of the limit.
    monkeypatch.setattr(compressed_forms, "FEW_PACKED_KEYS", 12)
    config = token_config() if mode == "token" else tile_config()
    # Packed heads run one by one; Dynamo takes 10 s more to read the choice for two.
    heads, kv_heads = (4, 2) if packed else (2, 1)
    weight = torch.randn(heads, 3, 8, dtype=DOUBLE, requires_grad=True)

    def function(q, k, v, cu_seqlens, max_seqlen):
        return nsa.forward(
            q, k, v, config=config, gate_proj_weight=weight, cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen, max_workspace_bytes=1, backend="fused",
        ).sin()  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(([200, 5, 0], [17, 100, 140], [300, 1, 2])):
        leading = (sum(lengths),) if packed else (2, sum(lengths))
        q, k, v = make_inputs(leading, heads, kv_heads, 8, dtype=DOUBLE, requires_grad=True)
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else (None, None)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            results = [f(q, k, v, *extra) for f in (function, compiled)]
        grads = [torch.autograd.grad(out.sum(), (q, k, v, weight)) for out in results]
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
        torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("fused_on_cpu")
def test_max_workspace_bytes_reaches_the_choice(monkeypatch):
    seen = []
    monkeypatch.setattr(
        entry,
        "make_schedule",
        lambda *_, max_workspace_bytes, **__: (
            seen.append(max_workspace_bytes) or ChunkSchedule(1, False)
        ),
    )
    q, k, v = make_inputs((1, 70), 2, 1, 8)
    nsa.forward(q, k, v, config=tile_config(), max_workspace_bytes=12345, backend="fused")
    layer = nsa.NativeSparseAttention(
        16, 2, 1, config=tile_config(), max_workspace_bytes=99, backend="fused"
    )
    layer(torch.randn(1, 70, 16))
    assert seen == [12345, 99]


def test_a_limit_asks_for_no_free_memory(monkeypatch):
    """So that context parallelism, which always sets one, depends on shapes alone."""

    def asked(*_):
        raise AssertionError("free memory")

    for name in ("mem_get_info", "memory_stats"):
        monkeypatch.setattr(torch.cuda, name, asked)
    q = SimpleNamespace(is_cuda=True, nbytes=1 << 40, device="cuda")
    sizes = Sizes(1, 1 << 20, 1 << 20, None, False, 1 << 20, 64, 4, 128, 2, TOKEN)
    inputs = Inputs(q, *(None,) * (len(Inputs._fields) - 1))
    call = dict(inputs=inputs, sizes=sizes, save=True)
    assert make_schedule(**call, max_workspace_bytes=1 << 60) == ChunkSchedule(1, False)
    assert make_schedule(**call, max_workspace_bytes=1) == ChunkSchedule(4, True)
    monkeypatch.setattr("nsa.fused.schedule.is_capturing", lambda _: False)
    monkeypatch.setattr("nsa.fused.schedule._total_bytes", lambda _: 80 << 30)
    with pytest.raises(AssertionError, match="free memory"):
        make_schedule(**call, max_workspace_bytes=None)
    # Nor does a fixed order, whose bits would follow from it: half of all memory is the limit.
    call["sizes"] = sizes._replace(deterministic=True)
    chosen = make_schedule(**call, max_workspace_bytes=None)
    assert chosen == make_schedule(**call, max_workspace_bytes=40 << 30)
    assert chosen != make_schedule(**call, max_workspace_bytes=80 << 30)
    # A captured step has the bits of an eager one.
    monkeypatch.setattr("nsa.fused.schedule.is_capturing", lambda _: True)
    assert make_schedule(**call, max_workspace_bytes=None) == chosen
    call["sizes"] = sizes
    assert make_schedule(**call, max_workspace_bytes=None) == ChunkSchedule(1, False)


@pytest.mark.parametrize("config", [nsa.NSAConfig.paper(), nsa.NSAConfig()], ids=["token", "tile"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads"),
    [(1024, 16, 1), (2048, 16, 1), (4096, 32, 2), (4096, 32, 8), (8192, 64, 4)],
)
def test_calls_that_may_be_recorded_ask_for_no_free_memory(
    config, deterministic, dim, heads, kv_heads
):
    """On a card of 80 GB, which has 79 GiB. Otherwise each call would run step by step, and say
    nothing."""
    tokens = recordings.MAX_ELEMENTS // dim
    for batch in (1, 4, tokens // 1024):
        q = torch.empty(batch, tokens // batch, heads, dim // heads, device="meta").bfloat16()
        sizes = make_sizes(
            q,
            config,
            None,
            num_keys=q.shape[1],
            num_kv_heads=kv_heads,
            gated_gradients=True,
            deterministic=deterministic,
        )
        needed = workspace_bytes(sizes, kv_heads, save=True, recompute=False)
        assert needed <= ALWAYS_FITS * (79 << 30)
