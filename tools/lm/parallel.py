"""Training on several ranks, as torchrun starts them; without torchrun, one process alone."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

import nsa

TIMEOUT = timedelta(minutes=5)
"""A rank that waits for another longer than this ends the run."""


class Alone:
    """One process, which has the whole batch."""

    first = True

    def __init__(self, device: str):
        self.device = device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Share the model among the ranks."""
        return model

    def own(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch ``(B, N)``, which all ranks drew."""
        return batch

    def mean(self, value: float) -> float:
        """The mean of the ranks' values."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank has the flag."""
        return flag

    def wait(self):
        """Wait for all ranks."""

    def leave(self):
        """End the communication."""


class Ranks(Alone):
    """The processes of torchrun: ``context_parallel`` share a sequence, the rest share the batch.

    Weights and the optimizer's state are sharded over all of them by ``fully_shard``.

    Raises:
        ValueError: the ranks are not a multiple of ``context_parallel``.
    """

    def __init__(self, device: str, context_parallel: int):
        kind = torch.device(device).type
        if kind == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        super().__init__(device)
        # Flags and losses go between CPUs, so that no rank waits for its GPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        # Else transfers wait for the kernels before them.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
        distributed.init_process_group(backend, timeout=TIMEOUT)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.first = self.rank == 0
        if self.size % context_parallel:
            raise ValueError(
                f"--context-parallel must divide the {self.size} ranks, got {context_parallel}"
            )
        self.context_parallel = context_parallel
        self.data_parallel = self.size // context_parallel
        self.all = distributed.init_device_mesh(kind, (self.size,))
        shape, names = (self.data_parallel, context_parallel), ("dp", "cp")
        self.mesh = distributed.init_device_mesh(kind, shape, mesh_dim_names=names)["cp"]

    def prepare(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from torch.distributed.tensor.parallel import parallelize_module

        if self.context_parallel > 1:
            style = nsa.distributed.ContextParallel()
            parallelize_module(model, self.mesh, {"blocks.*.attention": style})
        policy = MixedPrecisionPolicy()
        if self.all.device_type == "cuda":
            # The kernels need 16 bits.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=self.all, mp_policy=policy)
        return fully_shard(model, mesh=self.all, mp_policy=policy)

    def own(self, batch: Tensor) -> Tensor:
        if len(batch) % self.data_parallel:
            raise ValueError(
                f"--batch-size must be a multiple of {self.data_parallel}, which share it, got "
                f"{len(batch)}"
            )
        rows = batch.chunk(self.data_parallel)[self.rank // self.context_parallel]
        return nsa.distributed.shard(rows, self.mesh, dim=1)

    def mean(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.item() / self.size

    def any(self, flag: bool) -> bool:
        total = torch.tensor(int(flag))
        distributed.all_reduce(total)
        return total.item() > 0

    def wait(self):
        self.any(False)

    def leave(self):
        distributed.destroy_process_group()


def join(device: str, context_parallel: int) -> Alone:
    """This process and those that torchrun started with it.

    Raises:
        ValueError: there are not enough ranks.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Ranks(device, context_parallel)
    if context_parallel != 1:
        raise ValueError(
            f"--context-parallel={context_parallel} needs several processes: use torchrun "
            "--nproc-per-node"
        )
    return Alone(device)


@contextmanager
def whole_sequences(model: nn.Module):
    """Within it each rank has the weights whole and computes whole sequences, such as samples."""
    layers = [block.attention for block in model.blocks]
    layers = [x for x in layers if getattr(x, "context_parallel", None) is not None]
    former = [x.context_parallel for x in layers]
    # A call of a part of a block gathers no weights by itself.
    sharded = [x for x in (model, *model.blocks) if hasattr(x, "unshard")]
    for layer in layers:
        layer.context_parallel = None
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        for layer, parallel in zip(layers, former, strict=True):
            layer.context_parallel = parallel
