"""Gradients that have no derivative."""

from collections.abc import Callable

import torch

from nsa.validation import SECOND_DERIVATIVE, UnsupportedError


class FirstDerivatives(torch.autograd.Function):
    """Gradients ``function(*tensors)`` as a node of their own, so that with ``create_graph`` a
    second derivative raises an error."""

    @staticmethod
    def forward(_, function: Callable, *tensors):
        return tuple(function(*tensors))

    @staticmethod
    def backward(_, *__):
        raise UnsupportedError(SECOND_DERIVATIVE)
