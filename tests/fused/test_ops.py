"""Packed calls as torch.compile, fake tensors, subclasses and checkpoints see them: custom ops."""

import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import nsa
from nsa.fused import layer_ops, ops, schedule
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.packed_calls import (
    CONFIGS,
    F64,
    LENGTHS,
    OTHER,
    TOTAL,
    assert_same,
    both,
    inputs,
    modes,
    run,
)

pytestmark = pytest.mark.usefixtures("fused_on_cpu")


@pytest.mark.unmeasured
@modes
def test_boundaries_may_be_overwritten_before_the_backward_of_a_compiled_call(mode):
    torch._dynamo.reset()
    q, k, v = inputs()
    cu_seqlens = make_cu_seqlens(LENGTHS)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, cu_seqlens):
        return nsa.forward(q, k, v, cu_seqlens=cu_seqlens, config=CONFIGS[mode], backend="fused")

    expected = run(cu_seqlens, mode, "fused")
    out = call(q, k, v, cu_seqlens)
    cu_seqlens.data.copy_(make_cu_seqlens(OTHER))
    actual = (out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.unmeasured
@modes
def test_one_trace_serves_all_packings(mode):
    torch._dynamo.reset()
    q, k, v = inputs()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def call(q, k, v, given):
        return nsa.forward(q, k, v, cu_seqlens=given, config=CONFIGS[mode], backend="fused")

    packs = [LENGTHS, OTHER, [60, 50, 40, 51], [1, 199, 1, 0]]
    for index, lengths in enumerate(packs):
        # A number that changes becomes a symbol at its second value.
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            given = nsa.Packing(make_cu_seqlens(lengths))
            out = call(q, k, v, given)
            actual = (out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v)))
        expected = run(given, mode, "fused")
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        # Forward and backward of the compiled call used the plan that is kept.
        assert len(given.rounded._kept) == 1


@pytest.mark.unmeasured
@modes
def test_select_blocks_compiles(mode):
    torch._dynamo.reset()
    q, k, v = inputs(requires_grad=False)
    options = dict(config=CONFIGS[mode], backend="fused")

    def call(q, k, v, cu_seqlens):
        blocks = nsa.select_blocks(q, k, cu_seqlens=cu_seqlens, **options)
        return blocks, nsa.forward(q, k, v, cu_seqlens=cu_seqlens, block_indices=blocks, **options)

    # Packed tiles are counted on the host.
    compiled = torch.compile(call, fullgraph=mode == "token", backend="aot_eager")
    for lengths in (LENGTHS, OTHER):
        cu_seqlens = make_cu_seqlens(lengths)
        for given in (cu_seqlens, nsa.Packing(cu_seqlens)):
            blocks, out = compiled(q, k, v, given)
            expected_blocks, expected = call(q, k, v, cu_seqlens)
            assert torch.equal(blocks, expected_blocks)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    batched = [x[None] for x in (q, k, v)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*batched, None), call(*batched, None), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 130], ids=["no bound", "max_seqlen"])
@modes
def test_fake_tensors(mode, bound):
    with FakeTensorMode():
        q, k, v = inputs()
        for cu_seqlens in (make_cu_seqlens(LENGTHS), nsa.Packing(make_cu_seqlens(LENGTHS))):
            call = dict(config=CONFIGS[mode], cu_seqlens=cu_seqlens, backend="fused")
            out = nsa.forward(q, k, v, max_seqlen=bound, **call)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
            assert [x.shape for x in (out, *grads)] == [x.shape for x in (q, q, k, v)]
            if mode == "token":
                blocks = nsa.select_blocks(q, k, max_seqlen=bound, **call)
                assert blocks.shape == (TOTAL, 2, 4)
                out = nsa.forward(q, k, v, block_indices=blocks, max_seqlen=bound, **call)
                assert out.shape == q.shape


@pytest.mark.unmeasured
@modes
@pytest.mark.parametrize("huge", [2**31, 2**63, 10**30])
def test_a_huge_bound_of_a_compiled_call(huge, mode):
    torch._dynamo.reset()
    q, k, v = inputs(requires_grad=False)
    cu_seqlens = make_cu_seqlens(LENGTHS)
    options = dict(config=CONFIGS[mode], cu_seqlens=cu_seqlens, max_seqlen=huge, backend="fused")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        return nsa.forward(q, k, v, **options)

    torch.testing.assert_close(call(q, k, v), nsa.forward(q, k, v, **options), rtol=0, atol=1e-12)


