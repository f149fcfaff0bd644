"""The layer on a rank's part: positions, learned compression over borders, sharded training."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import nsa
from nsa.testing import make_cu_seqlens
from tests.helpers import layer_cases
from tests.helpers.small_configs import SMALL
from tests.helpers.world import World

TOKENS = 96


def one_process(model, x, bounds) -> tuple[torch.Tensor, dict]:
    out = model(x) if bounds is None else model(x, bounds)
    out.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return out.detach(), grads


def check(world, model, *, ranks=2, order="head-tail", lengths=None, form="plain"):
    torch.manual_seed(1)
    shape = (TOKENS, 16) if lengths else (2, TOKENS, 16)
    x, bounds = torch.randn(shape, dtype=torch.float64), None
    if lengths:
        bounds = make_cu_seqlens(lengths)
    expected, grads = one_process(model, x, bounds)
    results = world.run(
        layer_cases.train_step, model, x, bounds, order, form, ranks=ranks, seconds=60
    )
    for rank, (out, *_) in enumerate(results):
        tokens = layer_cases.own_tokens(TOKENS, ranks, rank, order, lengths)
        whole = expected.index_select(expected.ndim - 2, tokens)
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-9)
    for name, grad in grads.items():
        parts = [own[name] for *_, own in results]
        # Losses are means over own tokens, of which each rank has as many.
        total = parts[0] if form == "fsdp" else sum(parts) / ranks
        torch.testing.assert_close(total, grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gate", ["hidden", "q"])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_layer_equals_one_process(world, gate, compressor):
    model = layer_cases.Model(
        SMALL["token"], gate=gate, compressor=compressor, separate_kv=gate == "q"
    )
    check(world, model, ranks=3)


@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("compressor", ["mlp", "mean"])
def test_fused_layer_equals_one_process(world, compressor, packed):
    """With rotation and the compressor's rows by the kernels of the layer."""
    config = nsa.NSAConfig.paper(num_selected_blocks=4)
    options = dict(head_dim=16, compressor=compressor, separate_kv=packed)
    model = layer_cases.Model(config, backend="reference", **options)
    check(world, model, form="fused", lengths=[1, 0, 70, 25] if packed else None)


def test_rotary_tables_are_shared_by_layers_and_steps(world):
    model = layer_cases.Model(SMALL["token"])
    x = torch.randn(1, TOKENS, 16, dtype=torch.float64)
    # Of tokens and of blocks.
    assert world.run(layer_cases.tables, model, x, ranks=2) == [(2, 1)] * 2


@pytest.mark.parametrize("recompute", [False, True])
def test_tile_mode(world, recompute):
    """With what the layer saves for backward, and with less."""
    model = layer_cases.Model(SMALL["sparse"])
    for block in model.blocks:
        block.recompute = recompute
    check(world, model, order="contiguous")


@pytest.mark.parametrize("order", ["head-tail", "head-tail-each"])
def test_packed(world, order):
    lengths = [36, 0, 60] if order == "head-tail-each" else [1, 0, 70, 25]
    check(world, layer_cases.Model(SMALL["token"]), lengths=lengths, order=order)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_fully_shard(world, recompute):
    check(world, layer_cases.Model(SMALL["token"], recompute), form="fsdp")


def test_compiled(world):
    """One layer, because Dynamo reads each by itself."""
    check(world, layer_cases.Model(SMALL["token"], layers=1), form="compiled")


def test_selection(world):
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["tile"], dtype=torch.float64)
    x = torch.randn(1, 128, 16, dtype=torch.float64)
    whole = layer.select_blocks(x)
    first, last = world.run(layer_cases.selected, layer, x, None, "head-tail", ranks=2)
    assert torch.equal(torch.cat((first[..., :2, :], last, first[..., 2:, :]), dim=2), whole)


@pytest.mark.parametrize("compressor", ["mlp", "mean"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_tensor_parallel(world, compressor, recompute):
    model = layer_cases.Model(SMALL["token"], recompute, compressor=compressor, bias=True)
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    expected, grads = one_process(model, x, None)
    for out, dx, found in world.run(
        layer_cases.tensor_parallel_step, model, x.detach(), ranks=2, seconds=60
    ):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(dx, x.grad, rtol=0, atol=1e-9)
        torch.testing.assert_close(found, grads, rtol=0, atol=1e-9)


def test_copy_of_a_tensor_parallel_layer(world):
    """As an average of weights over steps makes it."""
    model = layer_cases.Model(SMALL["token"])
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    expected, grads = one_process(model, x, None)
    for out, _, found in world.run(layer_cases.tensor_parallel_step, model, x, True, ranks=2):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(found, grads, rtol=0, atol=1e-9)


@pytest.fixture
def new_world(tmp_path):
    """Ranks that have made equally many groups: a mesh of all makes more, which are numbered."""
    ranks = World(str(tmp_path))
    yield ranks
    ranks.stop()


def test_tensor_parallel_layer_whose_modules_are_all_fsdp_units(new_world):
    model = layer_cases.Model(SMALL["token"])
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    _, grads = one_process(model, x, None)
    # Four ranks that shard each module take long on two cores that do more.
    for found in new_world.run(layer_cases.sharded_tensor_parallel_step, model, x, seconds=60):
        torch.testing.assert_close(found, grads, rtol=0, atol=1e-9)


def test_layers_that_tensor_parallelism_cannot_share(mesh):
    def refuse(message, **options):
        layer = nsa.NativeSparseAttention(16, 4, 2, **options)
        with pytest.raises(ValueError, match=message):
            parallelize_module(layer, mesh, nsa.distributed.TensorParallel())

    refuse("gate must be 'hidden'", gate="q")
    refuse("separate_kv must be False", separate_kv=True)
    with pytest.raises(TypeError, match=r"is for nsa\.NativeSparseAttention, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, nsa.distributed.TensorParallel())


def test_heads_that_ranks_cannot_share(world):
    layer = nsa.NativeSparseAttention(16, 4, 2)
    text = world.run(layer_cases.error_of_tensor_parallel, layer, ranks=3)[0]
    assert text == "num_kv_heads must be a multiple of the 3 ranks, got 2"


def test_ranks_that_differ(world):
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["token"], dtype=torch.float64)
    texts = world.run(layer_cases.error_of_layer, layer, [12, 16], ranks=2)
    assert texts[0] == texts[1]
    assert "q: rank 0 torch.float64 (1, 12, 4, 4)" in texts[0]
    first, second = world.run(layer_cases.error_of_layer, layer, [12, 13], ranks=2)
    assert "another rank cannot make this call: rank 1: ValueError" in first
    assert second.startswith("ValueError: the sequence dimension must be a multiple of 4")


def test_the_style_is_for_the_layer(mesh):
    with pytest.raises(TypeError, match=r"is for nsa\.NativeSparseAttention, got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, nsa.distributed.ContextParallel())
    with pytest.raises(ValueError, match="order must be one of"):
        nsa.distributed.ContextParallel("zigzag")
    layer = nsa.NativeSparseAttention(16, 4, 2, SMALL["token"])
    x = torch.randn(1, 50, 16)
    whole = layer(x)
    parallelize_module(layer, mesh, nsa.distributed.ContextParallel())
    # One rank has the whole.
    torch.testing.assert_close(layer(x), whole)
