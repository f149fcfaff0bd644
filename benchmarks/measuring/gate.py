"""The gate: no number is reported unless the fused backend is right on this machine."""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

import nsa
from measuring.workloads import make_tensors
from nsa.blocks import num_compressed_blocks
from nsa.testing import assert_as_accurate


def check_accuracy(options, config: nsa.NSAConfig, *, lengths: list[int] | None = None):
    """Compare the fused output and gradients with the float64 reference.

    Args:
        options: the shape, as :func:`measuring.workloads.make_tensors` takes it.
        config: what is measured.
        lengths: packed sequences to check; by default a batch of one sequence of 2048 tokens.

    Raises:
        AssertionError: the fused backend errs more than its dtype explains.
    """
    _check(options, config, (1, 2048) if lengths is None else (sum(lengths),), lengths)
    if config.num_cmp_selected_blocks is None:
        return
    # So few tokens are one group. So a tile must also choose among three, on the heads of one KV
    # head. Its compressed keys are given, because different rounding could change the choice.
    one_head = vars(options) | dict(heads=options.heads // options.kv_heads, kv_heads=1)
    length = 5 * config.compress_block_size * config.cmp_group_size // 2
    config = replace(config, num_cmp_selected_blocks=1)
    _check(argparse.Namespace(**one_head), config, (1, length), None, given=True)


def _check(options, config, leading: tuple[int, ...], lengths: list[int] | None, given=False):
    tensors = make_tensors(leading, options, backward=True, lengths=lengths)
    named = dict(zip(("q", "k", "v", "gate_proj_weight"), tensors.leaves, strict=True))
    if given:
        named |= dict(k_cmp=_means(tensors.k, config), v_cmp=_means(tensors.v, config))
    indices = nsa.select_blocks(
        tensors.q,
        tensors.k,
        config=config,
        compressed_kv=_compressed_kv(named),
        backend="reference",
        **tensors.extra,
    )
    runs = []
    for dtype, backend in (
        (torch.float64, "reference"),
        (tensors.q.dtype, "reference"),
        (tensors.q.dtype, "fused"),
    ):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in named.items()}
        out = nsa.forward(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            config=config,
            gate_proj_weight=leaves["gate_proj_weight"],
            compressed_kv=_compressed_kv(leaves),
            block_indices=indices,
            backend=backend,
            **tensors.extra,
        )
        grads = torch.autograd.grad(out, list(leaves.values()), tensors.dout.to(dtype))
        runs.append((out.detach(), *grads))
    names = ("out", *(f"d{name}" for name in named))
    for name, exact, same_dtype, actual in zip(names, *runs, strict=True):
        assert_as_accurate(name, actual, same_dtype, exact)


def _compressed_kv(named: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    return (named["k_cmp"], named["v_cmp"]) if "k_cmp" in named else None


def _means(x: Tensor, config: nsa.NSAConfig) -> Tensor:
    """Compressed tokens of ``x (1, N, H_kv, D)``."""
    size, count = config.compress_block_size, num_compressed_blocks(x.shape[1], config)
    return x.detach()[:, : count * size].unflatten(1, (count, size)).mean(dim=2)
