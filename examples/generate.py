"""Generate text from a checkpoint of tools/train_lm.py, with nsa.Cache in every layer.

    python examples/generate.py
    python examples/generate.py outputs/demo/nsa.pt --prompt "def " --prompt "class " --bytes 300

The first form continues a line of Python from the checkpoint that `make demo` writes. Prompts of
different lengths run as one batch: packed in one call at first, then one byte of each a step. Text
appears as it is generated. It runs on a CPU and on a GPU.
"""

import argparse
import codecs
import sys
import time
from pathlib import Path

import torch

import nsa

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

from lm.checkpoint import read_checkpoint
from lm.generate import Sampling, generate
from lm.model import ByteTransformer, ModelConfig
from lm.options import usable_device, usable_seed

DEFAULT_CHECKPOINT = Path("outputs/demo/nsa.pt")


def load_model(path: Path, device: str) -> ByteTransformer:
    """The model of a checkpoint of tools/train_lm.py."""
    state = read_checkpoint(path)
    settings = state["settings"]
    names = ("dim", "num_layers", "num_heads", "num_kv_heads")
    sizes = {name: settings[name] for name in names}
    config = ModelConfig(**sizes, nsa_config=nsa.NSAConfig(**settings["nsa_config"]))
    model = ByteTransformer(config, settings["attention"]).to(device)
    model.load_state_dict(state["model"])
    return model.eval()


class Stream:
    """Prints the text of a sequence as it comes: at once if it is the only one, else by line."""

    def __init__(self, name: str, prompt: bytes, alone: bool):
        self.name, self.alone, self.line = name, alone, ""
        # A character may have several bytes.
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.add(prompt)

    def add(self, data: bytes, final: bool = False):
        text = self.decoder.decode(data, final)
        if self.alone:
            print(text, end="\n" if final else "", flush=True)
            return
        *lines, self.line = (self.line + text).split("\n")
        for line in [*lines, self.line] if final else lines:
            print(f"{self.name} {line}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=DEFAULT_CHECKPOINT, help="(%(default)s)")
    add("--prompt", action="append", help="may be given several times")
    add("--bytes", type=int, default=200, help="to generate for each prompt (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=0.95, help="(%(default)s)")
    add("--seed", type=usable_seed, default=0)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        parser.error(f"{args.checkpoint} is no file; `make demo` writes {DEFAULT_CHECKPOINT}")
    if args.bytes < 1 or not args.temperature >= 0 or not 0 < args.top_p <= 1:
        parser.error("--bytes must be at least 1, --temperature 0 or more, --top-p in (0, 1]")
    if "" in (args.prompt or ()):
        parser.error("--prompt must have at least one byte")
    return args


def main():
    args = parse_args()
    try:
        model = load_model(args.checkpoint, args.device)
    except ValueError as error:
        sys.exit(f"generate: {error}")
    prompts = [text.encode() for text in args.prompt or ["def "]]
    tokens = [torch.tensor(list(data), device=args.device) for data in prompts]
    generator = torch.Generator().manual_seed(args.seed)
    sampling = Sampling(args.temperature, args.top_p, generator)
    alone = len(prompts) == 1
    streams = [Stream(f"[{i}]", data, alone) for i, data in enumerate(prompts)]

    times = [time.perf_counter()]
    # The fused backend computes in 16 bits.
    on_gpu = torch.device(args.device).type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        for chosen in generate(model, tokens, args.bytes, sampling):
            for stream, byte in zip(streams, chosen.tolist(), strict=True):
                stream.add(bytes([byte]))
            times.append(time.perf_counter())
    for stream in streams:
        stream.add(b"", final=True)
    prompt_bytes = sum(map(len, prompts))
    print(f"prompt: {prompt_bytes} bytes in {times[1] - times[0]:.3f} s")
    if args.bytes > 1:
        count = len(prompts) * (args.bytes - 1)
        print(f"then {count / (times[-1] - times[1]):.0f} bytes a second, batch {len(prompts)}")


if __name__ == "__main__":
    main()
