"""Gradients of keys and values: added up before they are rounded, and in memory of their own."""

from collections import Counter
from itertools import product

import pytest
import torch

import nsa
from nsa.fused import compressed_forms, kernel_calls, key_gradients
from nsa.fused.call_tensors import Inputs
from nsa.fused.key_sums import leaves_sums, round_sums
from nsa.fused.planning import make_plan, with_scale
from nsa.fused.strides import is_alone
from nsa.testing import make_cu_seqlens, make_inputs

HEADS, KV_HEADS, DIM, TOKENS = 4, 1, 64, 256


def make_case(**options):
    """A batch in token mode with compressed keys, and its plan."""
    config = with_scale(nsa.NSAConfig.paper(**options), 0.1)
    q, k, v = make_inputs((2, TOKENS), HEADS, KV_HEADS, DIM, dtype=torch.bfloat16)
    k_cmp, v_cmp = (torch.randn_like(k[:, :15]) for _ in "kv")
    inputs = Inputs(**dict.fromkeys(Inputs._fields) | dict(q=q, k=k, v=v, k_cmp=k_cmp, v_cmp=v_cmp))
    return inputs, make_plan(q, config, num_kv_heads=KV_HEADS)


def gradients_of(inputs, plan, compressed, **others):
    pairs = [tuple(torch.randn_like(inputs.k) for _ in "kv") for _ in range(2)]
    return key_gradients.key_gradients(inputs, compressed, *pairs, plan, None, summed=False)


def test_compressed_gradients_in_memory_of_their_own_are_not_copied(fused_on_cpu):
    inputs, plan = make_case()
    compressed = tuple(torch.randn_like(inputs.k_cmp) for _ in "kv")
    found = gradients_of(inputs, plan, compressed)
    assert found.k_cmp is compressed[0]
    assert found.v_cmp is compressed[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_gradients_of_one_memory_or_another_dtype_are(fused_on_cpu, dtype):
    inputs, plan = make_case()
    compressed = torch.randn(2, *inputs.k_cmp.shape).to(dtype).unbind()
    if dtype == torch.float32:
        compressed = tuple(x.clone() for x in compressed)
    found = gradients_of(inputs, plan, compressed)
    for grad, given in zip((found.k_cmp, found.v_cmp), compressed, strict=True):
        assert is_alone(grad)
        assert grad.dtype == inputs.k_cmp.dtype
        assert torch.equal(grad, given.to(grad.dtype))


def test_token_mode_adds_the_window_before_it_rounds(fused_on_cpu):
    inputs, plan = make_case()
    sums = tuple(torch.randn(inputs.k.shape) for _ in "kv")
    window = tuple(torch.randn_like(inputs.k[:, 100:]) for _ in "kv")
    found = round_sums(sums, window, None, torch.bfloat16, plan)
    for total, factor, last, grad in zip(sums, (0.1, 1.0), window, found, strict=True):
        expected = total.double() * factor
        expected[:, 100:] += last
        torch.testing.assert_close(grad.double(), expected, rtol=2**-8, atol=1e-5)


def test_which_sums_token_mode_leaves(fused_on_cpu):
    """Gradients of means that overlap are added by another kernel."""
    _, plan = make_case()
    for given, deterministic in product((False, True), repeat=2):
        assert leaves_sums(plan, given=given, deterministic=deterministic) is given


@pytest.mark.parametrize("form", ["batched", "adds queries", "packed"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_launch_gives_the_gradients_of_keys(fused_on_cpu, monkeypatch, deterministic, form):
    calls, round_once = Counter(), kernel_calls.round_sums

    def counted(sums, outs, factors, last=None):
        calls[len(outs), last is not None] += 1
        return round_once(sums, outs, factors, last)

    monkeypatch.setattr(kernel_calls, "round_sums", counted)
    monkeypatch.setattr(key_gradients, "_with_window", None)
    monkeypatch.setattr(compressed_forms, "UNFOLDED_CTAS", 0 if form == "adds queries" else 1 << 30)
    inputs, plan = make_case()
    assert plan.sums_queries(HEADS, KV_HEADS) == (form == "adds queries")
    leaves = [x for x in inputs if x is not None]
    options = {}
    if form == "packed":
        leaves = [x.flatten(0, 1) for x in leaves]
        options = dict(cu_seqlens=make_cu_seqlens([TOKENS, TOKENS]), max_seqlen=TOKENS)
    leaves = [x.requires_grad_() for x in leaves]
    q, k, v, *compressed = leaves
    out = nsa.forward(
        q, k, v, compressed_kv=tuple(compressed), config=plan.config, backend="fused",
        deterministic=deterministic, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert calls == {(2, True): 1}
    assert all(is_alone(x) for x in grads)
