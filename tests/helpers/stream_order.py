"""Whether the order of streams keeps uses of memory apart, with stand-ins for streams."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.recorder import tensors_in


class OrderError(AssertionError):
    """Two uses of a memory that nothing keeps apart."""


class _Memory:
    """A storage: the stream that it is of, its last write, and its last use on each stream."""

    def __init__(self, storage: torch.UntypedStorage, stream: str, at: int):
        self.ref = StorageWeakRef(storage)
        self.stream = stream
        self.written = (stream, at)
        self.used = {stream: at}


class StreamOrder(TorchDispatchMode):
    """Checks each operation, and each memory that is freed, while work goes to two streams.

    A stream knows how far another had come when it last waited for it. An operation that reads
    needs to know the last write of its memory; one that writes, all uses. PyTorch gives a memory to
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
            x.untyped_storage()._cdata
            for argument, value in _named(func._schema, args, kwargs)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors_in((value,))
        }
        for x in tensors_in((*args, *kwargs.values())):
            storage = x.untyped_storage()
            self._use(storage, write=storage._cdata in written)
        result = func(*args, **kwargs)
        for x in tensors_in((result,)):
            storage = x.untyped_storage()
            if storage._cdata not in self._memories:
                at = self._launched[self.current]
                self._memories[storage._cdata] = _Memory(storage, self.current, at)
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        self._free()

    def _use(self, storage: torch.UntypedStorage, *, write: bool):
        # What is there before the first operation was made by the first stream.
        memory = self._memories.setdefault(storage._cdata, _Memory(storage, "first", 0))
        stream, at = self.current, self._launched[self.current]
        earlier = memory.used.items() if write else [memory.written]
        for other, then in earlier:
            if not self._knows(stream, other, then):
                raise OrderError(f"{stream} does not wait for what {other} did with a memory")
        memory.used[stream] = at
        if write:
            memory.written = (stream, at)

    def _knows(self, stream: str, other: str, at: int) -> bool:
        return stream == other or self._known[stream][other] >= at

    def _free(self):
        """Forget memories that have been freed since the last operation."""
        for number, memory in list(self._memories.items()):
            if memory.ref.expired():
                del self._memories[number]
                for other, at in memory.used.items():
                    if not self._knows(memory.stream, other, at):
                        raise OrderError(f"{memory.stream} frees what {other} still uses")


def _named(schema, args: tuple, kwargs: dict) -> Iterator[tuple]:
    """The schema's argument of each value."""
    yield from zip(schema.arguments, args, strict=False)
    yield from ((x, kwargs[x.name]) for x in schema.arguments if x.name in kwargs)
