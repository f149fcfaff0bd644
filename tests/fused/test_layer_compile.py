"""torch.compile of the layer over the fused pipeline with emulated kernels: one trace."""

import pytest
import torch

import nsa
from nsa.testing import make_cu_seqlens

pytestmark = pytest.mark.usefixtures("fused_on_cpu")

LENGTHS = ([100, 3, 0, 70], [50, 90, 1, 40], [300, 2, 3, 4])


# Each two options meet, not each three, because a case takes seconds.
@pytest.mark.parametrize(
    ("gate", "compressor", "packed"),
    [
        ("hidden", "mlp", False),
        ("hidden", "mean", True),
        ("q", "mlp", True),
        ("q", "mean", False),
    ],
)
def test_layer_compiles_once_for_all_lengths(gate, compressor, packed):
    torch._dynamo.reset()
    config = nsa.NSAConfig(
        compress_block_size=16, select_block_size=64, q_tile_size=64, num_selected_blocks=2
    )
    layer = nsa.NativeSparseAttention(
        32,
        num_heads=4,
        num_kv_heads=2,
        config=config,
        gate=gate,
        compressor=compressor,
        separate_kv=gate == "q",
        backend="fused",
    ).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, lengths in enumerate(LENGTHS):
        leading = (sum(lengths),) if packed else (2, sum(lengths))
        x = torch.randn(*leading, 32, dtype=torch.float64)
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else ()
        results = []
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            for call in (layer, compiled):
                layer.zero_grad()
                out = call(x, *extra)
                out.square().sum().backward()
                results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
