"""What the ranks of :mod:`tests.helpers.world` run with the layer."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

import nsa
from nsa import rope
from nsa.distributed import rank_layout
from nsa.distributed.order import make_pieces
from tests.helpers.emulation import emulate_kernels


class Model(nn.Module):
    """Residual layers."""

    def __init__(self, config: nsa.NSAConfig, recompute: bool = False, layers: int = 2, **options):
        super().__init__()
        torch.manual_seed(0)
        make = [
            nsa.NativeSparseAttention(16, 4, 2, config, dtype=torch.float64, **options)
            for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(make)
        self.recompute = recompute

    def forward(self, x: Tensor, *boundaries) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = x + checkpoint(block, x, *boundaries, use_reentrant=False)
            else:
                x = x + block(x, *boundaries)
        return x


def make_mesh(group) -> DeviceMesh:
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))


def train_step(group, model: Model, x: Tensor, bounds, order: str, form: str) -> tuple:
    """Output of own tokens, the loss, and the gradients of the weights by name.

    Args:
        form: "plain" gives this rank's part of the gradients; "fsdp" the average of ranks, which
            fully_shard makes; "compiled" is plain, under torch.compile; "fused" is plain, with
            emulated kernels.
    """
    mesh, dim = make_mesh(group), x.ndim - 2
    model = copy.deepcopy(model)
    if form == "fused":
        emulate_kernels(setattr)
        for block in model.blocks:
            block.backend = "fused"
    style = nsa.distributed.ContextParallel(order)
    parallelize_module(model, mesh, {"blocks.*": style})
    if form == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    run = torch.compile(model, backend="aot_eager") if form == "compiled" else model
    own = nsa.distributed.shard(x, mesh, dim, order, cu_seqlens=bounds)
    boundaries = () if bounds is None else (bounds,)
    out = run(own, *boundaries)
    loss = out.square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    if form == "fsdp":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    return out.detach(), loss.item(), grads


def tensor_parallel_step(group, model: Model, x: Tensor, copied: bool = False) -> tuple:
    """Output and gradients of the input and, by name, of the whole weights.

    Args:
        copied: step a copy of the parallel model, whose own weights then are 0.
    """
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    model = copy.deepcopy(model)
    parallelize_module(model, mesh, {"blocks.*": nsa.distributed.TensorParallel()})
    if copied:
        former, model = model, copy.deepcopy(model)
        with torch.no_grad():
            for weight in former.parameters():
                weight.zero_()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().mean().backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return out.detach(), x.grad, grads


def sharded_tensor_parallel_step(group, model: Model, x: Tensor) -> dict[str, Tensor]:
    """Gradients by name of the whole weights, of 2 by 2 ranks; every module is an FSDP unit."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = copy.deepcopy(model)
    parallelize_module(model, mesh["tp"], {"blocks.*": nsa.distributed.TensorParallel()})
    for module in reversed(list(model.modules())):
        if not isinstance(module, nn.ModuleList):
            fully_shard(module, mesh=mesh["dp"])
    model(x.chunk(2)[mesh["dp"].get_local_rank()]).square().mean().backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def tables(group, model: Model, x: Tensor) -> tuple[int, int]:
    """Rotary tables and layouts that are made for two steps of all layers."""
    for kept in (rope._kept_table, rank_layout._kept_layout):
        kept.cache_clear()
    for _ in range(2):
        train_step(group, model, x, None, "head-tail", "plain")
    return rope._kept_table.cache_info().misses, rank_layout._kept_layout.cache_info().misses


def selected(group, layer: nn.Module, x: Tensor, bounds, order: str) -> Tensor:
    """What a layer selects for own tokens."""
    mesh = make_mesh(group)
    layer = parallelize_module(copy.deepcopy(layer), mesh, nsa.distributed.ContextParallel(order))
    own = nsa.distributed.shard(x, mesh, x.ndim - 2, order, cu_seqlens=bounds)
    return layer.select_blocks(own, bounds)


def error_of_layer(group, layer: nn.Module, lengths: list[int]) -> str:
    """The error of a layer to which ranks give parts of these lengths."""
    layer = parallelize_module(layer, make_mesh(group), nsa.distributed.ContextParallel())
    try:
        layer(torch.zeros(1, lengths[group.rank()], layer.dim, dtype=torch.float64))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def own_tokens(length: int, ranks: int, rank: int, order: str, lengths) -> Tensor:
    return make_pieces(length, ranks, order, lengths).tokens(rank)


def error_of_tensor_parallel(group, layer: nn.Module) -> str:
    try:
        parallelize_module(layer, make_mesh(group), nsa.distributed.TensorParallel())
    except ValueError as error:
        return str(error)
    return "no error"
