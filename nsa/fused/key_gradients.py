"""Gradients of keys and values, and of what compresses them, from those of each branch."""

from typing import Any

import torch
from torch import Tensor

from nsa.fused.call_tensors import Inputs
from nsa.fused.compression import clear_unused, compress_pair_backward
from nsa.fused.kernel_inputs import Pair
from nsa.fused.key_sums import CallSums, round_sums
from nsa.fused.plan import Plan
from nsa.fused.strides import is_alone


def key_gradients(
    inputs: Inputs,
    compressed: Pair,
    selected: Pair,
    window: Pair,
    plan: Plan,
    keys: CallSums | None,
    *,
    summed: bool,
) -> Inputs:
    """Gradients of keys, values and what compresses them, from those of each branch's keys and
    values. The others are None.

    The ``window`` has those of the last keys. ``selected`` are sums if ``summed``.
    """
    found: dict[str, Any] = dict.fromkeys(Inputs._fields)
    shared = inputs.k_slc is None
    if not shared:
        found["k_slc"], found["v_slc"] = selected
        k_win, v_win = (_with_zeros_before(x, inputs.k) for x in window)
        found["k_win"], found["v_win"] = k_win, v_win
    if inputs.k_cmp is None:
        (found["k"], found["v"]), weights = compress_pair_backward(
            compressed[0], compressed[1], inputs.k, inputs.v, inputs.compress_weights, plan,
            addends=(selected, window) if shared else None, summed=summed,
        )  # fmt: skip
        found["compress_k_weight"], found["compress_v_weight"] = weights
        return Inputs(**found)
    if keys is not None:
        keys.windows.append((window[0][0], window[1][0]))
    elif summed:
        found["k"], found["v"] = round_sums(selected, window, None, inputs.k.dtype, plan)
    elif shared:
        found["k"], found["v"] = _with_window(selected, window)
    else:
        found["k"], found["v"] = torch.zeros_like(inputs.k), torch.zeros_like(inputs.v)
    clear_unused(compressed, plan)
    found["k_cmp"], found["v_cmp"] = _in_own_memory(compressed, inputs.k_cmp.dtype)
    return Inputs(**found)


def _in_own_memory(gradients: Pair, dtype: torch.dtype) -> Pair:
    """Copies, unless they are of the dtype and alone: who holds one would hold both."""
    if all(x.dtype == dtype and is_alone(x) for x in gradients):
        return gradients
    dk, dv = copies = [x.new_empty(x.shape, dtype=dtype) for x in gradients]
    torch._foreach_copy_(copies, gradients)  # in one launch
    return dk, dv


def _with_window(selected: Pair, window: Pair) -> Pair:
    """Gradients of ``k`` and ``v``, with those of their last tokens added in place."""
    pairs = zip(window, selected, strict=True)
    seen = [total[:, total.shape[1] - last.shape[1] :] for last, total in pairs]
    torch._foreach_add_(seen, window)  # in one launch
    return selected


def _with_zeros_before(x: Tensor, like: Tensor) -> Tensor:
    """``x (B, T, H, D)`` after as many tokens of zeros as it has fewer than ``like``."""
    missing = like.shape[1] - x.shape[1]
    return torch.nn.functional.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x
