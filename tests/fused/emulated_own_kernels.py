"""What the kernels of ``nsa.fused.kernels`` compute, in plain PyTorch, for any float dtype.

Same names and arguments; results are contiguous, as the kernels' are. Sums are in float32 for
16-bit inputs, else in the dtype of the inputs, so that float64 stays float64.
"""

import torch
from torch import Tensor

from nsa.precision import accumulation_dtype


def gating_forward(o_cmp, o_slc, o_win, q, gates, weight) -> Tensor:
    dtype = accumulation_dtype(o_cmp.dtype)
    branches = torch.stack((o_cmp, o_slc, o_win), dim=2).to(dtype)
    g = _gates(o_cmp, q, gates, weight)
    return (g[..., None] * branches).sum(dim=2).to(o_cmp.dtype)


def gating_backward(dout, o_cmp, o_slc, o_win, q, gates, weight):
    dtype = accumulation_dtype(o_cmp.dtype)
    branches = torch.stack((o_cmp, o_slc, o_win), dim=2).to(dtype)
    g = _gates(o_cmp, q, gates, weight)
    dbranches = (g[..., None] * dout[:, :, None].to(dtype)).to(o_cmp.dtype)
    dbranches = tuple(x.contiguous() for x in dbranches.unbind(dim=2))
    dgates = torch.einsum("rhd,rhid->rhi", dout.to(dtype), branches)
    if gates is not None:
        return (*dbranches, None, dgates.to(gates.dtype).contiguous(), None)
    if weight is None:
        return (*dbranches, None, None, None)
    dlogits = dgates * g * (1 - g)
    dq = torch.einsum("rhi,hid->rhd", dlogits, weight.to(dtype)).to(q.dtype).contiguous()
    dweight = torch.einsum("rhi,rhd->hid", dlogits, q.to(dtype)).to(weight.dtype).contiguous()
    return (*dbranches, dq, None, dweight)


def _gates(o_cmp, q, gates, weight) -> Tensor:
    """``(R, H, 3)``."""
    dtype = accumulation_dtype(o_cmp.dtype)
    if gates is not None and weight is not None:
        raise ValueError("gates and weight are both given; at most one of them may be")
    if gates is not None:
        return gates.to(dtype)
    if weight is not None:
        return torch.einsum("rhd,hid->rhi", q.to(dtype), weight.to(dtype)).sigmoid()
    return torch.full((*o_cmp.shape[:2], 3), 1 / 3, dtype=dtype, device=o_cmp.device)


def mean_forward(x, start, block_size, out_dtype) -> Tensor:
    assert x.shape[2] % 8 == 0, "the kernel loads 16 bytes of channels"
    used = start >= 0
    token = start[used].long()[:, None] + torch.arange(block_size, device=x.device)
    dtype = accumulation_dtype(x.dtype)
    mean = torch.zeros((len(start), *x.shape[1:]), dtype=dtype, device=x.device)
    mean[used] = x[token].to(dtype).sum(dim=1) / block_size
    return mean.to(out_dtype)


def mean_backward_(dx, dmean, block, block_size) -> None:
    used = block >= 0
    dtype = accumulation_dtype(dx.dtype)
    share = dmean[block[used].long()].to(dtype) / block_size
    dx[used] = (dx[used].to(dtype) + share).to(dx.dtype)
