"""What the layer costs beside its kernels: operations, and tensors kept for backward."""

from collections import Counter

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import nsa
from nsa import compressor, layers, packing, whole_layer
from nsa.fused import compressed_forms, entry, fa4_lists, kernel_calls, layer_ops, planning
from nsa.testing import make_cu_seqlens
from tests.helpers.counted_operations import CountedOperations, count_kernel_calls

LENGTHS = [300, 24, 1, 187]
TOKENS, DIM, HEADS = sum(LENGTHS), 256, 4
PRESETS = {"token": nsa.NSAConfig.paper, "tile": nsa.NSAConfig}
modes = pytest.mark.parametrize("mode", PRESETS)


@pytest.fixture(autouse=True)
def _eager_calls_on_a_cpu(fused_on_cpu, monkeypatch):
    """Kernels are emulated, and a dispatch mode that looks is no reason for custom ops."""
    monkeypatch.setattr(compressed_forms, "ONE_TILE", 0)
    for module in (entry, layer_ops, compressor, whole_layer):
        monkeypatch.setattr(module, "is_traced", lambda *_: False)
    for module in (planning, packing, fa4_lists):
        monkeypatch.setattr(module, "may_keep", lambda _: True)


def make_layer(mode, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    config = PRESETS[mode]()
    return nsa.NativeSparseAttention(DIM, HEADS, 1, config, backend="fused", dtype=dtype, **options)


# PyTorch operations of a second step with the same shapes, without views and kernels of ours. The
# layer had 99 forward and 86 backward when its rotary embedding and gathers were such operations,
# and 162 forward for new boundaries when those made its plan.
@modes
@pytest.mark.parametrize(
    ("form", "most"),
    [("batched", (10, 15)), ("packing", (11, 14)), ("boundaries", (11, 14)), ("bare", (12, 14))],
)
def test_operations_of_a_step(mode, form, most, monkeypatch):
    calls = count_kernel_calls(monkeypatch)
    layer = make_layer(mode)
    kept = nsa.Packing(make_cu_seqlens(LENGTHS))
    forms = dict(
        batched=tuple,
        packing=lambda: (kept,),
        boundaries=lambda: (nsa.Packing(make_cu_seqlens(LENGTHS)),),
        bare=lambda: (make_cu_seqlens(LENGTHS), max(LENGTHS)),
    )
    x = torch.randn(*((1, TOKENS) if form == "batched" else (TOKENS,)), DIM, dtype=torch.bfloat16)
    x.requires_grad_()
    for _ in range(2):
        x.grad = None
        layer.zero_grad()
        extra = forms[form]()
        with CountedOperations(calls) as forward:
            y = layer(x, *extra)
        dout = torch.ones_like(y)
        with CountedOperations(calls) as backward:
            y.backward(dout)
    assert forward.launches.total() <= most[0], forward.launches
    assert backward.launches.total() <= most[1], backward.launches
    for counted in (forward, backward):
        assert not {"cos", "sin", "pow", "index_add", "stack"} & set(counted.launches)


@modes
def test_new_boundaries_take_three_launches_for_all_layers(mode, monkeypatch):
    launches = Counter()

    def counted(name):
        function = getattr(kernel_calls, name)

        def call(*args, **kwargs):
            launches[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(kernel_calls, name, call)

    counted("sequence_bounds")
    counted("plan_tables")
    stack = [make_layer(mode) for _ in range(2)]
    x = torch.randn(TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    kept = nsa.Packing(make_cu_seqlens(LENGTHS))
    # The layer's own blocks, and the plan.
    for bounds, wanted in (kept, (2, 1)), (kept, (0, 0)), (nsa.Packing(kept.cu_seqlens), (2, 1)):
        launches.clear()
        y = x
        for layer in stack:
            y = y + layer(y, bounds)
        y.sum().backward()
        assert (launches["sequence_bounds"], launches["plan_tables"]) == wanted


def saved_bytes(layer, x) -> Counter:
    """Bytes that a forward keeps for backward, by dtype; the parameters and ``x`` left out."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (t.dtype, storage.nbytes())
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    total = Counter()
    for dtype, size in kept.values():
        total[dtype] += size
    del y
    return total


@modes
def test_no_copy_of_the_queries_is_kept_in_float32(mode):
    x = torch.randn(1, TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    queries = TOKENS * DIM * 2
    saved = saved_bytes(make_layer(mode), x)
    # Three log-sum-exps of each head.
    assert saved[torch.float32] <= 3.5 * TOKENS * HEADS * 4
    # The rotated queries, the outputs of three branches and the gated sum; then keys and values,
    # the gates and their MLP, and what the compressors need.
    assert saved[torch.bfloat16] < 5 * queries + 3 * queries
    less = saved_bytes(make_layer(mode, recompute=True), x)
    assert less[torch.bfloat16] <= saved[torch.bfloat16] - 1.5 * queries
    assert less[torch.float32] < saved[torch.float32]


@modes
def test_of_long_inputs_less_is_kept(mode, monkeypatch):
    x = torch.randn(1, TOKENS, DIM, dtype=torch.bfloat16, requires_grad=True)
    queries = TOKENS * DIM * 2
    layer = make_layer(mode)
    saved = saved_bytes(layer, x)
    monkeypatch.setattr(layers, "LONG_ELEMENTS", x.numel())
    less = saved_bytes(layer, x)
    # The window's output; what the gates' MLP has between its layers is never kept.
    assert less[torch.bfloat16] <= saved[torch.bfloat16] - queries
    assert less[torch.float32] == saved[torch.float32] - TOKENS * HEADS * 4
    with torch.no_grad():
        layer(x)


@modes
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("long", [False, True], ids=["asked for", "long"])
def test_recomputed_gradients_are_the_same(mode, packed, long, monkeypatch):
    plain, recomputing = (
        make_layer(mode, torch.float64, recompute=r and not long) for r in (False, True)
    )
    x = torch.randn(*((TOKENS,) if packed else (1, TOKENS)), DIM, dtype=torch.float64)
    extra = (make_cu_seqlens(LENGTHS),) if packed else ()
    results = []
    for layer in (plain, recomputing):
        if long and layer is recomputing:
            monkeypatch.setattr(layers, "LONG_ELEMENTS", 0)
        hidden = x.clone().requires_grad_()
        y = layer(hidden, *extra)
        results.append([y, *torch.autograd.grad(y.square().sum(), [hidden, *layer.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
