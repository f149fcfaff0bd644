"""pytest-benchmark: the reference, the fused backend and dense attention side by side.

    pytest tests/benchmarks --benchmark-only --benchmark-group-by=group,param:step

``make test`` runs each once, untimed. One is timed after another, and short of the care that
``benchmarks/bench_vs_dense.py`` takes.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import nsa
from nsa.testing import make_inputs

PASSES = ("forward", "forward+backward")
HEADS, KV_HEADS, DIM = 4, 2, 32
NO_GPU = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9


def run(benchmark, name: str, attention, inputs):
    """Time one pass of ``attention(q, k, v)``."""

    def step():
        if name == "forward":
            with torch.no_grad():
                out = attention(*inputs)
        else:
            out = attention(*inputs)
            torch.autograd.grad(out.sum(), inputs)
        if out.is_cuda:
            torch.cuda.synchronize()
        return out

    assert benchmark(step).isfinite().all()


def nsa_attention(backend: str, config: nsa.NSAConfig):
    return lambda q, k, v: nsa.forward(q, k, v, config=config, backend=backend)


def torch_attention(q, k, v):
    """PyTorch's dense causal attention."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def fa4_attention(q, k, v):
    """FlashAttention-4's dense causal attention."""
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)[0]


CPU = {
    "reference, tile": nsa_attention("reference", nsa.NSAConfig(q_tile_size=64, window_size=64)),
    "reference, token": nsa_attention("reference", nsa.NSAConfig.paper(window_size=64)),
    "dense": torch_attention,
}
GPU = {
    "reference": nsa_attention("reference", nsa.NSAConfig()),
    "fused": nsa_attention("fused", nsa.NSAConfig()),
    "dense": fa4_attention,
}


@pytest.mark.benchmark(group="CPU, 512 tokens, float32")
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("attention", CPU)
def test_cpu(benchmark, attention, step):
    inputs = make_inputs((1, 512), HEADS, KV_HEADS, DIM, requires_grad=True)
    run(benchmark, step, CPU[attention], inputs)


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs an NVIDIA GPU of compute capability 9.0")
# FA4 and the DSL warn about themselves.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(group="GPU, 32768 tokens, bfloat16")
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("attention", GPU)
def test_gpu(benchmark, attention, step):
    inputs = make_inputs(
        (1, 32768), 32, 8, 128, dtype=torch.bfloat16, device="cuda", requires_grad=True
    )
    run(benchmark, step, GPU[attention], inputs)
