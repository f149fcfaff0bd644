"""What the host knows of the lengths of a cache without waiting for a GPU."""

import torch
from torch import Tensor

from nsa.host import is_capturing


class HostCopy:
    """``lengths`` and ``floors`` of a cache on the host, as long as it knows every change.

    On a CPU they are the tensors themselves. On a GPU the host knows nothing once a CUDA graph was
    captured, because each replay changes the lengths; nor once someone else wrote to them.

    Args:
        lengths, floors: int32 ``(B,)``, on the device.
        known: whether both are 0.
    """

    def __init__(self, lengths: Tensor, floors: Tensor, known: bool):
        self._lengths = lengths
        self._on_host = lengths.device.type == "cpu"
        self._captured = False
        self._known: tuple[Tensor, Tensor] | None = None
        self._version = -1
        if self._on_host:
            self._known = lengths, floors
        elif known:
            zeros = torch.zeros(lengths.shape, dtype=torch.int32, device="cpu")
            self.record((zeros, zeros))

    def read(self) -> tuple[Tensor, Tensor] | None:
        """``lengths`` and ``floors`` as CPU tensors, or None."""
        if self._on_host or self._version == self._lengths._version:
            return self._known
        return None

    def record(self, known: tuple[Tensor, Tensor] | None):
        """Take note of a change: the new values, or None where the host does not know them."""
        if self._on_host:
            return
        self._captured = self._captured or is_capturing(self._lengths)
        self._known = None if self._captured else known
        self._version = self._lengths._version
