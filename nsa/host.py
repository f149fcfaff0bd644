"""When the host may not look at values, or keep tensors: torch.compile and CUDA graph capture."""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether something looks at each operation and must see custom ops instead of kernels.

    That is torch.compile, a dispatch mode (such as that of fake tensors or of selective
    checkpointing), or any of the ``tensors``, of a subclass.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or not _PLAIN_TYPES.issuperset(map(type, tensors))
    )


def is_capturing(x: Tensor) -> bool:
    """Whether work on the device of ``x`` is being captured in a CUDA graph, not run."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return torch.cuda.is_current_stream_capturing()


def may_keep(x: Tensor) -> bool:
    """Whether what is computed now on the device of ``x`` may be kept for later calls.

    Not where something traces, whose tensors may have no data. On a GPU, on the default stream
    alone: elsewhere it is there only for what comes later on the same stream, while a graph is
    captured only in its replays. And the memory may not be ours: torch.compile(
    mode="reduce-overhead") runs a call once on a stream of its own, in the memory of the graph to
    be, and fails if more than the results is left there.
    """
    if is_traced(x):
        return False
    if not x.is_cuda:
        return True
    # The default stream is CUDA's null stream.
    return torch.cuda.current_stream(x.device.index).cuda_stream == 0 and not is_capturing(x)


def has_readable_values(x: Tensor) -> bool:
    """Whether the host can read values of ``x``; on a GPU it waits for them."""
    if x.is_meta or torch.compiler.is_compiling() or is_capturing(x):
        return False
    return not (is_traced(x) and detect_fake_mode([x]) is not None)
