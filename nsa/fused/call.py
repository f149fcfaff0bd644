"""One call of the fused backend, forward and backward, on arguments in the kernels' form."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import schedule as chunked
from nsa.fused.pipeline import Inputs, Saved
from nsa.fused.plan import Plan
from nsa.precision import without_autocast


class Call(NamedTuple):
    """What is computed of :class:`Inputs`.

    Attributes:
        block_indices: the caller's, see :func:`nsa.fused.pipeline.forward`; None to select.
        plan: the sequences, with a configuration that has a scale, because padding changes the head
            dimension it would follow from.
        chunks: in how many KV heads are run, see :mod:`nsa.fused.schedule`.
        recompute: whether forward leaves nothing but what was selected.
    """

    block_indices: Tensor | None
    plan: Plan
    chunks: int
    recompute: bool

    def forward(self, inputs: Inputs, save: bool) -> tuple[Tensor, list[Saved]]:
        """Output ``(B, T, H, Dv)`` and, where ``save``, what each chunk leaves for backward.

        Of block indices, that is only what was selected.
        """
        with torch.cuda.device_of(inputs.q), without_autocast(inputs.q.device):
            out, saved = chunked.forward(
                inputs,
                self.block_indices,
                self.plan,
                chunks=self.chunks,
                save=save,
                recompute=self.recompute,
            )
        if self.block_indices is not None:
            saved = [part._replace(block_indices=None) for part in saved]
        return out, saved

    def backward(self, dout: Tensor, inputs: Inputs, saved: list[Saved]) -> Inputs:
        """Gradient of each input, None where there is no such input."""
        with torch.cuda.device_of(inputs.q), without_autocast(inputs.q.device):
            return chunked.backward(
                dout,
                inputs,
                self.block_indices,
                saved,
                self.plan,
                chunks=self.chunks,
                recompute=self.recompute,
            )


@lru_cache(maxsize=64)
def with_scale(config: NSAConfig, scale: float) -> NSAConfig:
    """``config`` with an explicit scale."""
    return replace(config, scale=scale)
