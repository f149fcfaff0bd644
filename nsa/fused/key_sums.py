"""Gradients of keys and values that the queries of several calls attend, added over the calls.

The selected branch adds to float32 sums where its kernels do, so that keys which only some calls
attend are neither cleared nor rounded for each call. The window branch, which sees few of the keys,
leaves its gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.config import NSAConfig
from nsa.fused import kernel_calls
from nsa.fused.block_lists import goes_by_query
from nsa.fused.constraints import kernel_head_dim
from nsa.fused.kernel_inputs import Pair
from nsa.fused.plan import choose_key_block
from nsa.precision import accumulation_dtype


class CallSums(NamedTuple):
    """What one call adds to.

    Attributes:
        selected: sums of the call's keys ``(Tk, H_kv, D)``, in the layout of the kernels, those of
            keys without the scale; and of its values.
        windows: gradients of its last keys and values, ``(T', H_kv, D)``, are appended.
    """

    selected: Pair
    windows: list[Pair]


class KeySums:
    """The sums of keys ``(T, H_kv, D)`` and of their values, which the branches share."""

    def __init__(self, k: Tensor, config: NSAConfig):
        shape, dtype = (2, *k.shape), accumulation_dtype(k.dtype)
        self._sums = torch.zeros(shape, dtype=dtype, device=k.device).unbind()
        self._by_token = config.selection == "token"
        self._factors = (config.softmax_scale(k.shape[-1]), 1.0)
        self._calls: list[tuple[int, CallSums]] = []

    def of_call(self, keys: slice) -> CallSums:
        """For a call that attends some consecutive keys."""
        dk, dv = (x[keys] for x in self._sums)
        call = CallSums((dk, dv), [])
        self._calls.append((keys.stop, call))
        return call

    def round_into(self, which: int, keys: slice, out: Tensor):
        """Write sums of a run of keys (0) or values (1) of the selected branch."""
        round_sums = kernel_calls.round_sums if self._by_token else kernel_calls.round_listed_sums
        round_sums(self._sums[which][keys], out, self._factors[which])

    def windows(self, which: int) -> list[tuple[int, Tensor]]:
        """What calls left: gradients of keys (0) or values (1), and where the first one lies."""
        return [
            (end - pair[which].shape[0], pair[which])
            for end, call in self._calls
            for pair in call.windows
        ]


def make_key_sums(
    k: Tensor, v: Tensor, runs: Sequence[int], config: NSAConfig, *, deterministic: bool
) -> KeySums | None:
    """Sums for keys and values that calls of :func:`nsa.fused.forward` share, and may add to.

    None if the kernels cannot: they need one head dimension, and add in no fixed order. In tile
    mode they add to blocks of keys.

    Args:
        k, v: ``(T, H_kv, D)``.
        runs: lengths of consecutive runs of keys; a call attends whole runs.
        config: block sizes.
        deterministic: whether gradients must have the same bits each time.
    """
    dim = k.shape[-1]
    if deterministic or k.shape != v.shape or kernel_head_dim(dim, dim) != dim:
        return None
    if config.selection == "tile":
        key_block = choose_key_block(config.select_block_size, config, dim)
        if not goes_by_query(key_block, dim) or any(count % key_block for count in runs):
            return None
    return KeySums(k, config)
