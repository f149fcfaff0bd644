"""The parameters of modules that do what their type says, and nothing else."""

from collections.abc import Hashable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Types = Mapping[type[nn.Module], tuple[str, ...]]
"""The plain types, and the names of the parameters that each has."""


def plain_parameters(
    layer: nn.Module, types: Types
) -> tuple[list[Tensor], tuple[Hashable, ...]] | None:
    """The parameters of the modules of ``layer`` and all modules in them; None if one is not plain.

    A plain module has one of the ``types``, no hooks, no ``forward`` of its own, and no buffer or
    bare tensor where its type has a parameter. Beside the parameters this gives what tells which
    modules they are of: the names and types of all modules.
    """
    if not torch.compiler.is_dynamo_compiling():
        return _plain_parameters(layer, types)
    found = _plain_names(layer, types)
    if found is None:
        return None
    parameters, modules, kinds = found
    # What is read is guarded, so that another module compiles again.
    for name in modules:
        _attribute(layer, name)
    return [_attribute(layer, name) for name in parameters], kinds


def _attribute(layer: Any, name: Sequence[str]) -> Any:
    return reduce(getattr, name, layer)


Names = tuple[tuple[str, ...], ...]


def _plain_names(
    layer: nn.Module, types: Types
) -> tuple[Names, Names, tuple[Hashable, ...]] | None:
    """The names of :func:`plain_parameters`, and of the modules; for torch.compile a constant.

    Otherwise each attribute that is read would be looked at again before each compiled call, some
    hundred a layer. As in PyTorch, hooks that are added after compilation are not seen.
    """
    found = _plain_parameters(layer, types)
    if found is None:
        return None
    parameters, kinds = found
    names = {id(x): tuple(name.split(".")) for name, x in layer.named_parameters()}
    modules = tuple(tuple(name.split(".")) for name, _ in layer.named_modules() if name)
    return tuple(names[id(x)] for x in parameters), modules, kinds


# As torch.compiler.assume_constant_result does, which imports TorchDynamo: that takes seconds.
vars(_plain_names)["_dynamo_marked_constant"] = True


def _plain_parameters(layer: Any, types: Types) -> tuple[list[Tensor], tuple[Hashable, ...]] | None:
    if nn.modules.module._has_any_global_hook():
        return None
    found: list[Tensor] = []
    kinds: list[Hashable] = []
    return (found, tuple(kinds)) if _collect(layer._modules, types, found, kinds) else None


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
