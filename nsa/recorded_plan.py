"""Which steps of a recorded call follow from the boundaries of its sequences alone.

These make the plan: index tensors, which are the same for all layers and steps with these
boundaries. So they are run apart from the others, and what they give is kept with the boundaries.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Effect(NamedTuple):
    """What a step does to memories, by their numbers.

    Attributes:
        uses: those that it reads or writes.
        makes: those of ``uses`` that are new.
        writes: those of ``uses`` that an operation writes; of a launch they are not known.
        pure: whether the step may be one of a plan: an operation that only gives new tensors, or a
            launch that says so, see :func:`nsa.host.launches_of_plan`.
        launches: whether the step is a launch.
        allocates: whether ``makes`` have no values, or zeros to add to.
    """

    uses: set[int]
    makes: set[int]
    writes: set[int]
    pure: bool
    launches: bool = False
    allocates: bool = False


class PlanSteps(NamedTuple):
    """The steps of the plan, in order, and the memories that other steps use of it."""

    steps: tuple[int, ...]
    memories: tuple[int, ...]


NO_PLAN = PlanSteps((), ())


def find_plan(
    effects: Sequence[Effect],
    boundaries: Sequence[int],
    others: Sequence[int],
    results: set[int],
) -> PlanSteps:
    """The steps that depend on ``boundaries`` alone, not on the ``others`` that are given.

    There are none if one of the ``results`` of the call, or of what other steps write, is of them.
    Launches write to no memory of a plan, but those that make it.
    """
    search = _Search(boundaries, others)
    for at, effect in enumerate(effects):
        search.add(at, effect)
    others_use = set().union(*(e.uses for at, e in enumerate(effects) if at not in search.steps))
    written = set().union(*(e.writes for at, e in enumerate(effects) if at not in search.steps))
    if not search.plan.isdisjoint(results | written):
        return NO_PLAN
    memories = sorted(others_use & search.plan - set(boundaries))
    return PlanSteps(tuple(sorted(search.steps)), tuple(memories)) if memories else NO_PLAN


class _Search:
    """Takes steps in order.

    Of a memory that depends on nothing, such as an allocated one, the first step that uses it with
    another kind of memory decides: steps of the plan take it, with the steps that made it.
    """

    def __init__(self, boundaries: Sequence[int], others: Sequence[int]):
        self.steps: set[int] = set()
        self.plan = set(boundaries)
        self._others = set(others)
        # The steps that make a memory of neither, and the memories of these steps.
        self._origins: dict[int, tuple[set[int], set[int]]] = {}
        self._allocated: set[int] = set()

    def add(self, at: int, effect: Effect) -> None:
        inputs = effect.uses - effect.makes
        if effect.allocates:
            self._allocated |= effect.makes
        free = [self._origins[n] for n in inputs if n in self._origins]
        steps = {at}.union(*(steps for steps, _ in free))
        memories = set(effect.uses).union(*(memories for _, memories in free))
        # What an operation reads and a kernel may add to has other values in each call.
        reads_allocated = not effect.launches and not self._allocated.isdisjoint(inputs - self.plan)
        if not effect.pure or reads_allocated or not self._others.isdisjoint(memories):
            self._others |= effect.uses - self.plan
            for n in effect.uses:
                self._origins.pop(n, None)
        elif not self.plan.isdisjoint(memories):
            self.steps |= steps
            self.plan |= memories
            for n in memories:
                self._origins.pop(n, None)
        else:
            for n in effect.uses if effect.launches else effect.makes:
                self._origins[n] = steps, memories
