"""On the GPU: token mode against the float64 reference, what it selects, and that it is causal."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nsa
from nsa.fused.planning import make_plan
from nsa.fused.selection import select_blocks
from nsa.geometry import Geometry
from nsa.reference.compression import compress
from nsa.testing import make_cu_seqlens
from tests.helpers.cuda_graphs import PACKS, Call, check_replays
from tests.helpers.gpu_cases import (
    Case,
    Variant,
    assert_equal_but_for_rounding,
    assert_same_step,
    check_against_reference,
    check_nothing_is_left_unwritten,
    enough_kv_heads,
    gpu_test,
    make_tensors,
    num_queries,
    paper_case,
)
from tests.helpers.profiles import gpu_property
from tests.helpers.selections import assert_same_token_blocks

pytestmark = gpu_test


class Form(NamedTuple):
    """What kernels are compiled for; a covering set, since each costs seconds."""

    head_dim: int
    value_dim: int
    group: int
    dtype: torch.dtype
    changes: dict  # of the paper's configuration


_BF16, _FP16 = torch.bfloat16, torch.float16
NO_OVERLAP = dict(compress_block_size=32, compress_stride=32)
FORMS = [
    Form(128, 128, 16, _BF16, {}),
    Form(64, 64, 1, _BF16, {}),
    Form(96, 96, 3, _FP16, {}),
    Form(128, 128, 4, _BF16, dict(select_block_size=32)),
    Form(128, 128, 6, _FP16, {}),
    Form(64, 64, 8, _BF16, NO_OVERLAP),
    Form(192, 128, 16, _BF16, {}),
    Form(128, 64, 4, _BF16, {}),
    Form(64, 128, 3, _FP16, dict(compressed_visibility="started")),
    Form(128, 128, 16, _BF16, dict(causal=False)),
    Form(256, 256, 6, _BF16, {}),
    Form(64, 64, 32, _BF16, {}),
    Form(80, 48, 4, _BF16, dict(compress_block_size=64, compress_stride=16, select_block_size=32)),
    Form(128, 128, 1, _FP16, dict(compress_block_size=16, compress_stride=8, select_block_size=64)),
]
LENGTHS = [1, 31, 63, 64, 65, 129, 1000, 4096]


def form_id(form: Form) -> str:
    changes = "".join(f"-{name}={value}" for name, value in form.changes.items())
    dtype = str(form.dtype).removeprefix("torch.")
    return f"D{form.head_dim}-Dv{form.value_dim}-G{form.group}-{dtype}{changes}"


@st.composite
def cases(draw, form: Form) -> Case:
    initial, local = draw(st.integers(0, 1)), draw(st.integers(0, 2))
    config = nsa.NSAConfig.paper(
        **form.changes,
        num_initial_blocks=initial,
        num_local_blocks=local,
        num_selected_blocks=max(1, initial + local + draw(st.sampled_from([0, 1, 4, 13]))),
        window_size=draw(st.sampled_from([1, 64, 512])),
        scale=draw(st.sampled_from([None, None, 0.1])),
    )
    packed = draw(st.booleans())
    lengths = [draw(st.sampled_from(LENGTHS))]
    if packed:
        some = st.sampled_from([0, 0, 1, 31, 33, 65, 129, 700, 1000])
        lengths = [*draw(st.lists(some, max_size=6)), *lengths]
    queries = None
    if draw(st.integers(0, 2)) == 0:
        queries = tuple(draw(num_queries(n, 1)) for n in lengths)
        queries = queries if any(queries) else None
    return Case(
        variant=Variant(form.head_dim, form.value_dim, form.group, form.dtype, 0),
        num_kv_heads=enough_kv_heads(draw(st.sampled_from([1, 2])), form.group, lengths, queries),
        batch=1 if packed else draw(st.sampled_from([1, 1, 2])),
        lengths=tuple(lengths),
        packed=packed,
        config=config,
        separate=draw(st.booleans()),
        gates=draw(st.sampled_from(["none", "q", "given"])),
        compressor=draw(st.sampled_from(["mean", "mean", "weights", "given"])),
        seed=draw(st.integers(0, 2**16)),
        folded=packed and draw(st.booleans()),
        queries=queries,
    )


# 14 forms of 16 examples: 224 in one run.
@pytest.mark.parametrize("form", FORMS, ids=form_id)
def test_output_and_gradients(form):
    @gpu_property(f"token {form_id(form)}", 16)
    @given(case=cases(form))
    def check_case(case):
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_against_reference(case, monkeypatch)

    check_case()


PACKS_OF_BOTH_WAYS = {"mixed": (4096, 31, 0, 1, 33, 1000, 2900), "many": (70, 5, 300) * 90}


@pytest.mark.parametrize("folded", [False, True], ids=["masked", "folded"])
@pytest.mark.parametrize("pack", PACKS_OF_BOTH_WAYS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2], FORMS[8]], ids=form_id)
def test_packed_sequences_are_masked_or_folded(form, pack, folded, monkeypatch):
    variant = Variant(form.head_dim, form.value_dim, form.group, form.dtype, 0)
    config = nsa.NSAConfig.paper(**form.changes)
    lengths = PACKS_OF_BOTH_WAYS[pack]
    case = paper_case(
        variant=variant, config=config, lengths=lengths, packed=True, num_kv_heads=1, folded=folded
    )
    check_against_reference(case, monkeypatch)


# The band's kernel adds up to 32 partial results; more have a kernel of their own.
@pytest.mark.parametrize("blocks", [17, 24, 32, 33])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_many_blocks(packed, blocks, monkeypatch):
    case = paper_case(
        lengths=(4000, 0, 65, 1) if packed else (4000,),
        packed=packed,
        config=nsa.NSAConfig.paper(num_selected_blocks=blocks),
    )
    check_against_reference(case, monkeypatch)


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@torch.no_grad()
def test_selection_equals_reference(form, packed):
    """The same compressed keys on both sides, so that scores differ by float32 rounding alone."""
    lengths = (3000, 1, 0, 700, 31, 33) if packed else (4097,)
    config = nsa.NSAConfig.paper(**form.changes, num_selected_blocks=7)
    variant = Variant(form.head_dim, form.value_dim, form.group, form.dtype, 0)
    case = paper_case(
        variant=variant, lengths=lengths, packed=packed, compressor="given", config=config
    )
    arguments = make_tensors(case)
    q, k, k_cmp = arguments["q"], arguments["k"], arguments["compressed_kv"][0]
    extras = {"compressed_kv": arguments["compressed_kv"]}
    if packed:
        extras["cu_seqlens"] = arguments["cu_seqlens"]
    expected = nsa.select_blocks(q, k, config=config, backend="reference", **extras)
    actual = nsa.select_blocks(q, k, config=config, backend="fused", **extras)
    assert (actual == expected).float().mean() > 0.999
    # A score is a sum over the group of weighted probabilities.
    atol = 1e-4 * form.group
    assert_same_token_blocks(actual, expected, q, k_cmp, extras.get("cu_seqlens"), config, atol)


@torch.no_grad()
def test_equal_scores_go_to_the_lower_index():
    config = nsa.NSAConfig.paper(num_selected_blocks=7)
    arguments = make_tensors(paper_case(config=config, lengths=(3000,)))
    keys = arguments["k"][:, :1].expand_as(arguments["k"])
    actual, expected = (
        nsa.select_blocks(arguments["q"], keys, config=config, backend=backend)
        for backend in ("fused", "reference")
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@torch.no_grad()
def test_forward_selects_as_select_blocks(packed):
    lengths = (700, 0, 1, 4096) if packed else (4096,)
    case = paper_case(lengths=lengths, packed=packed)
    arguments = make_tensors(case)
    extras = {"cu_seqlens": arguments["cu_seqlens"]} if packed else {}
    q, k = arguments["q"], arguments["k"]
    indices = nsa.select_blocks(q, k, config=case.config, backend="fused", **extras)
    call = dict(arguments, config=case.config, backend="fused")
    outs = [nsa.forward(**call), nsa.forward(**call, block_indices=indices), nsa.forward(**call)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2]), "forward gives the same bits each time"


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@torch.no_grad()
def test_later_tokens_change_nothing(packed):
    """Strictly causal, routing included: to the bit."""
    length = 3000
    case = paper_case(lengths=(length,), packed=packed)
    arguments, others = make_tensors(case), make_tensors(case._replace(seed=1))
    call = dict(config=case.config, backend="fused")
    expected = nsa.forward(**arguments, **call)
    for cut in (1, 31, 32, 64, 65, 1000, 2048, length - 1):
        mixed = dict(arguments)
        for name in ("q", "k", "v"):
            x, y = arguments[name], others[name]
            mixed[name] = torch.cat([x.narrow(-3, 0, cut), y.narrow(-3, cut, length - cut)], -3)
        actual = nsa.forward(**mixed, **call)
        assert torch.equal(actual.narrow(-3, 0, cut), expected.narrow(-3, 0, cut)), cut


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_nothing_is_left_unwritten(packed):
    lengths = (700, 0, 1, 65, 4096, 31) if packed else (1000,)
    check_nothing_is_left_unwritten(paper_case(lengths=lengths, packed=packed))


@pytest.mark.parametrize("heads", [(64, 4), (32, 8)], ids=str)
@torch.no_grad()
def test_selection_of_64k_tokens_takes_2_gib_at_most(heads):
    config, length = nsa.NSAConfig.paper(), 1 << 16
    q = torch.randn(1, length, heads[0], 128, device="cuda", dtype=_BF16)
    k = torch.randn(1, length, heads[1], 128, device="cuda", dtype=_BF16)
    geometry = Geometry.of(q, k, config)
    k_cmp = compress(k[0], None, geometry)[None]
    lse = torch.randn(1, heads[0], length, device="cuda").add(9)
    plan = make_plan(q, config)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    taken = select_blocks(q, k_cmp, lse, plan)
    extra = torch.cuda.max_memory_allocated() - before - taken.nbytes
    assert extra <= 2 << 30


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@torch.no_grad()
def test_results_do_not_depend_on_the_schedule(packed):
    """Chunks of KV heads: slices of heads are read where they are."""
    lengths = (700, 0, 1, 2000) if packed else (2000,)
    case = paper_case(lengths=lengths, packed=packed, num_kv_heads=3)
    arguments = make_tensors(case)
    call = dict(arguments, config=case.config, backend="fused")
    outs = [nsa.forward(**call, max_workspace_bytes=limit) for limit in (None, 1)]
    assert_equal_but_for_rounding(*outs)


@pytest.mark.parametrize("passes", ["forward_only", "forward_and_backward"])
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_cuda_graph(passes, packed):
    config, packs, extra = nsa.NSAConfig.paper(), (None, None), ()
    leading = (sum(PACKS[0]),) if packed else (2, 1000)
    if packed:
        packs = [make_cu_seqlens(lengths, "cuda") for lengths in PACKS]
        extra = (packs[0].clone(), max(map(max, PACKS)))
    call = Call(leading, 128, config, *extra)
    check_replays(call, getattr(call, passes), packs)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_layer_trains(packed):
    """Also as torch.compile sees it."""
    torch._dynamo.reset()
    layer = nsa.NativeSparseAttention(
        512, num_heads=8, num_kv_heads=2, config=nsa.NSAConfig.paper(), backend="fused"
    )
    layer = layer.to("cuda", _BF16)
    lengths = [1000, 1, 0, 300]
    x = torch.randn(*(sum(lengths),) if packed else (2, 700), 512, device="cuda", dtype=_BF16)
    extra = (make_cu_seqlens(lengths, "cuda"), max(lengths)) if packed else ()
    assert_same_step(layer, torch.compile(layer, fullgraph=True, dynamic=True), x, *extra)
