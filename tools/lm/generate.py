"""Text from a byte-level transformer, byte by byte: NSA layers decode with their caches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lm.model import ByteTransformer


@dataclass
class Sampling:
    """How the next byte is chosen.

    Args:
        temperature: divides the logits; 0 takes the most likely byte.
        top_p: the most likely bytes that have this probability together are drawn from.
        generator: on the CPU.
    """

    temperature: float
    top_p: float
    generator: torch.Generator

    def choose(self, logits: Tensor) -> Tensor:
        """The next byte for each row of ``logits (B, 256)``, int64 ``(B,)`` on their device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probability = (logits.float().cpu() / self.temperature).softmax(-1)
        ranked, order = probability.sort(descending=True)
        # A byte is kept if those before it do not have the probability yet; so is the first.
        ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0
        nth = torch.multinomial(ranked, 1, generator=self.generator)
        return order.gather(-1, nth)[:, 0].to(logits.device)


@torch.no_grad()
def generate(
    model: ByteTransformer,
    prompts: list[Tensor],
    length: int,
    sampling: Sampling,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next byte of every sequence, int64 ``(B,)``, ``length`` times.

    Args:
        prompts: bytes of each sequence, int64 of any lengths from 1, on the device of the model.
        use_cache: whether NSA layers keep what they computed; otherwise each byte computes all.
    """
    most = max(map(len, prompts)) + length
    caches = model.make_caches(len(prompts), most) if use_cache else None
    if caches is None:
        texts = list(prompts)
        for _ in range(length):
            logits = torch.cat([model(text[None])[:, -1] for text in texts])
            chosen = sampling.choose(logits)
            texts = [torch.cat((x, y[None])) for x, y in zip(texts, chosen, strict=True)]
            yield chosen
        return
    # The prompts are packed sequences; then each step has one byte of every sequence.
    lengths = torch.tensor([0, *map(len, prompts)], device=prompts[0].device)
    ends = lengths.cumsum(0)
    logits = model(torch.cat(prompts), ends.int(), caches)[ends[1:] - 1]
    for step in range(length):
        chosen = sampling.choose(logits)
        yield chosen
        if step + 1 < length:
            logits = model(chosen[:, None], caches=caches)[:, -1]
