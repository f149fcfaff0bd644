"""Which steps of a recording run on a second stream, and what that asks of their memory.

A fork is three marks among the steps:

- ``fork``: the second stream waits for the first, which is the caller's.
- ``enter``: the second becomes current. The steps from here to the join are the block. Those from
  the fork to here run beside it.
- ``join``: the first becomes current again, and waits for the second; after an error too.

All memory is allocated for the first stream, before the steps run. What the block uses keeps its
place from the fork to the join: what had the place before ends before the block, and what has it
next begins after the block. Memory of steps beside it is used again in the order of the first
stream.

Threads share the second stream. Each wait is for an event of its own, so that one may wait for
another's block, but never too little.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nsa.recorded_code import Noted


class Fork(NamedTuple):
    """The positions of its marks among the steps."""

    fork: int
    enter: int
    join: int

    @property
    def beside(self) -> range:
        return range(self.fork + 1, self.enter)

    @property
    def block(self) -> range:
        return range(self.enter + 1, self.join)

    def is_safe(self, noted: Sequence[Noted]) -> bool:
        """Whether the block uses nothing that steps beside it make."""
        beside: set[int] = set().union(*(noted[at].made for at in self.beside))
        return all(noted[at].uses.isdisjoint(beside) for at in self.block)


def find_forks(noted: Sequence[Noted]) -> Iterator[Fork]:
    marks = iter([at for at, x in enumerate(noted) if x.is_mark])
    return map(Fork, marks, marks, marks)


def fork_where_safe(noted: Sequence[Noted]) -> list[Noted]:
    """The steps with the marks of safe forks alone.

    What a block allocates with zeros is filled before its fork, as a step beside the block may fill
    it with others.
    """
    order = {at: float(at) for at in range(len(noted))}
    for fork in find_forks(noted):
        if fork.is_safe(noted):
            fills = [at for at in fork.block if noted[at].fills]
            order |= dict.fromkeys(fills, fork.fork - 0.5)
        else:
            for at in fork:
                del order[at]
    return [noted[at] for at in sorted(order, key=order.__getitem__)]
