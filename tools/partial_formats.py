"""Errors of the formats in which partial results of the selected branch could be kept, on a CPU.

    python tools/partial_formats.py

Token mode's fused backend computes a partial output and a partial gradient of the queries for each
pair of a token and one of its blocks, keeps them in memory, and adds them up. This script rounds
them to each format and adds them up in float64. Outputs of a token's first block, its own and the
one before never leave the registers, and are not rounded. It does so for 8 blocks of 64 of 1024
Gaussian tokens, for these with two channels of k and v 30 times as large (q and dout by as much
smaller), for keys with a mean, and for each layer of a small dense language model that it trains
first, with the blocks that nsa.select_blocks chooses there. That takes some minutes.

The formats are

- float32, which stands for no rounding
- bfloat16
- 12 bits: eight integers of 11 bits with the exponent of the largest, as the fused backend has them
  in bfloat16
- 10 bits: the same with integers of 9 bits
- scaled: float16 after a power of two for each row, as it has gradients in float16

P and dS are rounded to bfloat16, as the tensor cores take them, and so are the output and the
gradient. As in FlashAttention, P (dP - delta) has delta from the rounded output. Two more rows tell
what that adds: "P dP" is float32 with the sum of P dP for delta, and "reference" is
nsa.selected_attention in bfloat16. Tests allow twice the error of "reference" in norm and for the
largest number; they do not judge channels. What a format adds is its difference from "float32".

A row of the table has two errors against float64: in norm, and the largest of a channel, relative
to the norm of that channel.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor

import nsa
from lm.data import load_corpus, random_batch
from lm.model import ByteTransformer, ModelConfig

CONFIG = nsa.NSAConfig.paper(num_selected_blocks=8, window_size=256)
MODEL = ModelConfig(dim=256, num_layers=4, num_heads=4, num_kv_heads=1, nsa_config=CONFIG)
BATCH = 2
VECTOR = 8
Rounding = Callable[[Tensor], Tensor]


class Case(NamedTuple):
    """Heads of one KV head. ``q``, ``dout``: (T, G, D); ``k``, ``v``: (T, D); blocks: (T, n)."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    blocks: Tensor


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=1024, help="tokens, at least 2")
    parser.add_argument("--steps", type=int, default=400, help="of the training")
    options = parser.parse_args(argv)
    if options.length < 2:
        parser.error(f"--length must be at least 2, got {options.length}")
    torch.manual_seed(0)
    print(f"{'tensors':28} {'result':6} {'format':10} {'in norm':>9} {'channel':>9}", flush=True)
    for case in chain(drawn_cases(options.length), trained_cases(options.length, options.steps)):
        for result, name, (in_norm, channel) in measure(case):
            print(f"{case.name:28} {result:6} {name:10} {in_norm:9.5f} {channel:9.4f}", flush=True)


