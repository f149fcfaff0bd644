"""Switch a dense Llama-like model to NSA and train on: losses before, at and after the switch.

    python examples/convert_llama.py

A small model of the transformers library reads bytes of Python's standard library. It is trained
with dense attention, then twice on: with NSA, and dense as before. The script prints the losses on
files that were held out, and with matplotlib writes outputs/convert_llama.png. It needs the extra
`transformers`, and runs on a CPU, for some minutes, and on a GPU. So small a model needs no long
context: this shows how to switch, not what NSA gains.
"""

import argparse
import importlib.util
import sysconfig
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import nsa
import nsa.transformers

CONTEXT = 512
NSA = nsa.NSAConfig.paper(
    compress_block_size=16,
    compress_stride=8,
    select_block_size=32,
    num_selected_blocks=5,
    window_size=64,
)
MODEL = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    max_position_embeddings=CONTEXT,
    use_cache=False,
    nsa=asdict(NSA),
)


def read_text(device: str) -> tuple[Tensor, Tensor]:
    """Bytes to train on and held out, int64; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [f for i, f in enumerate(files) if i % 10], files[::10]
    texts = (bytearray(b"".join(f.read_bytes() for f in part)) for part in parts)
    return tuple(torch.frombuffer(text, dtype=torch.uint8).long().to(device) for text in texts)


def draw(text: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random pieces of the text, ``(batch, CONTEXT)``."""
    starts = torch.randint(len(text) - CONTEXT, (batch, 1), generator=generator)
    return text[starts.to(text.device) + torch.arange(CONTEXT, device=text.device)]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, text: Tensor, batch: int) -> float:
    """Nats per byte, on the same pieces each time."""
    generator = torch.Generator().manual_seed(1)
    ids = draw(text, 2 * batch, generator).split(batch)
    return torch.stack([model(x, labels=x).loss for x in ids]).mean().item()


def train(model: LlamaForCausalLM, text: Tensor, steps: int, batch: int, seed: int) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = draw(text, batch, generator)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def switch(dense: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights with NSA, and gates that are new."""
    config = deepcopy(dense.config)
    config._attn_implementation = "nsa"
    model = nsa.transformers.with_gates(LlamaForCausalLM)(config).to(dense.device)
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all("gate" in name for name in missing)
    return model


def plot(curves: dict[str, tuple[int, list[float]]]):
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib, so no PNG")
        return
    from matplotlib import pyplot

    for name, (start, losses) in curves.items():
        pyplot.plot(range(start, start + len(losses)), losses, label=name)
    pyplot.gca().set(xlabel="step", ylabel="nats per byte, of each step")
    pyplot.legend()
    path = Path("outputs/convert_llama.png")
    path.parent.mkdir(exist_ok=True)
    pyplot.savefig(path)
    print(f"wrote {path.resolve()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=120, help="before the switch; after it half")
    parser.add_argument("--batch", type=int, default=8, help="pieces of 512 bytes a step")
    args = parser.parse_args()
    steps, batch = args.steps, args.batch
    torch.manual_seed(0)
    nsa.transformers.register()
    text, held_out = read_text("cuda" if torch.cuda.is_available() else "cpu")
    dense = LlamaForCausalLM(MODEL).to(text.device)
    before = train(dense, text, steps, batch, seed=2)
    print(f"dense, before the switch: {held_out_loss(dense, held_out, batch):.3f} nats per byte")
    model = switch(dense)
    print(f"NSA, at the switch: {held_out_loss(model, held_out, batch):.3f} nats per byte")
    after = {"dense": train(dense, text, steps // 2, batch, seed=3)}
    print(f"dense, trained on: {held_out_loss(dense, held_out, batch):.3f} nats per byte")
    after["NSA"] = train(model, text, steps // 2, batch, seed=3)
    print(f"NSA, trained on: {held_out_loss(model, held_out, batch):.3f} nats per byte")
    plot({"dense before": (0, before)} | {f"{x} after": (steps, y) for x, y in after.items()})


if __name__ == "__main__":
    main()
