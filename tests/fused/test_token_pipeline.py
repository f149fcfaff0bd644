"""Token mode in the fused pipeline, in float64 with emulated kernel calls, as in test_pipeline."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa
from nsa.geometry import Geometry
from nsa.reference.compression import compress
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.emulation import (
    batched_in_all_ways_and_packed,
    compressed,
    drawn_compressed_calls,
)
from tests.helpers.profiles import WITH_FIXTURES, examples
from tests.helpers.selections import assert_same_token_blocks
from tests.helpers.small_configs import token_config
from tests.helpers.strategies import Problem, leaves, token_problems

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


def compressed_keys(problem: Problem) -> torch.Tensor:
    if "compressed_kv" in problem.extras:
        return problem.extras["compressed_kv"][0]
    k = problem.k[0] if isinstance(problem.k, tuple) else problem.k
    geometry = Geometry.of(problem.q, k, problem.config, problem.extras.get("cu_seqlens"))
    flat = k.flatten(0, 1) if k.ndim == 4 else k
    k_cmp = compress(flat, problem.extras.get("compress_k_weight"), geometry)
    return k_cmp.unflatten(0, (len(k), -1)) if k.ndim == 4 and len(k) else k_cmp


@settings(max_examples=examples(180), **WITH_FIXTURES)
@given(problem=token_problems(), calls=drawn_compressed_calls)
def test_selection_equals_reference(problem, calls):
    expected = problem.select_blocks(backend="reference")
    with compressed(calls):
        actual = problem.select_blocks(backend="fused")
    call = (problem.q, compressed_keys(problem), problem.extras.get("cu_seqlens"), problem.config)
    assert_same_token_blocks(actual, expected, *call, atol=1e-12)


@pytest.mark.unmeasured
@settings(max_examples=examples(180), **WITH_FIXTURES)
@given(problem=token_problems(), calls=drawn_compressed_calls)
def test_output_and_gradients_equal_reference(problem, calls):
    with compressed(calls):
        check_output_and_gradients(problem)


def check_output_and_gradients(problem: Problem):
    inputs = [x.requires_grad_() for x in leaves(problem)]
    # Ties may be broken otherwise; forward must select what select_blocks does.
    indices = problem.select_blocks(backend="fused")
    results = []
    for call in (dict(backend="reference", block_indices=indices), dict(backend="fused")):
        out = problem.forward(**call)
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, inputs, dout, allow_unused=True)
        results.append((out, *grads))
    for expected, actual in zip(*results, strict=True):
        if expected is None or actual is None:
            assert all(x is None or not x.any() for x in (expected, actual))
        else:
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@settings(max_examples=examples(40), **WITH_FIXTURES)
@given(problem=token_problems(), calls=drawn_compressed_calls)
def test_block_indices_of_the_caller(problem, calls):
    indices = problem.select_blocks(backend="reference")
    expected = problem.forward(backend="reference", block_indices=indices)
    with compressed(calls):
        actual = problem.forward(backend="fused", block_indices=indices)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


FORMS = {
    "paper": {},
    "non-causal": {"causal": False},
    "started": {"compressed_visibility": "started"},
    "no overlap": {"compress_block_size": 16, "select_block_size": 32, "num_local_blocks": 1},
    "wide overlap": {"compress_block_size": 64, "compress_stride": 8},
    "near blocks in the window": {"window_size": 128},
}


@pytest.mark.parametrize("form", FORMS)
@batched_in_all_ways_and_packed
def test_gradcheck(packed, form):
    config = token_config(num_selected_blocks=3, **FORMS[form])
    lengths = [3, 0, 290, 1]
    leading = (sum(lengths),) if packed else (1, 270)
    q, k, v = make_inputs(leading, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    square = [torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    extras = {"cu_seqlens": make_cu_seqlens(lengths)} if packed else {}
    # Given, so that finite differences do not change the selection.
    indices = nsa.select_blocks(q, k, config=config, compress_k_weight=square[0], **extras)

    def function(q, k, v, weight, k_weight, v_weight):
        return nsa.forward(
            q, k, v, config=config, gate_proj_weight=weight, compress_k_weight=k_weight,
            compress_v_weight=v_weight, block_indices=indices, backend="fused", **extras,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (q, k, v, weight, *square), fast_mode=True)


@batched_in_all_ways_and_packed
@pytest.mark.parametrize("heads", [(16, 1), (6, 2), (3, 3)], ids=str)
def test_paper_config_equals_reference(heads, packed):
    """The pack is longer than the window of 512, and both have more blocks than are selected."""
    config = nsa.NSAConfig.paper(num_selected_blocks=5)
    lengths = [540, 0, 31, 64, 1]
    leading = (sum(lengths),) if packed else (2, 400)
    q, k, v = make_inputs(leading, *heads, 6, 4, dtype=torch.float64)
    extras = {"cu_seqlens": make_cu_seqlens(lengths)} if packed else {}
    expected, actual = (
        nsa.select_blocks(q, k, config=config, backend=b, **extras) for b in ("reference", "fused")
    )
    assert torch.equal(actual, expected)
    expected, actual = (
        nsa.forward(q, k, v, config=config, backend=b, **extras) for b in ("reference", "fused")
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@settings(max_examples=examples(20), **WITH_FIXTURES)
@given(chunk=st.sampled_from([1, 5000, 70_000]), packed=st.booleans())
def test_selection_does_not_depend_on_chunks(chunk, packed):
    from nsa.fused import selection

    config = nsa.NSAConfig.paper(num_selected_blocks=4)
    lengths = [70, 0, 300, 1]
    leading = (sum(lengths),) if packed else (2, 371)
    q, k, _ = make_inputs(leading, 4, 2, 8, dtype=torch.float64)
    extras = {"cu_seqlens": make_cu_seqlens(lengths)} if packed else {}
    expected = nsa.select_blocks(q, k, config=config, backend="reference", **extras)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TOKEN_SCORES", chunk)
        actual = nsa.select_blocks(q, k, config=config, backend="fused", **extras)
    assert torch.equal(actual, expected)


@batched_in_all_ways_and_packed
def test_later_tokens_change_nothing(packed):
    """Strictly causal, routing included."""
    config = nsa.NSAConfig.paper(num_selected_blocks=4)
    leading = (400,) if packed else (1, 400)
    extras = {"cu_seqlens": make_cu_seqlens([400])} if packed else {}
    inputs = make_inputs(leading, 4, 2, 8, dtype=torch.float64)
    others = make_inputs(leading, 4, 2, 8, dtype=torch.float64, seed=1)
    for cut in (1, 31, 32, 200, 399):
        mixed = [
            torch.cat([x.narrow(-3, 0, cut), y.narrow(-3, cut, 400 - cut)], -3)
            for x, y in zip(inputs, others, strict=True)
        ]
        outs = [
            nsa.forward(*x, config=config, backend="fused", **extras).narrow(-3, 0, cut)
            for x in (inputs, mixed)
        ]
        torch.testing.assert_close(*outs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_layer_equals_reference(compressor):
    """For packed sequences some of which have no compressed block."""
    config = token_config()
    layer = nsa.NativeSparseAttention(
        32, num_heads=4, num_kv_heads=2, config=config, compressor=compressor,
        head_dim=8, value_head_dim=6,
    ).double()  # fmt: skip
    lengths = [100, 3, 0, 270]
    x = torch.randn(sum(lengths), 32, dtype=torch.float64)
    results = []
    for backend in ("reference", "fused"):
        layer.backend = backend
        layer.zero_grad()
        out = layer(x, make_cu_seqlens(lengths), max(lengths))
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)
