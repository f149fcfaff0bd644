"""``nsa.selected_attention`` of keys in pages: what it gives for the same keys without pages."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import nsa
from nsa.fused import constraints, decode_calls, paged_selection
from nsa.testing import make_cu_seqlens
from tests.helpers.paged_keys import attend_pages, in_pages
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.selected_cases import SelectedProblem, make_problem, selected_problems

backends = pytest.mark.parametrize("backend", ["reference", "fused"])
layouts = pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
pytestmark = pytest.mark.usefixtures("fused_on_cpu")


def decoding_problem(packed: bool = True, **changes) -> SelectedProblem:
    """Few queries of each sequence, which the kernel of decoding attends in their pages."""
    lengths = [(1, 1), (8, 200), (0, 40), (0, 0), (3, 65)] if packed else [(2, 130)] * 2
    sizes = dict(kv_heads=2, group=3, dims=(64, 32), block_size=32, slots=3)
    return make_problem(lengths, packed=packed, **(sizes | changes))


def assert_same(actual, expected):
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)


@backends
@settings(max_examples=examples(25), **WITH_FIXTURES)
@given(
    problem=selected_problems(),
    blocks=st.sampled_from([1, 2, 3, 0.5]),
    by_heads=st.booleans(),
)
def test_any_problem(backend, problem, blocks, by_heads):
    pages = in_pages(problem, int(blocks * problem.block_size), by_heads)
    actual = attend_pages(problem, pages, backend=backend)
    assert_same(actual, [x.detach() for x in problem.attend(backend="reference")])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("block_size", "page_size"), [(32, 64), (64, 64), (128, 256)])
@layouts
def test_few_queries_read_the_pages_where_they_lie(
    packed, block_size, page_size, causal, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("nothing is copied")

    monkeypatch.setattr(paged_selection, "attend_copied", refuse)
    problem = decoding_problem(packed, block_size=block_size, causal=causal, scale=0.2)
    for by_heads in (False, True):
        pages = in_pages(problem, page_size, by_heads)
        # As a column of a larger table.
        pages["page_table"] = torch.stack((pages["page_table"],) * 2, -1)[..., 0]
        for bounds in ({}, dict(max_seqlen=8)) if packed else ({},):
            actual = attend_pages(problem, pages, backend="fused", **bounds)
            assert_same(actual, [x.detach() for x in problem.dense()])


def test_parts_of_a_long_list_are_added_up(monkeypatch):
    splits = []
    attend = decode_calls.decode_attend
    monkeypatch.setattr(
        decode_calls, "decode_attend", lambda *given: splits.append(given[-1]) or attend(*given)
    )
    # Of two keys, most parts have none.
    for queries, keys in ((1, 380), (2, 380), (1, 2)):
        sizes = dict(kv_heads=1, group=2, dims=(64, 32), block_size=64, slots=6)
        problem = make_problem([(queries, keys)], packed=False, **sizes)
        # Logits far apart, so that a part counts little beside another.
        problem = problem._replace(scale=4.0)
        actual = attend_pages(problem, in_pages(problem, 64), backend="fused")
        assert_same(actual, [x.detach() for x in problem.dense()])
    assert splits == [6, 4, 6]


@backends
def test_the_pages_of_a_cache(backend):
    config = nsa.NSAConfig.paper()
    q, k, v = (torch.randn(1, 150, heads, 32).double() for heads in (4, 2, 2))
    cache = nsa.Cache(config, 1, 200, 2, 32, dtype=torch.float64)
    nsa.forward(q, k, v, cache=cache)
    lists = torch.tensor([0, 2], dtype=torch.int32).expand(1, 2, 2, 2)
    actual = nsa.selected_attention(
        q[:, -2:], cache.k_pages, cache.v_pages, lists,
        page_table=cache.page_table, seqused_k=cache.lengths, backend=backend,
    )  # fmt: skip
    assert_same(actual, nsa.selected_attention(q[:, -2:], k, v, lists))


@backends
def test_a_packing_and_the_output_alone(backend):
    problem = decoding_problem()
    pages = in_pages(problem, 64)
    out, _ = problem.attend(backend="reference")
    packing = nsa.Packing(problem.boundaries()["cu_seqlens"])
    actual = attend_pages(problem, pages, backend=backend, cu_seqlens=packing, return_lse=False)
    assert_same([actual], [out.detach()])


def test_results_are_in_the_dtype_of_the_query():
    problem = decoding_problem(dtype=torch.float32).to(torch.bfloat16)
    pages = in_pages(problem, 64)
    expected = problem.attend(backend="reference")
    for backend in ("reference", "fused"):
        out, lse = attend_pages(problem, pages, backend=backend)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
        # The reference rounds probabilities to 16 bits, the emulated kernel does not.
        torch.testing.assert_close(out, expected[0].detach(), rtol=0, atol=2**-8)
        torch.testing.assert_close(lse, expected[1].detach(), rtol=1e-5, atol=1e-5)


def test_a_graph_needs_pages_that_are_read_in_place(monkeypatch):
    monkeypatch.setattr(constraints, "is_capturing", lambda _: True)
    for changes, page_size, limit in (
        (dict(lengths=[(9, 60)]), 64, "at most 8 queries of a sequence, .* got 9"),
        (dict(group=33), 64, "at most 32 query heads to a KV head, got 33"),
        ({}, 48, "page_size to be a multiple of block_size=32, got 48"),
        (dict(dims=(64, 40)), 64, r"multiples of 32 up to 256 with a cache, got \(64, 40\)"),
    ):
        sizes = dict(kv_heads=2, group=3, dims=(64, 32), block_size=32, slots=3, packed=True)
        problem = make_problem(**(dict(lengths=[(2, 60)]) | sizes | changes))
        with pytest.raises(nsa.UnsupportedError, match=f"in a CUDA graph it reads .*{limit}"):
            attend_pages(problem, in_pages(problem, page_size), backend="fused")


@backends
def test_tensors_without_values_are_refused(backend):
    problem = decoding_problem(packed=False)
    pages = in_pages(problem, 64)
    given = dict(q=problem.q.detach(), block_indices=problem.block_indices, **pages)
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in given.items()}
        with pytest.raises(nsa.UnsupportedError, match="tensors with values"):
            nsa.selected_attention(**fake, block_size=32, backend=backend)


def bad_calls():
    problem = decoding_problem(False)
    pages = in_pages(problem, 64)
    table, used = pages["page_table"], pages["seqused_k"]
    packed = decoding_problem()
    packed_pages = in_pages(packed, 64)

    def case(text, error=ValueError, problem=problem, pages=pages, **changes):
        return problem, pages | changes, error, text

    return {
        "no lengths": case("must be given together, got no seqused_k", seqused_k=None),
        "no table": case("must be given together, got no page_table", page_table=None),
        "max_seqlen_k": case(
            "cu_seqlens_k and max_seqlen_k must be None with page_table", max_seqlen_k=200
        ),
        "keys of a Packing": case(
            "cu_seqlens_k and max_seqlen_k must be None with page_table.*Packing",
            problem=packed, pages=packed_pages, cu_seqlens=nsa.Packing(**packed.boundaries()),
        ),
        "int64 table": case(
            "page_table must have dtype torch.int32", TypeError, page_table=table.long()
        ),
        "int64 lengths": case(
            "seqused_k must have dtype torch.int32", TypeError, seqused_k=used.long()
        ),
        "table of one row": case("seqused_k must have one entry for each of the 1 rows",
                                 page_table=table[:1]),
        "other sequences": case(
            "page_table must have a row for each of the 2 sequences of q, got 1",
            page_table=table[:1], seqused_k=used[:1],
        ),
        "other packed sequences": case(
            "page_table must have a row for each of the 2 sequences of cu_seqlens, got 5",
            problem=packed, pages=packed_pages, cu_seqlens=make_cu_seqlens([5, 7]),
        ),
        "flat pools": case(r"k must have shape \(pages, page_size, H_kv, channels\).*got \(.*64\)",
                           k=pages["k"][0]),
        "other heads": case("that divides the 6 heads of q", k=pages["k"].expand(-1, -1, 8, -1)
                            if pages["k"].shape[2] == 1 else pages["k"].repeat(1, 1, 2, 1)),
        "no sequence": case(r"page_table must have .* with sizes of at least 1, got \(0, ",
                            page_table=table[:0]),
        "v of other pages": case("v must have shape", v=pages["v"][1:]),
        "v of another dtype": case("v must have the dtype of q", TypeError, v=pages["v"].float()),
        "lengths too short": case(
            "seqused_k must be at least the queries of a sequence, 2, .*got 1 for sequence 1",
            seqused_k=torch.tensor([130, 1], dtype=torch.int32),
        ),
        "lengths too long": case(
            "at most the tokens of its pages, 256; got 257 for sequence 0",
            seqused_k=torch.tensor([257, 130], dtype=torch.int32),
        ),
        "no page": case(
            r"page_table must name one of the \d+ pages.*got -1 for page 1 of sequence 0",
            page_table=torch.where(torch.arange(4) == 1, -1, table).int(),
        ),
        "a block past the keys": case(
            r"block_indices must lie in \[0, blocks of the sequence\), at most 8",
            seqused_k=torch.tensor([33, 130], dtype=torch.int32),
            problem=problem._replace(block_indices=problem.block_indices[..., :1] * 0 + 2),
        ),
    }  # fmt: skip


@backends
@pytest.mark.parametrize("name", bad_calls())
def test_refuses(name, backend):
    problem, pages, error, text = bad_calls()[name]
    with pytest.raises(error) as caught:
        attend_pages(problem, pages, backend=backend)
    assert type(caught.value) is error
    assert re.search(text, str(caught.value), re.DOTALL), str(caught.value)


def test_gradients_are_refused():
    problem = decoding_problem(False)
    pages = in_pages(problem, 64)
    pages["k"].requires_grad_()
    with pytest.raises(ValueError, match="must not require gradients with page_table"):
        attend_pages(problem, pages)
    with torch.no_grad():
        attend_pages(problem, pages)
