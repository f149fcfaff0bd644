"""One call of the fused backend, forward and backward, on arguments in the kernels' form."""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import chunks as chunked
from nsa.fused.layout import make_plan
from nsa.fused.pipeline import Inputs, Saved


class Call(NamedTuple):
    """What is computed of :class:`Inputs`.

    Attributes:
        block_indices: the caller's, see :func:`nsa.fused.pipeline.forward`; None to select.
        cu_seqlens, max_seqlen: of packed input, see :func:`nsa.forward`.
        config: with a scale, because padding changes the head dimension it would follow from.
        chunks: in how many KV heads are run, see :mod:`nsa.fused.chunks`.
        recompute: whether forward leaves nothing but what was selected.
    """

    block_indices: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    config: NSAConfig
    chunks: int
    recompute: bool

    def forward(self, inputs: Inputs, save: bool) -> tuple[Tensor, list[Saved]]:
        """Output ``(B, T, H, Dv)`` and, where ``save``, what each chunk leaves for backward.

        Of block indices, that is only what was selected.
        """
        with torch.cuda.device_of(inputs.q):
            out, saved = chunked.forward(
                inputs,
                self.block_indices,
                self._plan(inputs),
                chunks=self.chunks,
                save=save,
                recompute=self.recompute,
            )
        if self.block_indices is not None:
            saved = [part._replace(block_indices=None) for part in saved]
        return out, saved

    def backward(self, dout: Tensor, inputs: Inputs, saved: list[Saved]) -> Inputs:
        """Gradient of each input, None where there is no such input."""
        with torch.cuda.device_of(inputs.q):
            return chunked.backward(
                dout,
                inputs,
                self.block_indices,
                saved,
                self._plan(inputs),
                chunks=self.chunks,
                recompute=self.recompute,
            )

    def _plan(self, inputs: Inputs):
        return make_plan(inputs.q, self.cu_seqlens, self.max_seqlen, self.config)


@lru_cache(maxsize=64)
def with_scale(config: NSAConfig, scale: float) -> NSAConfig:
    """``config`` with an explicit scale."""
    return replace(config, scale=scale)
