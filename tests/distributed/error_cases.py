"""What the ranks of :mod:`tests.helpers.world` run to give errors: on rank 1, or on each."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed.tensor.parallel import parallelize_module

import nsa
from tests.helpers import rank_cases
from tests.helpers.layer_cases import make_mesh
from tests.helpers.strategies import Problem


class Nameless:
    """An argument that cannot be described."""

    def __repr__(self) -> str:
        raise RuntimeError("no name")


def error_of(function: Callable, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def autocast(group, problem: Problem) -> str:
    """Ranks under autocast to different dtypes, with arguments of the same two dtypes."""
    q, k, v = (x.float() for x in problem[:3])
    problem = Problem(q, k.bfloat16(), v.bfloat16(), problem.config, {})
    with torch.autocast("cpu", (torch.bfloat16, torch.float16)[group.rank()]):
        return error_of(rank_cases.forward, group, problem, "head-tail")


def order_of_selection(group, problem: Problem) -> str:
    order = ("head-tail", "zigzag")[group.rank()]
    arguments = dict(mesh=group, order=order, config=problem.config)
    return error_of(nsa.distributed.select_blocks, problem.q, problem.k, **arguments)


def unshard(group, change: dict) -> str:
    """The error of ``unshard``, with ``change`` on rank 1."""
    arguments = dict(x=torch.zeros(1, 12, 2), mesh=group, dim=1)
    return error_of(nsa.distributed.unshard, **arguments | (change if group.rank() else {}))


def layer(group, layer: nn.Module, function: str, change: dict) -> str:
    """The error of a method of a packed layer, with ``change`` on rank 1."""
    layer = parallelize_module(layer, make_mesh(group), nsa.distributed.ContextParallel())
    bounds = torch.tensor([0, 24], dtype=torch.int32)
    arguments = dict(x=torch.zeros(12, layer.dim), cu_seqlens=bounds)
    call = getattr(layer, function)
    return error_of(call, **arguments | (change if group.rank() else {}))


class Failing(nn.Module):
    def forward(self, *_):
        raise RuntimeError("this module fails")


def failing_gate(group, layer: nn.Module) -> str:
    """The error of a layer whose gate MLP raises on rank 1."""
    layer = parallelize_module(layer, make_mesh(group), nsa.distributed.ContextParallel())
    if group.rank():
        layer.gate_mlp = Failing()
    return error_of(layer, torch.zeros(1, 12, layer.dim))


def failing_compressor(group, layer: nn.Module, seconds: float) -> str:
    """The error of a layer whose compressor raises on rank 1, after the ranks have agreed."""
    options = dict(timeout=timedelta(seconds=seconds), use_local_synchronization=True)
    patient = distributed.new_group([0, 1], **options)
    layer = parallelize_module(layer, make_mesh(patient), nsa.distributed.ContextParallel())
    if group.rank():
        layer.compress_k = Failing()
    return error_of(layer, torch.zeros(1, 12, layer.dim))


def different_layers(group, layers: list[nn.Module]) -> str:
    """The error of ranks that have different layers."""
    style = nsa.distributed.ContextParallel()
    layer = parallelize_module(layers[group.rank()], make_mesh(group), style)
    return error_of(layer, torch.zeros(1, 12, layer.dim))


def wrong_arguments(group) -> list[str]:
    """Errors of each rank by itself."""
    x, outside = torch.zeros(1, 12, 2), distributed.GroupMember.NON_GROUP_MEMBER
    return [
        error_of(nsa.distributed.shard, x, group, 9),
        error_of(nsa.distributed.shard, [1], group, 0),
        error_of(nsa.distributed.positions, 12.0, group),
        error_of(nsa.distributed.positions, -12, group),
        error_of(partial(nsa.distributed.positions, device="gpu"), 12, group),
        error_of(nsa.distributed.shard, x, outside, 1),
    ]