def test_calls_on_a_gpu_go_straight_to_our_functions():
    """Not through the checks of torch.library.custom_op, which take as long as a launch."""
    for op in (ops.attention, ops.attention_backward, layer_ops.rotate_op):
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has_kernel(op._qualname, "CUDA")
        assert not has_kernel(op._qualname, "CPU")


class Marked(torch.Tensor):
    """A subclass that is neither traced nor has rules of its own."""


@pytest.mark.parametrize("name", ["q", "k", "v", "gate_proj_weight", "compress_k_weight"])
def test_a_subclass_anywhere_takes_the_custom_op(name, monkeypatch):
    taken = []
    op = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a: taken.append(a) or op(*a))
    tensors = dict(zip("qkv", inputs(requires_grad=False), strict=True))
    tensors |= dict(gate_proj_weight=torch.randn(4, 3, 8, dtype=F64))
    tensors |= dict(compress_k_weight=torch.randn(2, 8, 8, dtype=F64))
    call = dict(config=CONFIGS["token"], cu_seqlens=make_cu_seqlens(LENGTHS), backend="fused")
    expected = nsa.forward(**tensors, **call)
    assert not taken
    tensors[name] = tensors[name].as_subclass(Marked)
    assert torch.equal(nsa.forward(**tensors, **call), expected)
    assert len(taken) == 1


# Dynamo traces through a cached function of sizes, and says so.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_pairs_past_what_the_kernels_count_are_refused_when_traced(monkeypatch):
    monkeypatch.setattr(schedule, "MAX_PAIRS", 1500)
    q, k, v = inputs(requires_grad=False)
    call = dict(config=CONFIGS["token"], cu_seqlens=make_cu_seqlens(LENGTHS), backend="fused")
    expected = nsa.forward(q, k, v, **call)
    with pytest.raises(nsa.UnsupportedError, match=r"in 2 chunks .* got 1: .*max_workspace_bytes"):
        torch.compile(nsa.forward, backend="eager")(q, k, v, **call)
    out = torch.compile(nsa.forward, backend="eager")(q, k, v, max_workspace_bytes=1, **call)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@both
@modes
def test_selective_checkpointing(mode, backend):
    aten = torch.ops.aten
    kept = [aten.mm.default, aten.bmm.default, aten.addmm.default, aten._unsafe_view.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    cu_seqlens = make_cu_seqlens(LENGTHS)
    q, k, v = inputs()

    def call(q, k, v):
        return nsa.forward(q, k, v, cu_seqlens=cu_seqlens, config=CONFIGS[mode], backend=backend)

    out = checkpoint(call, q, k, v, use_reentrant=False, context_fn=contexts)
    actual = (out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v)))
    torch.testing.assert_close(actual, run(cu_seqlens, mode, backend), rtol=0, atol=1e-10)


@pytest.mark.unmeasured
@modes
def test_a_packing_of_inference_mode_trains(mode):
    torch._dynamo.reset()
    q, k, v = inputs()
    with torch.inference_mode():
        given = nsa.Packing(make_cu_seqlens(LENGTHS))
        nsa.forward(q, k, v, cu_seqlens=given, config=CONFIGS[mode], backend="fused")
    expected = run(make_cu_seqlens(LENGTHS), mode, "fused")
    assert_same(run(given, mode, "fused"), expected)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        return nsa.forward(q, k, v, cu_seqlens=given, config=CONFIGS[mode], backend="fused")

    grads = torch.autograd.grad(call(q, k, v).square().sum(), (q, k, v))
    torch.testing.assert_close(grads, expected[1:], rtol=0, atol=1e-12)


@pytest.mark.unmeasured
@modes
@pytest.mark.parametrize(
    ("shape", "recompute_window"),
    [
        ((1, 3), False),
        ((2, 15), False),
        ((2, 0), False),
        ((0, 3), False),
        ((2, 15), True),
        ((2, 0), True),
    ],
)
def test_sequences_without_a_compressed_block_compile(mode, shape, recompute_window):
    """The results of an op must not share memory, even if they are empty."""
    torch._dynamo.reset()
    q, k, v = make_inputs(shape, 4, 2, 64, requires_grad=True)
    options = dict(config=CONFIGS[mode], recompute_window=recompute_window, backend="fused")
    results = []
    for call in (nsa.forward, torch.compile(nsa.forward, backend="aot_eager", fullgraph=True)):
        out = call(q, k, v, **options)
        results.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
