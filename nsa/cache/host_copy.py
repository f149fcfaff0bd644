"""What the host knows of a cache without waiting for a GPU: its lengths, the order of its pages."""

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


class PageOrder:
    """Whether the host knows that each sequence of a cache has pages in order, all of its own.

    It does not once someone wrote to the table, until the cache is reset; nor once a CUDA graph was
    captured that does, because replays are not seen.

    Args:
        table: int32 ``(B, max_pages)``, on the device.
        known: whether they lie in order now; else the host never knows.
    """

    def __init__(self, table: Tensor, known: bool):
        self._table = table
        self._never = not known
        self._version = table._version if known else -1

    def is_known(self) -> bool:
        return not self._never and self._version == self._table._version

    def record(self, *, ordered: bool):
        """Take note that the table was written, or that a CUDA graph will."""
        self._never = self._never or is_capturing(self._table)
        self._version = self._table._version if ordered else -1
