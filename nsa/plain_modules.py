"""The parameters of modules that do what their type says, and nothing else."""

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_parameters(
    modules: dict[str, nn.Module | None], types: tuple[type[nn.Module], ...]
) -> list[Tensor] | None:
    """The parameters of ``modules`` and all modules in them; None if one is not plain.

    A plain module has one of the ``types``, no hooks and no ``forward`` of its own.
    """
    if nn.modules.module._has_any_global_hook():
        return None
    found: list[Tensor] = []
    return found if _collect(modules, types, found) else None


def _collect(modules: dict, types: tuple, found: list[Tensor]) -> bool:
    for module in modules.values():
        if module is None:
            continue
        state = vars(module)
        if type(module) not in types or "forward" in state or any(map(state.get, _HOOKS)):
            return False
        found += [x for x in state["_parameters"].values() if x is not None]
        if not _collect(state["_modules"], types, found):
            return False
    return True
