"""The parameters of modules that do what their type says, and nothing else."""

from collections.abc import Hashable, Mapping

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Types = Mapping[type[nn.Module], tuple[str, ...]]
"""The plain types, and the names of the parameters that each has."""


def plain_parameters(
    modules: dict[str, nn.Module | None], types: Types
) -> tuple[list[Tensor], tuple[Hashable, ...]] | None:
    """The parameters of ``modules`` and all modules in them; None if one is not plain.

    A plain module has one of the ``types``, no hooks, no ``forward`` of its own, and no buffer or
    bare tensor where its type has a parameter. Beside the parameters this gives what tells which
    modules they are of: the names and types of all modules.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    found: list[Tensor] = []
    kinds: list[Hashable] = []
    return (found, tuple(kinds)) if _collect(modules, types, found, kinds) else None


def _collect(modules: dict, types: Types, found: list[Tensor], kinds: list[Hashable]) -> bool:
    for name, module in modules.items():
        if module is None:
            continue
        kind, state = type(module), vars(module)
        needed = types.get(kind)
        if needed is None or "forward" in state or any(map(state.get, _HOOKS)):
            return False
        parameters = state["_parameters"]
        for x in needed:
            if x not in parameters or x in state:
                return False
        found += [x for x in parameters.values() if x is not None]
        kinds.append((name, kind))
        inner = state["_modules"]
        if inner and not _collect(inner, types, found, kinds):
            return False
    kinds.append(None)
    return True
