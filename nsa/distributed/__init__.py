"""Context parallelism: sequences that the ranks of a process group hold parts of.

Built on torch.distributed alone, whose modules only this package imports.
"""

from nsa.distributed.interface import forward, select_blocks
from nsa.distributed.layer import ContextParallel
from nsa.distributed.sharding import positions, shard, unshard
from nsa.distributed.tensor_parallel import TensorParallel

__all__ = [
    "ContextParallel",
    "TensorParallel",
    "forward",
    "positions",
    "select_blocks",
    "shard",
    "unshard",
]
