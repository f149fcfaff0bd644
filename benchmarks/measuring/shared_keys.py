"""A sequence in pieces that share its keys, as ranks run it: in sums of the gradients of keys."""

from collections.abc import Callable

import torch
from torch import Tensor

import nsa
from measuring.workloads import Tensors
from nsa.blocks import num_compressed_blocks
from nsa.boundaries import Boundaries
from nsa.fused import compress_blocks, forward, make_key_sums
from nsa.results import Results
from nsa.testing import make_cu_seqlens


def shared_step(tensors: Tensors, queries: int, config: nsa.NSAConfig) -> Callable[[], None]:
    """Forward and backward of pieces of so many queries of a sequence, and what they share."""
    q, k, v, weight = (x.detach() for x in tensors.leaves)
    (_, length, *_), dout = q.shape, tensors.dout
    bounds = make_cu_seqlens([length], q.device)
    whole = Boundaries(bounds, [length], length, None, bounds, [length], length)
    k, v = k[0].requires_grad_(), v[0].requires_grad_()
    weight.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        compressed, _ = compress_blocks(
            k, v, config=config, compress_k_weight=None, compress_v_weight=None, boundaries=whole
        )
        given = [x.detach().requires_grad_() for x in compressed]
        runs = [min(queries, length - start) for start in range(0, length, queries)]
        sums = make_key_sums(k, v, runs, config, deterministic=False)
        dcompressed = [torch.zeros_like(x, dtype=torch.float32) for x in given]
        out, dq = torch.empty_like(q), torch.empty_like(q)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, length, queries):
            rows = slice(start, min(start + queries, length))
            seen = num_compressed_blocks(rows.stop, config)
            own = [q[:, rows].requires_grad_(), *(x[None, : rows.stop] for x in (k, v))]
            results = Results(out=out[:, rows])
            found = forward(
                own[0], (own[1],) * 3, (own[2],) * 3, config=config, gate_proj_weight=weight,
                compressed_kv=tuple(x[None, :seen] for x in given), results=results,
            )  # fmt: skip
            results.dq, results.keys = dq[:, rows], sums.of_call(slice(0, rows.stop))
            _, dpart, *grads = torch.autograd.grad(found, (own[0], weight, *given), dout[:, rows])
            dweight += dpart
            for total, grad in zip(dcompressed, grads, strict=True):
                total += grad
        rounded = [x.to(like.dtype) for x, like in zip(dcompressed, given, strict=True)]
        dk_dv = torch.autograd.grad(compressed, (k, v), rounded)
        for which, total in enumerate(dk_dv):
            part = torch.empty_like(total)
            for start in range(0, length, queries):
                rows = slice(start, min(start + queries, length))
                sums.round_into(which, rows, part[rows])
            total += part
            for first, grad in sums.windows(which):
                total[first : first + len(grad)] += grad
        return out, dq, *dk_dv, dweight

    return run
