"""Sequences of different lengths in one call: nsa.Packing, a loss for each sequence, gradients.

    python examples/packed_batch.py

Packed sequences lie one after another in tensors of T tokens, with no padding. The script shows
that outputs and gradients equal those of one call per sequence. It runs on a CPU and on a GPU.
"""

import torch

import nsa

LENGTHS = [300, 0, 1, 65, 500]  # any lengths, 0 and 1 included
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
CONFIG = nsa.NSAConfig.paper(num_selected_blocks=4, window_size=64)


def compare(name: str, packed: torch.Tensor, pieces: list[torch.Tensor]):
    difference = (packed - torch.cat(pieces)).abs().max() / packed.abs().max()
    print(f"{name}: largest difference {difference.item():.1e} of the largest value")


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The fused backend computes in 16 bits.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = sum(LENGTHS)

    q, k, v = (
        torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    target = torch.randn(tokens, HEADS, HEAD_DIM, device=device)

    # Boundaries are int32, from 0 to T. Make one Packing for all layers and steps with the same
    # boundaries: it reads and checks them once.
    lengths = torch.tensor(LENGTHS, device=device)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packing = nsa.Packing(cu_seqlens)
    print(packing)
    print(nsa.explain_backend(q, k, v, config=CONFIG, cu_seqlens=packing))

    out = nsa.forward(q, k, v, config=CONFIG, cu_seqlens=packing)  # (T, H, D)

    # Mean over the tokens of each sequence; an empty one has loss 0.
    error = (out.float() - target).square().mean((1, 2))  # (T,)
    owner = torch.repeat_interleave(lengths)  # the sequence of each token
    loss = torch.zeros(len(LENGTHS), device=device).index_add(0, owner, error)
    loss = loss / lengths.clamp(min=1)
    grads = torch.autograd.grad(loss.sum(), (q, k, v))

    # The same, one sequence at a time. A batch of one has the leading dimensions (1, N).
    outs, losses, alone = [], [], []
    for start, length in zip(cu_seqlens.tolist(), LENGTHS, strict=False):
        span = slice(start, start + length)
        inputs = [x.detach()[None, span].requires_grad_() for x in (q, k, v)]
        one = nsa.forward(*inputs, config=CONFIG)[0]
        error = (one.float() - target[span]).square().mean((1, 2))
        losses.append(error.sum() / max(1, length))
        outs.append(one)
        alone.append([x[0] for x in torch.autograd.grad(losses[-1], inputs)])

    print("tokens   packed    alone")
    for length, packed_loss, alone_loss in zip(LENGTHS, loss, losses, strict=True):
        print(f"{length:6d}   {packed_loss:.4f}   {alone_loss:.4f}")
    compare("output", out, outs)
    for name, grad, pieces in zip("qkv", grads, zip(*alone, strict=True), strict=True):
        compare(f"d{name}", grad, pieces)


if __name__ == "__main__":
    main()
