"""Which steps of a recorded call follow from the boundaries of its sequences alone.

These make the plan: index tensors, which are the same for all layers and steps with these
boundaries. So they are run apart from the others, and what they give is kept with the boundaries.
Nothing else may write to that: of operations this is known, launches of a plan promise it
(:func:`nsa.host.launches_of_plan`), and the recorder compares the rest.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload


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


class PlanSearch:
    """Finds the steps that depend on boundaries alone, from all steps in order.

    Of a memory that depends on nothing, such as an allocated one, the first step that uses it with
    another kind of memory decides: steps of the plan take it, with the steps that made it.

    Args:
        boundaries: their memories; without any there is no plan.
        others: the memories of what else is given.
    """

    def __init__(self, boundaries: Iterable[int], others: Iterable[int]):
        self.others = set(others)
        self._boundaries = set(boundaries)
        self._plan = set(self._boundaries)
        self._steps: set[int] = set()
        self._effects: list[Effect] = []
        # The steps that made a memory while it was of neither, and the memories of these steps.
        self._origins: dict[int, tuple[set[int], set[int]]] = {}
        self._allocated: set[int] = set()
        # Results of operations of the plan, and copies.
        self._results: list[tuple[Tensor, Tensor]] = []

    def add(self, effect: Effect, results: Iterable[Tensor] = ()) -> None:
        """Take the next step and its results."""
        if not self._boundaries:
            return
        at = len(self._effects)
        self._place(effect)
        if at in self._steps and not effect.launches:
            self._results += [(x, x.clone()) for x in results]

    def _place(self, effect: Effect) -> None:
        at, inputs = len(self._effects), effect.uses - effect.makes
        self._effects.append(effect)
        if effect.allocates:
            self._allocated |= effect.makes
        free = [self._origins[n] for n in inputs if n in self._origins]
        steps = {at}.union(*(steps for steps, _ in free))
        memories = set(effect.uses).union(*(memories for _, memories in free))
        # What an operation reads and a launch may add to has other values in each call.
        added_to = self._allocated & inputs - self._plan
        may_be = effect.pure and (effect.launches or not added_to)
        if not may_be or not self.others.isdisjoint(memories):
            self.others |= effect.uses - self._plan
        elif not self._plan.isdisjoint(memories):
            self._steps |= steps
            self._plan |= memories
        else:
            made = effect.uses if effect.launches else effect.makes
            self._origins |= dict.fromkeys(made, (steps, memories))

    def finish(self, results: set[int]) -> PlanSteps:
        """The steps of the plan. There are none if one of the ``results`` of the call, or of what
        other steps write, is of the plan."""
        if not all(torch.equal(x, copy) for x, copy in self._results):
            return NO_PLAN
        effects = [effect for at, effect in enumerate(self._effects) if at not in self._steps]
        used, written = set[int](), set(results)
        for effect in effects:
            used |= effect.uses
            written |= effect.writes
        memories = sorted(used & self._plan - self._boundaries)
        if not memories or not self._plan.isdisjoint(written):
            return NO_PLAN
        return PlanSteps(tuple(sorted(self._steps)), tuple(memories))


def written_by(func: OpOverload, args: Sequence, kwargs: dict[str, Any]) -> tuple:
    """The arguments that an operation writes."""
    names = [x.name for x in func._schema.arguments if x.alias_info and x.alias_info.is_write]
    given = dict(zip((x.name for x in func._schema.arguments), args, strict=False)) | kwargs
    return tuple(given[name] for name in names if name in given)
