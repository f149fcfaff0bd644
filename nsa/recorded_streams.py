"""Which steps of a recording run on a second stream, and what that asks of their memory.

A fork is three marks among the steps:

- ``fork``: the second stream waits for the first, which is the caller's.
- ``enter``: the second becomes current. The steps from here to the join are the block. Those from
  the fork to here run beside it.
- ``join``: the first becomes current again, and waits for the second; after an error too.

PyTorch allocates memory for the current stream. As soon as the host frees it, the next allocation
for this stream gets it, as the stream's order keeps the uses apart. So a block uses two kinds of
memory:

- That of the first stream is allocated before the fork and freed after the join. What used it
  before then ends before the block, and what uses it next begins after the block.
- That of the second stream, which operations of the block make. Only blocks use it.

Threads share the second stream. Each wait is for an event of its own, so that one may wait for
another's block, but never too little.
"""

from collections.abc import Container, Sequence
from typing import NamedTuple

from nsa.recorded_code import Step


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

    def first_streams(
        self,
        steps: Sequence[Step],
        uses: Sequence[set[int]],
        allocations: Container[int],
        last: dict[int, int],
    ) -> set[int] | None:
        """The memories of the first stream that the block uses; None if it must not fork.

        That is if it uses what steps beside it make, or leaves what its operations make.

        Args:
            steps: all of the recording.
            uses: memories that each step uses or makes.
            allocations: positions of steps that only allocate.
            last: the position of each memory's last use.
        """
        beside = _made(steps[at] for at in self.beside)
        own = _made(steps[at] for at in self.block if at not in allocations)
        used = set().union(*(uses[at] for at in self.block))
        if not used.isdisjoint(beside) or any(last[n] > self.join for n in own):
            return None
        return used - own


def in_order(count: int, forks: Sequence[Fork], allocations: Container[int]) -> list[int]:
    """The positions of ``count`` steps as they run: allocations of a block come before its fork."""
    early = {at: x.fork - 0.5 for x in forks for at in x.block if at in allocations}
    return sorted(range(count), key=lambda at: early.get(at, at))


def _made(steps) -> set[int]:
    """The memories that some steps make."""
    made: set[int | None] = set()
    for step in steps:
        made.update(step.made if isinstance(step.made, tuple) else (step.made,))
    return {n for n in made if n is not None}
