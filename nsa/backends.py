"""Which backend a call uses, and why not the other."""

import functools
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.host import has_no_values, in_function_transform, refuse_recording
from nsa.validation import UnsupportedError

BACKENDS = ("auto", "reference", "fused")


_logger = logging.getLogger("nsa")


def uses_fused(backend: str, q: Tensor, v: Tensor, config: NSAConfig) -> bool:
    """Whether :func:`forward` uses the fused backend for these, without ``k``'s."""
    return backend != "reference" and limit_without_cache(q, v, config) is None


def check_backend(backend) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return backend


def check_no_transform():
    """Check that no transform of torch.func runs."""
    if in_function_transform():
        raise UnsupportedError(
            "nsa has no rules for the transforms of torch.func (grad, vmap, jvp, ...); use "
            "torch.autograd"
        )


def limit_without_cache(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    from nsa.fused.constraints import unsupported_reason

    return unsupported_reason(q, v, config)


def choose_backend(backend: str, limit: str | None) -> str | None:
    """The backend to use, given the limit of the fused one; None if there is no backend."""
    if backend == "auto":
        return "fused" if limit is None else "reference"
    return None if backend == "fused" and limit is not None else backend


def describe_limit(limit: str | None) -> str:
    return "fused can do this" if limit is None else f"fused cannot do this: {limit}"


def backend_module(backend: str, q: Tensor, v: tuple[Tensor, ...], config: NSAConfig) -> ModuleType:
    """The package that attends; ``v`` are the values of each branch."""
    return choose_module(backend, q, partial(limit_without_cache, q, v[0], config))


def choose_module(backend: str, q: Tensor, fused_limit: Callable[[], str | None]) -> ModuleType:
    """The package of the backend to use; ``fused_limit`` says why it cannot be the fused one.

    Raises:
        ValueError: there is no such backend.
        UnsupportedError: it is the fused backend, and there is a limit; or it is the reference, and
            there are no values; or a transform of torch.func runs.
    """
    check_backend(backend)
    check_no_transform()
    limit = fused_limit() if backend != "reference" else None
    name = choose_backend(backend, limit)
    if name is None:
        raise UnsupportedError(f"backend='fused' cannot do this: {limit}")
    if name == "fused":
        from nsa import fused

        return fused
    refuse_recording("the reference reads values")
    if has_no_values(q):
        raise UnsupportedError(
            "the reference reads values on the host, which meta and fake tensors do not have; give "
            "tensors with values"
        )
    if backend == "auto" and not torch.compiler.is_compiling():
        _log_once(limit, logging.WARNING if q.is_cuda else logging.INFO)
    from nsa import reference

    return reference


@functools.cache
def _log_once(limit: str, level: int):
    _logger.log(level, "backend='auto' uses the reference: %s", describe_limit(limit))
