"""Linear layers that initialise themselves, and that users may wrap or replace.

A replacement (an FSDP unit, LoRA, a quantised or low-rank layer) may compute in its own dtype. It
may have no ``weight``, or a weight whose dtype does not tell which input it takes.
"""

import weakref
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from nsa.precision import autocast_dtype
from nsa.validation import DTYPES


def make_linear(
    dim: int, out: int, bias: bool = True, *, std: float | None = None, device=None, dtype=None
) -> nn.Linear:
    """A linear layer with a normal weight of ``std``, by default ``1 / sqrt(dim)``."""
    linear = nn.Linear(dim, out, bias=bias, device=device, dtype=dtype)
    initialise = _Initialiser(linear, dim**-0.5 if std is None else std)
    linear.reset_parameters = initialise  # type: ignore[method-assign]
    linear.reset_parameters()
    return linear


def make_mlp(
    dim: int, hidden: int, out: int, *, last_std: float | None = None, device=None, dtype=None
) -> "MLP":
    """``Linear, SiLU, Linear``, initialised so that outputs have the scale of inputs.

    ``last_std`` is the ``std`` of the last layer, by default ``1 / sqrt(hidden)``.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    return MLP(
        make_linear(dim, hidden, std=(2 / dim) ** 0.5, **factory),
        nn.SiLU(),
        make_linear(hidden, out, std=last_std, **factory),
    )


class MLP(nn.Sequential):
    """Linear layers with ``SiLU`` between. Each may compute in its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for module in self:
            silu = isinstance(module, nn.SiLU)
            hidden = module(hidden) if silu else apply_linear(module, hidden, x.dtype)
        return hidden


class _Initialiser:
    """The ``reset_parameters`` of our linear layers: a normal weight, and a bias of 0.

    It is an attribute of the ``nn.Linear``, not a method of a subclass, because tools that replace
    linear layers check the exact type. The weak reference lets a deleted layer free its memory at
    once. A copied or unpickled linear layer has its own initialiser.
    """

    def __init__(self, linear: nn.Linear, std: float):
        self._linear, self._std = weakref.ref(linear), std

    def __call__(self):
        linear = self._linear()
        assert linear is not None, "it is an attribute of the layer"
        nn.init.normal_(linear.weight, std=self._std)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)

    def __reduce__(self):
        return _Initialiser, (self._linear(), self._std)


def apply_linear(linear: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``linear(x)``, with ``x`` cast to the dtype of the weight if the layer is plain, else to
    ``dtype``.

    Under autocast ``x`` is not cast.
    """
    if autocast_dtype(x.device) is None and not takes_dtype(linear, x.dtype):
        x = x.to(weight_dtype(linear) or dtype)
    return linear(x)


def takes_dtype(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether this is an ``nn.Linear`` with a weight of ``dtype``."""
    return type(linear) is nn.Linear and linear.weight.dtype == dtype


def weight_dtype(linear: nn.Module) -> torch.dtype | None:
    """The dtype that a plain linear layer takes; None for one that is wrapped or replaced."""
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return None
    if linear._forward_pre_hooks or not linear.weight.is_floating_point():
        return None
    return linear.weight.dtype


def common_dtype(*linears: nn.Module) -> torch.dtype:
    """The dtype that :func:`to_one_dtype` gives the outputs of the layers, judged by their weights.

    A wrapped layer is judged by its first weight. If no weight has a dtype that nsa computes in, as
    in quantised layers, it is torch's default dtype.
    """
    first = (next((x.dtype for x in m.parameters() if x.dtype in DTYPES), None) for m in linears)
    known = [dtype for dtype in first if dtype is not None]
    return reduce(torch.promote_types, known) if known else torch.get_default_dtype()


def to_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast tensors to one dtype: the promoted dtype, or under autocast the autocast dtype.

    Autocast does not change float64.
    """
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(tensors[0].device) or dtype
    return [x.to(dtype) for x in tensors]
