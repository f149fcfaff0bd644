"""torch.compile of the layer over the fused pipeline with emulated kernels: one trace."""

from functools import partial

import pytest
import torch

import nsa
from nsa.fused import ops, plain_layer_ops
from nsa.testing import make_cu_seqlens
from tests.helpers.small_configs import tile_config, token_config

pytestmark = [pytest.mark.usefixtures("fused_on_cpu"), pytest.mark.unmeasured]

LENGTHS = ([100, 3, 0, 70], [50, 90, 1, 40], [300, 2, 3, 4])


# Each two options meet, not each three, because a case takes seconds.
@pytest.mark.parametrize(
    ("config", "gate", "compressor", "packed", "one_op"),
    [
        (tile_config(), "hidden", "mlp", False, False),
        (token_config(), "hidden", "mean", True, False),
        (tile_config(), "q", "mlp", True, False),
        (token_config(), "q", "mean", False, False),
        (token_config(), "hidden", "mean", False, True),
        (tile_config(), "q", "mlp", True, True),
    ],
    ids=[
        *("tile-hidden-mlp", "token-hidden-mean-packed", "tile-q-mlp-packed", "token-q-mean"),
        *("token-hidden-mean-one op", "tile-q-mlp-packed-one op"),
    ],
)
def test_layer_compiles_once_for_all_lengths(config, gate, compressor, packed, one_op, monkeypatch):
    """Of packed sequences some have no compressed block."""
    ran = []
    for module, name in ((plain_layer_ops, "run_op"), (ops, "run_attention")):
        function = getattr(module, name)
        call = partial(lambda name, function, *a: ran.append(name) or function(*a), name, function)
        monkeypatch.setattr(module, name, call)
    torch._dynamo.reset()
    layer = nsa.NativeSparseAttention(
        32,
        num_heads=4,
        num_kv_heads=2,
        config=config,
        gate=gate,
        compressor=compressor,
        separate_kv=gate == "q",
        head_dim=16 if one_op else 8,
        value_head_dim=16 if one_op else 8 if gate == "q" else 6,
        backend="fused",
    ).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    # By default theta is a symbol first, and all is traced again when the rotation takes its value:
    # in one case, because it takes twice as long.
    specialize_float = gate != "hidden" or not packed
    for index, lengths in enumerate(LENGTHS):
        leading = (sum(lengths),) if packed else (2, sum(lengths))
        x = torch.randn(*leading, 32, dtype=torch.float64)
        extra = (make_cu_seqlens(lengths), max(lengths)) if packed else ()
        results = []
        options = dict(error_on_recompile=index > 0, specialize_float=specialize_float)
        with torch._dynamo.config.patch(**options):
            for call in (layer, compiled):
                layer.zero_grad()
                out = call(x, *extra)
                out.square().sum().backward()
                results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
        torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    assert set(ran) == {"run_op" if one_op else "run_attention"}
