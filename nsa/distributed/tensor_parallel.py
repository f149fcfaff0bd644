"""The layer with its heads shared among ranks."""

from typing import Any

from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)


class TensorParallel(ParallelStyle):
    """Shares the heads of a :class:`nsa.NativeSparseAttention` among the ranks of a mesh.

    For ``torch.distributed.tensor.parallel.parallelize_module``, before ``fully_shard``::

        plan = {"blocks.*.attention": nsa.distributed.TensorParallel()}
        parallelize_module(model, mesh["tp"], plan)

    Each rank has ``H / P`` query heads and the ``H_kv / P`` KV heads that they attend. Inputs and
    outputs of the layer are whole and equal on all ranks. Weights become DTensors: those of the
    projections and the gates are sharded, those of the compressors are on every rank, and their
    gradients are summed.

    Raises:
        TypeError: the module is not an :class:`nsa.NativeSparseAttention`.
        ValueError: heads or hidden channels of the gates are not a multiple of the ranks, or the
            layer has ``separate_kv`` or ``gate="q"``, which are not supported.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if "context_parallel" not in vars(module):
            raise TypeError(
                f"TensorParallel is for nsa.NativeSparseAttention, got {type(module).__name__}"
            )
        layer: Any = module
        _check(layer, device_mesh.size())
        plan = {
            "q_proj": ColwiseParallel(),
            "k_proj": ColwiseParallel(),
            "v_proj": ColwiseParallel(),
            "o_proj": RowwiseParallel(),
            "gate_mlp.0": ColwiseParallel(),
            # A gate for each head and branch, heads first.
            "gate_mlp.2": RowwiseParallel(output_layouts=Shard(-1)),
        }
        parallelize_module(layer, device_mesh, plan)
        for compressor in (layer.compress_k, layer.compress_v):
            if compressor is not None:
                _share_weights(compressor, device_mesh)
        layer.num_heads //= device_mesh.size()
        layer.num_kv_heads //= device_mesh.size()
        return module


def _check(layer, ranks: int):
    if layer.gate_mlp is None:
        raise ValueError("gate must be 'hidden' with TensorParallel, got 'q'")
    if layer.num_kv_branches != 1:
        raise ValueError("separate_kv must be False with TensorParallel, got True")
    hidden = layer.gate_mlp[0].out_features
    for name, count in (
        ("num_kv_heads", layer.num_kv_heads),
        ("the hidden channels of the gate MLP", hidden),
    ):
        if count % ranks:
            raise ValueError(f"{name} must be a multiple of the {ranks} ranks, got {count}")


def _share_weights(module: nn.Module, mesh: DeviceMesh):
    """Let each rank compute with whole weights, whose gradients are the sums over ranks.

    The weights are DTensors. While the part that owns them runs, plain tensors take their places.
    """
    for part in module.modules():
        owned = list(part.named_parameters(recurse=False))
        for name, weight in owned:
            shared = distribute_tensor(weight.detach(), mesh, [Replicate()])
            setattr(part, name, nn.Parameter(shared, requires_grad=weight.requires_grad))
        if owned:
            weights = _LocalWeights()
            part.register_forward_pre_hook(weights.begin)
            part.register_forward_hook(weights.end, always_call=True)


class _LocalWeights:
    """Hooks that put plain tensors in the places of a module's own weights while it runs.

    They take the module that runs, because copies of a module have its hooks too; and its own
    weights alone, because fully_shard may put others in the places of those of a part later.
    """

    def __init__(self):
        self._former: dict[str, Any] = {}

    def begin(self, module: nn.Module, _):
        self._former = dict(module.named_parameters(recurse=False))
        module._parameters.update((name, _local(x)) for name, x in self._former.items())

    def end(self, module: nn.Module, *_):
        module._parameters.update(self._former)
        self._former = {}


def _local(weight: Tensor) -> Any:
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight
