"""Whether the order of streams keeps uses of memory apart, with stand-ins for streams."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.recorder import tensors_in


class OrderError(AssertionError):
    """Two uses of a memory that nothing keeps apart."""


class _Use(NamedTuple):
    """Of some bytes of a storage, from the first to behind the last."""

    first: int
    end: int
    stream: str
    at: int
    writes: bool


class _Memory:
    """A storage: the stream that it is of, and its uses."""

    def __init__(self, storage: torch.UntypedStorage, stream: str):
        self.ref = StorageWeakRef(storage)
        self.stream = stream
        self.uses: list[_Use] = []


class StreamOrder(TorchDispatchMode):
    """Checks each operation, and each memory that is freed, while work goes to two streams.

    A stream knows how far another had come when it last waited for it. An operation that reads
    needs to know all writes of its bytes; one that writes, all uses. PyTorch gives a memory to
    the next allocation of its stream as soon as it is freed. So uses by other streams must be known
    to that stream then, and its allocation to other streams that use it, as a use on it before.
    """

    def __init__(self):
        super().__init__()
        self.current = "first"
        self.log: list[str] = []
        self._launched = {"first": 1, "second": 0}
        self._known: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._memories: dict[int, _Memory] = {}

    def marks(self) -> dict[str, Callable[[], None]]:
        """In place of :func:`nsa.fused.streams._marks`."""

        def fork():
            self._wait("second", "first")

        def enter():
            self._free()
            self.current = "second"
            self.log.append("enter")

        def join():
            self._free()
            self.current = "first"
            self._wait("first", "second")

        return dict(fork=fork, enter=enter, join=join)

    def _wait(self, waiting: str, other: str):
        self._free()
        self._known[waiting][other] = self._launched[other]
        self.log.append(f"{waiting} waits for {other}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._free()
        kwargs = kwargs or {}
        self._launched[self.current] += 1
        written = {
            id(x)
            for argument, value in _named(func._schema, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors_in((value,))
        }
        # Views of a memory are made without work.
        works = func._schema.is_mutable or not func.is_view
        for x in tensors_in((*args, *kwargs.values())):
            if works:
                self._use(x, writes=id(x) in written)
        result = func(*args, **kwargs)
        for x in tensors_in((result,)):
            if x.untyped_storage()._cdata not in self._memories:
                self._use(x, writes=True)
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self._free()

    def _use(self, x: torch.Tensor, *, writes: bool):
        storage = x.untyped_storage()
        # What is there before the first operation was made by the first stream.
        memory = self._memories.setdefault(storage._cdata, _Memory(storage, self.current))
        if not x.numel():
            return
        first = x.storage_offset() * x.itemsize
        extent = 1 + sum((n - 1) * m for n, m in zip(x.shape, x.stride(), strict=True))
        at = self._launched[self.current]
        use = _Use(first, first + extent * x.itemsize, self.current, at, writes)
        for other in memory.uses:
            overlap = other.first < use.end and use.first < other.end
            if overlap and (writes or other.writes) and not self._knows(self.current, *other[2:4]):
                text = f"{use.stream} does not wait for what {other.stream} did with a memory"
                raise OrderError(text)
        memory.uses.append(use)

    def _knows(self, stream: str, other: str, at: int) -> bool:
        return stream == other or self._known[stream][other] >= at

    def _free(self):
        """Forget memories that have been freed since the last operation."""
        for number, memory in list(self._memories.items()):
            if memory.ref.expired():
                del self._memories[number]
                for use in memory.uses:
                    if not self._knows(memory.stream, use.stream, use.at):
                        raise OrderError(f"{memory.stream} frees what {use.stream} still uses")


def _named(schema, args: tuple, kwargs: dict) -> Iterator[tuple]:
    """The schema's argument of each value."""
    yield from zip(schema.arguments, args, strict=False)
    yield from ((x, kwargs[x.name]) for x in schema.arguments if x.name in kwargs)
