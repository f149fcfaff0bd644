"""Where the memories of a recorded function lie: in few arenas, each allocated at once.

A memory needs its place from its first use to its last. Others have the place before and after. So
an arena is about as large as what lives at a time, as if each memory was allocated and freed by
itself. What a call saves for its backward is an arena too, which other memories share: in the
forward before a saved one is written, and in the backward after its last use.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

ALIGNMENT = 512
"""Bytes to which memories are aligned, as PyTorch does on a GPU."""


class Memory(NamedTuple):
    """A memory to place: its number, its bytes, and the positions of its first and last use."""

    number: int
    size: int
    first: float
    last: float


class Place(NamedTuple):
    """Where a memory lies: an arena by its position among them, and bytes from its start."""

    arena: int
    offset: int


class Arena:
    """An allocation in which memories lie, of which no two have the same bytes at a time."""

    def __init__(self, *, grows: bool = True):
        self.size = 0
        self._grows = grows
        self._placed: list[tuple[int, Memory]] = []

    def append(self, memory: Memory) -> int:
        """Place a memory behind all others. The arena may not grow by others than these."""
        offset = self.size
        self.put(memory, offset)
        return offset

    def put(self, memory: Memory, offset: int) -> None:
        """Place a memory at ``offset``."""
        self._placed.append((offset, memory))
        self.size = max(self.size, aligned(offset + memory.size))

    def find(self, memory: Memory) -> int | None:
        """The first offset at which nothing lies while ``memory`` lives; None if it has no room."""
        found = 0
        for offset, other in sorted(self._placed):
            if other.first <= memory.last and memory.first <= other.last and other.size:
                if found + memory.size <= offset:
                    break
                found = max(found, aligned(offset + other.size))
        return found if self._grows or found + memory.size <= self.size else None


def place(memories: Iterable[Memory], arenas: Sequence[Arena]) -> dict[int, Place]:
    """Places for all memories, each in the first arena that has room; the last arena grows.

    Large ones come first, because small ones fit between them.
    """
    places = {}
    for memory in sorted(memories, key=lambda x: (-x.size, x.number)):
        for at, arena in enumerate(arenas):
            offset = arena.find(memory)
            if offset is not None:
                arena.put(memory, offset)
                places[memory.number] = Place(at, offset)
                break
    return places


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def whole_units(size: int) -> int:
    """The bytes of an allocation of this size in which others may lie, of any dtype."""
    return size // ALIGNMENT * ALIGNMENT