def drawn_cases(length: int) -> list[Case]:
    """Tensors drawn from normal distributions, rounded to bfloat16, and random blocks among which
    the paper's rule is kept."""
    heads, dim = 4, 128

    def case(name: str, change: Callable[..., None]) -> Case:
        q, dout = torch.randn(2, length, heads, dim)
        k, v = torch.randn(2, length, dim)
        change(q, k, v, dout)
        tensors = [x.bfloat16().double() for x in (q, k, v, dout)]
        size, n = CONFIG.select_block_size, CONFIG.num_selected_blocks
        draw = torch.rand(length, -(-length // size))
        block, own = torch.arange(draw.shape[1]), torch.arange(length)[:, None] // size
        draw[(block == 0) | (block >= own - 1)] = 2
        draw[block > own] = -1
        value, index = draw.topk(min(n, draw.shape[1]))
        # Ascending, and -1 at the end.
        blocks = index.masked_fill(value < 0, draw.shape[1]).sort().values
        return Case(name, *tensors, blocks.masked_fill(blocks == draw.shape[1], -1))

    def two_large(q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
        # The other factor is smaller by as much, so that scores and dP keep their size.
        for x, y in ((q, k), (dout, v)):
            x[..., [5, 77]] /= 30
            y[..., [5, 77]] *= 30

    def mean(q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
        k += 3

    return [
        case("Gaussian", lambda *_: None),
        case("two channels of k, v 30 x", two_large),
        case("keys with a mean of 3 sigma", mean),
    ]


def trained_cases(length: int, steps: int) -> Iterator[Case]:
    """Queries, keys and values of each layer of a trained model, and the gradients of its output;
    prints how much larger a channel is than others."""
    corpus = load_corpus(None)
    generator = torch.Generator().manual_seed(0)
    model = ByteTransformer(MODEL, "dense")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20)
        loss = loss_of(model, *random_batch(corpus.train, BATCH, length, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    calls, attention = [], F.scaled_dot_product_attention

    def record(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        out = attention(q, k, v, **options)
        calls.append([x.detach().transpose(1, 2) for x in (q, k, v)])
        out.register_hook(calls[-1].append)
        return out

    inputs, targets = random_batch(corpus.heldout, 1, length, generator)
    with mock.patch.object(F, "scaled_dot_product_attention", record):
        loss = loss_of(model, inputs, targets)
    loss.backward()
    print(f"trained for {steps} steps, held-out loss {loss.item() / math.log(2):.2f} bits a byte")
    for i, (q, k, v, dout) in enumerate(calls):
        name = f"layer {i} of a trained model"
        large = ", ".join(f"{x} {largest_channel(y):.1f}" for x, y in (("k", k), ("v", v)))
        print(f"{name}: the largest channel, in medians of all channels: {large}")
        blocks = nsa.select_blocks(q, k, config=CONFIG, backend="reference")[0, :, 0]
        tensors = (q[0], k[0, :, 0], v[0, :, 0], dout.transpose(1, 2)[0])
        yield Case(name, *(x.bfloat16().double() for x in tensors), blocks)


def loss_of(model: ByteTransformer, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def largest_channel(x: Tensor) -> float:
    rms = x.square().flatten(0, -2).mean(0).sqrt()
    return (rms.max() / rms.median()).item()


def measure(case: Case) -> list[tuple[str, str, tuple[float, float]]]:
    """(result, format, errors) of the output and of the gradient of the queries."""
    exact = attend(case, exactly, exactly)
    found = {name: attend(case, bfloat16, rounds) for name, rounds in FORMATS.items()}
    found["P dP"] = attend(case, bfloat16, exactly, adds_p_dp=True)
    found["reference"] = reference(case)
    return [
        (result, name, errors_of(results[i], exact[i]))
        for i, result in enumerate(("out", "dq"))
        for name, results in found.items()
    ]


def errors_of(x: Tensor, y: Tensor) -> tuple[float, float]:
    difference = (x - y).flatten(0, -2)
    channels = difference.norm(dim=0) / y.flatten(0, -2).norm(dim=0)
    return (difference.norm() / y.norm()).item(), channels.max().item()


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """nsa's own in bfloat16."""
    q = case.q.bfloat16()[None].requires_grad_()
    k, v = (x.bfloat16()[None, :, None] for x in (case.k, case.v))
    blocks = case.blocks.int()[None, :, None]
    out, _ = nsa.selected_attention(q, k, v, blocks, CONFIG.select_block_size, backend="reference")
    (dq,) = torch.autograd.grad(out, q, case.dout.bfloat16()[None])
    return out[0].double().detach(), dq[0].double()


def attend(
    case: Case, round_operand: Rounding, round_partial: Rounding, *, adds_p_dp: bool = False
) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the queries, one slot of all tokens after the other."""
    scale = case.q.shape[-1] ** -0.5
    slots = case.blocks.unbind(-1)
    pairs = [pairs_of(case, blocks, scale) for blocks in slots]
    own_block = torch.arange(len(case.q)) // CONFIG.select_block_size
    lse = torch.stack([scores.logsumexp(-1, keepdim=True) for scores, _, _ in pairs])
    total = lse.logsumexp(0)
    out = 0
    for blocks, (scores, _, v), own in zip(slots, pairs, lse, strict=True):
        p = (scores - own.nan_to_num(neginf=0)).exp()
        partial = torch.einsum("tgk,tkd->tgd", round_operand(p), v)
        stays = (blocks == 0) | (blocks >= own_block - 1)
        partial = torch.where(stays[:, None, None], partial, round_partial(partial))
        out += partial * (own - total).exp()
    out = round_operand(out)
    p_dp = [
        ((scores - total).exp(), torch.einsum("tgd,tkd->tgk", case.dout, v))
        for scores, _, v in pairs
    ]
    delta = (case.dout * out).sum(-1, keepdim=True)
    if adds_p_dp:
        delta = sum((p * dp).sum(-1, keepdim=True) for p, dp in p_dp)
    dq = 0
    for (_, k, _), (p, dp) in zip(pairs, p_dp, strict=True):
        ds = round_operand(p * (dp - delta))
        dq += from_threads(round_partial(to_threads(torch.einsum("tgk,tkd->tgd", ds, k))))
    return out, round_operand(dq * scale)


def pairs_of(case: Case, blocks: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``(T, G, keys)``, keys and values ``(T, keys, D)`` of each token and its block."""
    length, size = len(case.q), CONFIG.select_block_size
    keys = blocks[:, None] * size + torch.arange(size)
    seen = (blocks >= 0)[:, None] & (keys <= torch.arange(length)[:, None])
    k, v = (x[keys.clamp(0, length - 1)] for x in (case.k, case.v))
    scores = torch.einsum("tgd,tkd->tgk", case.q, k) * scale
    return scores.masked_fill(~seen[:, None], -torch.inf), k, v


def to_threads(x: Tensor) -> Tensor:
    """Channels in the order in which threads hold a gradient: of each 32, a thread holds two of
    every eight, and these eight numbers share an exponent."""
    return x.unflatten(-1, (-1, 4, 4, 2)).transpose(-3, -2).flatten(-4)


def from_threads(x: Tensor) -> Tensor:
    # A transposition of 4 by 4 undoes itself.
    return to_threads(x)


def exactly(x: Tensor) -> Tensor:
    return x


def bfloat16(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def shared_exponent(bits: int) -> Rounding:
    """Integers of ``bits`` bits, the sign among them, with the exponent of the largest of eight."""

    def round_vectors(x: Tensor) -> Tensor:
        vectors = x.unflatten(-1, (-1, VECTOR))
        # A little more, so that the largest does not round to one bit more.
        _, exponent = torch.frexp(vectors.abs().amax(-1, keepdim=True) * (1 + 2.0 ** (2 - bits)))
        unit = torch.exp2((exponent - (bits - 1)).double())
        return ((vectors / unit).round() * unit).flatten(-2)

    return round_vectors


def scaled(x: Tensor) -> Tensor:
    """float16 after a power of two, so that a row's largest number is between 2^14 and 2^15."""
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
    factor = torch.exp2((15 - exponent).double())
    return (x * factor).float().half().double() / factor


FORMATS = {
    "float32": exactly,
    "bfloat16": bfloat16,
    "12 bits": shared_exponent(11),
    "10 bits": shared_exponent(9),
    "scaled": scaled,
}

if __name__ == "__main__":
    main()
