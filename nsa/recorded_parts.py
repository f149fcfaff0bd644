"""Makes the functions of a recording, each of a part of its steps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from nsa.host import NotRecordable
from nsa.recorded_call import RecordedPart
from nsa.recorded_code import (
    Base,
    Nested,
    Noted,
    View,
    WholeArena,
    Writer,
    contiguous_strides,
)
from nsa.recorded_memory import Arena, Memory, Place, place, whole_units
from nsa.recorded_streams import find_forks, fork_where_safe
from nsa.recorded_zeros import join_zeros

ROOMY = 1 << 16
"""Bytes from which on the memory of a result holds others before it is written."""

_ALWAYS = float("inf")


class ArenaLayout(NamedTuple):
    """Arenas, the last of which grows; places in them; and which results are arenas, by their
    positions."""

    arenas: list[Arena]
    places: dict[int, Place]
    of_results: dict[int, int]


class PartWriter:
    """Writes functions of memories.

    Args:
        bases: of the memories.
        device: where they are.
        as_graphs: whether what runs in each call is to be captured.
    """

    def __init__(self, bases: list[Base], device: torch.device, *, as_graphs: bool):
        self._bases, self._device, self._as_graphs = bases, device, as_graphs

    def all_of(self, memory: int) -> View:
        base = self._bases[memory]
        return View(memory, base.shape, base.strides, 0)

    def write_plan(
        self, noted: Sequence[Noted], boundaries: Sequence[int], memories: Sequence[int]
    ) -> RecordedPart:
        """Gives a list of ``memories`` from the boundaries. Plans that do the same are one, by
        which a Packing keeps what it gives."""
        result = Nested(list, tuple(map(self.all_of, memories)))
        return self._write(noted, boundaries, memories, result, known=_plans)

    def write_forward(
        self,
        noted: Sequence[Noted],
        given: Sequence[int],
        outputs: Sequence[View],
        *,
        saved: Sequence[int],
        arena: Sequence[int] | None,
        is_list: bool,
    ) -> RecordedPart:
        """Gives the outputs, and a list: those of the given memories that are ``saved``, and an
        arena of others. It is empty if ``arena`` is None."""
        for view in outputs:
            self._describe(view)
        output = Nested(list, tuple(outputs)) if is_list else outputs[0]
        kept: list[Any] = [self.all_of(memory) for memory in saved]
        if arena is not None:
            kept.append(WholeArena(0))
        result = Nested(tuple, (output, Nested(list, tuple(kept))))
        own = [view.memory for view in outputs]
        return self._write(noted, given, own, result, arena)

    def write_backward(
        self,
        noted: Sequence[Noted],
        given: Sequence[int],
        gradients: Sequence[View | None],
        arena: Sequence[int],
    ) -> RecordedPart:
        """Gives the gradients of what is given and the arena, which comes last."""
        views = [view for view in gradients if view is not None]
        own = dict.fromkeys(view.memory for view in views if view.memory not in given)
        for view in views:
            if view.memory in own:
                self._describe(view)
        result = Nested(list, tuple(gradients))
        return self._write(noted, given, list(own), result, arena, is_backward=True)

    def _describe(self, view: View) -> None:
        """Know a memory by a view that is all of it, so that it is no view of another tensor."""
        base = self._bases[view.memory]
        is_all = base.contiguous and view.shape.numel() == base.shape.numel()
        if is_all and view.strides == contiguous_strides(view.shape):
            changed = base._replace(shape=view.shape, strides=view.strides)
            self._bases[view.memory] = changed

    def _write(
        self,
        noted: Sequence[Noted],
        given: Sequence[int],
        own: Sequence[int],
        result: Any,
        saved: Sequence[int] | None = None,
        *,
        is_backward: bool = False,
        known: "WeakValueDictionary[Any, RecordedPart] | None" = None,
    ) -> RecordedPart:
        """A function of the ``given`` memories.

        Args:
            own: memories that it allocates each by itself.
            saved: memories of an arena, which the forward makes and the backward gets.
        """
        alone = {*given, *own, *(saved or ())}
        noted, zeros = join_zeros(fork_where_safe(noted), alone, self._bases)
        lives = _lives(noted)
        layout = self._lay_out(lives, own, saved, is_backward=is_backward)
        others = [self._memory(n, *lives[n]) for n in lives.keys() - alone]
        places = layout.places | place(others, layout.arenas)
        for number, (whole, offset) in zeros.items():
            places[number] = places[whole]._replace(offset=places[whole].offset + offset)
        taken: list[int | WholeArena] = [*given]
        allocated: list[int | WholeArena] = [*own, WholeArena(len(layout.arenas) - 1)]
        if saved is not None:
            (taken if is_backward else allocated).append(WholeArena(0))
        writer = Writer(self._bases, [*taken, *allocated], places, layout.of_results)
        for x in noted:
            writer.step(x.step)
        code = writer.finish(result)
        sizes = [arena.size for arena in layout.arenas]
        forms = [
            ((sizes[x.arena],), (1,), torch.uint8) if isinstance(x, WholeArena) else self._form(x)
            for x in allocated
        ]
        if known is None:
            return RecordedPart(forms, self._device, code, as_graphs=self._as_graphs)
        key = (code.key, tuple(forms), self._device)
        part = known.get(key)
        if part is None:
            part = known[key] = RecordedPart(forms, self._device, code, as_graphs=False)
        return part

    def _lay_out(
        self,
        lives: Mapping[int, tuple[int, int]],
        own: Sequence[int],
        saved: Sequence[int] | None,
        *,
        is_backward: bool,
    ) -> ArenaLayout:
        """Arenas of what is saved, if there is one, of large results before they are written, and
        of others."""
        arenas = [] if saved is None else [Arena(grows=False)]
        places = dict[int, Place]()
        for number in saved or ():
            first, last = lives.get(number, (0, 0))
            life = (-_ALWAYS, last) if is_backward else (first, _ALWAYS)
            offset = arenas[0].append(self._memory(number, *life))
            places[number] = Place(0, offset)
        of_results: dict[int, int] = {}
        for number in own:
            base = self._bases[number]
            if number in lives and base.contiguous and base.size >= ROOMY:
                of_results[number] = len(arenas)
                arenas.append(Arena(grows=False))
                arenas[-1].append(Memory(number, whole_units(base.size), lives[number][0], _ALWAYS))
        return ArenaLayout([*arenas, Arena()], places, of_results)

    def _memory(self, number: int, first: float, last: float) -> Memory:
        return Memory(number, self._bases[number].size, first, last)

    def _form(self, number: int) -> tuple:
        base = self._bases[number]
        if base.shape.numel() * base.dtype.itemsize != base.size:
            raise NotRecordable("a result is a part of a tensor")
        return tuple(base.shape), tuple(base.strides), base.dtype


def _lives(noted: Sequence[Noted]) -> dict[int, tuple[int, int]]:
    """The positions of the first and of the last use of each memory.

    What a block of a second stream uses must not be used for anything else from the fork to the
    join.
    """
    lives: dict[int, tuple[int, int]] = {}

    def use(memories: Iterable[int], first: int, last: int) -> None:
        for number in memories:
            start, end = lives.get(number, (first, last))
            lives[number] = (min(start, first), max(end, last))

    for at, x in enumerate(noted):
        use(x.uses, at, at)
    for fork in find_forks(noted):
        for at in fork.block:
            use(noted[at].uses, fork.fork, fork.join)
    return lives


_plans: "WeakValueDictionary[Any, RecordedPart]" = WeakValueDictionary()
