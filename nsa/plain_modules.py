"""The parameters of modules that do what their type says, and nothing else."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import reduce
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

_parts = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_parameters", "_modules",
)  # fmt: skip

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


Name = tuple[str, ...]
PlainNames = tuple[tuple[Name, ...], tuple[Name, ...], str]


def plain_names(layer: nn.Module, types: Types) -> PlainNames | None:
    """Names of the parameters that :func:`plain_parameters` gives for the modules of ``layer``;
    names of these modules; and names of their types. None if one is not plain."""
    found = plain_parameters(layer._modules, types)
    if found is None:
        return None
    parameters, kinds = found
    names = {id(x): tuple(name.split(".")) for name, x in layer.named_parameters()}
    modules = tuple(tuple(name.split(".")) for name, _ in layer.named_modules() if name)
    return tuple(names[id(x)] for x in parameters), modules, names_of_types(kinds)


def names_of_types(kinds: Sequence[Hashable]) -> str:
    """Of what :func:`plain_parameters` gives beside the parameters."""
    # TorchDynamo of PyTorch 2.11 compares strings that are constants, but no tuples of them.
    return " ".join(kind[1].__name__ for kind in kinds if isinstance(kind, tuple))


def parameters_by_name(layer: nn.Module, names: PlainNames) -> tuple[list[Tensor], str]:
    """The parameters that :func:`plain_parameters` gives, and names of types."""
    parameters, modules, kinds = names
    # torch.compile guards what is read, so another module compiles again, or a `forward` of its own.
    for name in modules:
        _attribute(layer, (*name, "forward"))
    return [_attribute(layer, name) for name in parameters], kinds


def _attribute(layer: Any, name: Sequence[str]) -> Any:
    return reduce(getattr, name, layer)


def constant_when_compiled(method: Callable) -> Callable:
    """Decorate a method without arguments whose result torch.compile may take for a constant:
    strings alone, in tuples.

    What the method reads is not guarded then. :func:`torch.compiler.assume_constant_result` does
    the same, but imports TorchDynamo, which takes seconds.
    """
    vars(method)["_dynamo_marked_constant"] = True
    return method


def _collect(modules: dict, types: Types, found: list[Tensor], kinds: list[Hashable]) -> bool:
    for name, module in modules.items():
        if module is None:
            continue
        kind, state = type(module), vars(module)
        needed = types.get(kind)
        if needed is None or "forward" in state:
            return False
        # At once, because eager calls pass through here.
        *hooks, parameters, inner = _parts(state)
        if any(hooks):
            return False
        for x in needed:
            if x not in parameters or x in state:
                return False
        found += [x for x in parameters.values() if x is not None]
        kinds.append((name, kind))
        if inner and not _collect(inner, types, found, kinds):
            return False
    kinds.append(None)
    return True
