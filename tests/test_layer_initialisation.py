"""How the layer's parameters start, however they are made, and what copies of it share."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import nsa

CONFIG = nsa.NSAConfig.paper(compress_block_size=8, compress_stride=4, select_block_size=8)


def make_layer(**options):
    return nsa.NativeSparseAttention(64, 4, 2, CONFIG, bias=True, **options)


def reset_all(layer):
    """Initialise as PyTorch's own tools do."""
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return layer


def spoil(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    return layer


def wanted_std(name, parameter):
    if name.endswith("bias"):
        return 0.0
    if name.endswith("position") or name in ("gate_proj_weight", "gate_mlp.2.weight"):
        return 0.02
    return (2.0 if "mlp.0" in name else 1.0) ** 0.5 * parameter.shape[1] ** -0.5


def assert_initialised(parameters):
    count = 0
    for name, parameter in parameters:
        std, error = wanted_std(name, parameter), 5 / parameter.numel() ** 0.5
        assert parameter.std(correction=0).sub(std).abs() <= error * std, name
        assert parameter.mean().abs() <= error * std, name
        count += 1
    assert count > 14


def skip_init(gate):
    layer = nn.utils.skip_init(nsa.NativeSparseAttention, 64, 4, 2, CONFIG, gate=gate, bias=True)
    return reset_all(spoil(layer))


INITIALISE = {
    "constructor": lambda gate: make_layer(gate=gate),
    "modules": lambda gate: reset_all(spoil(make_layer(gate=gate))),
    "meta": lambda gate: reset_all(
        spoil(make_layer(gate=gate, device="meta").to_empty(device="cpu"))
    ),
    "skip-init": skip_init,
}


@pytest.mark.parametrize("gate", ["hidden", "q"])
@pytest.mark.parametrize("initialise", INITIALISE.values(), ids=INITIALISE)
def test_initialisation(initialise, gate):
    assert_initialised(initialise(gate=gate).named_parameters())


# With one process FSDP1 warns that it does not shard.
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_initialisation_by_fsdp1(mesh, gate):
    layer = make_layer(gate=gate, device="meta")
    sharded = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.summon_full_params(sharded):
        assert_initialised(sharded.named_parameters())


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete:UserWarning")
@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_initialisation_by_fsdp2(mesh, gate):
    layer = make_layer(gate=gate, device="meta")
    fully_shard(layer.q_proj, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    reset_all(spoil(layer.to_empty(device="cpu")))
    assert_initialised((name, p.full_tensor()) for name, p in layer.named_parameters())


@pytest.mark.parametrize("gate", ["hidden", "q"])
def test_each_module_initialises_its_own_parameters_alone(gate):
    layer = make_layer(gate=gate)
    for module in layer.modules():
        if not hasattr(module, "reset_parameters"):
            continue
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        spoil(layer)
        module.reset_parameters()
        own = {id(p) for p in module.parameters(recurse=False)}
        for name, parameter in layer.named_parameters():
            assert parameter.isnan().any().item() == (id(parameter) not in own), name
        layer.load_state_dict(before)


def test_linear_layers_are_of_the_exact_type():
    linears = [m for m in make_layer().modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 10
    assert all(type(linear) is nn.Linear for linear in linears)


def copy_by_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copy_by_save],
    ids=["deepcopy", "pickle", "save"],
)
def test_a_copy_initialises_itself_and_not_the_original(duplicate):
    layer = make_layer(gate="q")
    other = duplicate(layer)
    before = copy.deepcopy(layer.state_dict())
    reset_all(other)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name
        if not name.endswith("bias"):
            assert not torch.equal(parameter, other.get_parameter(name)), name
    # The copy outlives the original, and so can initialise itself.
    del layer
    assert_initialised(reset_all(spoil(other)).named_parameters())


def test_a_deleted_layer_is_freed_at_once():
    gc.disable()
    try:
        layer = make_layer()
        weights = [weakref.ref(parameter) for parameter in layer.parameters()]
        del layer
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()
