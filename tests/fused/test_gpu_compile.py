"""On the GPU: torch.compile of a function and of a model with the layer."""

import pytest
import torch

import nsa
from nsa import recordings
from nsa.fused import plain_layer_ops
from nsa.testing import make_cu_seqlens, make_inputs
from tests.helpers.gpu_cases import assert_equal_but_for_rounding, assert_same_step, gpu_test

pytestmark = gpu_test


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
def test_forward_compiles_once_for_all_lengths(packed):
    config = nsa.NSAConfig()
    weight = torch.randn(8, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def loss(q, k, v, weight, cu_seqlens, max_seqlen):
        out = nsa.forward(
            q,
            k,
            v,
            config=config,
            gate_proj_weight=weight,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            backend="fused",
        )
        return out.float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for index, lengths in enumerate(([1000, 65, 1], [129, 2000, 63], [700, 700, 5])):
        leading = (sum(lengths),) if packed else (2, lengths[0] + lengths[1])
        q, k, v = make_inputs(
            leading, 8, 2, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True, seed=index
        )
        extra = (make_cu_seqlens(lengths, "cuda"), max(lengths)) if packed else (None, None)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            expected, actual = (f(q, k, v, weight, *extra) for f in (loss, compiled))
            torch.testing.assert_close(actual, expected)
            wanted = torch.autograd.grad(expected, (q, k, v, weight))
            grads = torch.autograd.grad(actual, (q, k, v, weight))
        for grad, want in zip(grads, wanted, strict=True):
            assert_equal_but_for_rounding(grad, want)


def test_a_model_with_the_layer_compiles():
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(
        256, num_heads=4, num_kv_heads=2, config=nsa.NSAConfig(), backend="fused"
    )
    model = torch.nn.Sequential(torch.nn.LayerNorm(256), layer, torch.nn.Linear(256, 16))
    model = model.to("cuda", torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for index, length in enumerate((1000, 777)):
        x = torch.randn(2, length, 256, device="cuda", dtype=torch.bfloat16)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            assert_same_step(model, compiled, x)


def test_packings_compile_once_for_all_lengths():
    layer = nsa.NativeSparseAttention(256, 4, 2, nsa.NSAConfig.paper(), backend="fused")
    layer = layer.to("cuda", torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for index, lengths in enumerate(([1000, 65, 1], [129, 2000, 63], [700, 700, 5])):
        packing = nsa.Packing(make_cu_seqlens(lengths, "cuda"))
        x = torch.randn(sum(lengths), 256, device="cuda", dtype=torch.bfloat16)
        with torch._dynamo.config.patch(error_on_recompile=index > 1):
            assert_same_step(layer, compiled, x, packing)


@pytest.mark.parametrize("form", ["batched", "packed", "packing"])
def test_graphs_of_torch_compile_train(form):
    """With mode="reduce-overhead": the second call is captured, later ones are replays."""
    torch.manual_seed(0)
    layer = nsa.NativeSparseAttention(
        256, num_heads=4, num_kv_heads=2, config=nsa.NSAConfig(), backend="fused"
    )
    layer = layer.to("cuda", torch.bfloat16)
    lengths = [1000, 65, 1]
    cu_seqlens = make_cu_seqlens(lengths, "cuda")
    extra = {
        "batched": (),
        "packed": (cu_seqlens, max(lengths)),
        "packing": (nsa.Packing(cu_seqlens),),
    }[form]
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(*(2, 1000) if form == "batched" else (sum(lengths),), 256, device="cuda")
        assert_same_step(layer, compiled, x.bfloat16(), *extra)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("config", ["paper", "tile"])
@pytest.mark.parametrize("form", ["batched", "packed", "packing"])
def test_compiled_calls_are_recorded_but_not_those_of_a_graph(form, config, mode, monkeypatch):
    recordings.clear()
    torch.manual_seed(0)
    config = nsa.NSAConfig.paper() if config == "paper" else nsa.NSAConfig()
    layer = nsa.NativeSparseAttention(1024, 16, 1, config, backend="fused")
    layer = layer.to("cuda", torch.bfloat16)
    lengths = [1000, 65, 1]
    cu_seqlens = make_cu_seqlens(lengths, "cuda")
    extra = {
        "batched": (),
        "packed": (cu_seqlens, max(lengths)),
        "packing": (nsa.Packing(cu_seqlens),),
    }[form]
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    monkeypatch.setattr(recordings, "ENABLED", True)
    for _ in range(5):
        x = torch.randn(*(2, 1000) if form == "batched" else (sum(lengths),), 1024, device="cuda")
        assert_same_step(layer, compiled, x.bfloat16(), *extra)
    found = {form[0][0] for form in recordings._recordings}
    of_ops = {
        plain_layer_ops.run_op,
        plain_layer_ops.run_op_backward,
    }
    assert found & of_ops == (of_ops if mode == "default" else set())
