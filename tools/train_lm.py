"""Train a small byte-level language model with NSA on real text, beside its dense twin.

    python tools/train_lm.py --attention both --output outputs/demo

The output folder gets a log (CSV) and a checkpoint for each attention, a sample of text, and a
picture of the losses and the selected blocks. Stop it at any time: the same command continues where
it stopped, and ends with the same weights (bit for bit on a CPU).

On several GPUs, or processes of a CPU:

    torchrun --standalone --nproc-per-node 4 tools/train_lm.py --attention nsa --device cuda \
        --context-parallel 2

Two ranks share each sequence and the two pairs share the batch. All four share the weights. The run
continues on any number of ranks. After a signal all stop after the same step; torchrun then reports
the signal with a traceback of its own.
"""

import argparse
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# This must be set before torch starts its threads. On a machine with other work, threads that spin
# while they wait for each other made a step ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from tqdm import tqdm

import nsa
from lm.checkpoint import load_checkpoint, save_checkpoint
from lm.data import Corpus, load_corpus, random_batch
from lm.generate import Sampling, generate
from lm.model import ByteTransformer, ModelConfig
from lm.options import usable_device, usable_seed
from lm.parallel import Alone, Ranks, join, whole_sequences
from lm.plot import plot_run, selection_map, write_csv


@dataclass(frozen=True)
class Preset:
    """Everything that defines a run except its text and seed."""

    model: ModelConfig
    context: int  # bytes of a sequence
    batch_size: int
    steps: int
    learning_rate: float


# Tile mode uses tile_summary="first", because held-out loss must not see later tokens.
PRESETS = {
    # For a 2-core CPU: about two minutes for both attentions.
    "demo": Preset(
        ModelConfig(
            dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            nsa_config=nsa.NSAConfig(
                compress_block_size=16,
                num_selected_blocks=6,
                num_initial_blocks=1,
                # A tile's own two blocks, which its first query cannot score.
                num_local_blocks=2,
                window_size=64,
                q_tile_size=32,
                tile_summary="first",
            ),
        ),
        context=512,
        batch_size=4,
        steps=250,
        learning_rate=3e-3,
    ),
    # For one GPU, to compare backends: a minute with the fused backend.
    "small": Preset(
        ModelConfig(
            dim=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            nsa_config=nsa.NSAConfig(
                num_selected_blocks=8,
                num_initial_blocks=1,
                num_local_blocks=2,
                window_size=128,
                q_tile_size=128,
                tile_summary="first",
            ),
        ),
        context=2048,
        batch_size=8,
        steps=300,
        learning_rate=2e-3,
    ),
    "tile": Preset(
        ModelConfig(
            dim=1024,
            num_layers=12,
            num_heads=16,
            num_kv_heads=4,
            # The first query of a tile has no compressed token of its own tile to score.
            nsa_config=nsa.NSAConfig(
                tile_summary="first", num_initial_blocks=1, num_local_blocks=4
            ),
        ),
        context=8192,
        batch_size=8,
        steps=2000,
        learning_rate=6e-4,
    ),
    "paper": Preset(
        ModelConfig(
            dim=1024,
            num_layers=12,
            num_heads=16,
            num_kv_heads=1,
            nsa_config=nsa.NSAConfig.paper(),
        ),
        context=8192,
        batch_size=8,
        steps=2000,
        learning_rate=6e-4,
    ),
}
HELDOUT_BATCHES = 4
FINAL_HELDOUT_BATCHES = 16
SAMPLE_BYTES = 200


class Interrupted(Exception):
    """The user stopped the run, whose state is on disk."""


class Trainer:
    """The training of one model. It can stop after any step and continue from its checkpoint."""

    def __init__(
        self,
        preset: Preset,
        attention: str,
        corpus: Corpus,
        args: argparse.Namespace,
        ranks: Alone,
    ):
        torch.manual_seed(args.seed)
        self.preset, self.attention, self.corpus, self.args = preset, attention, corpus, args
        self.ranks = ranks
        model = ByteTransformer(preset.model, attention, args.backend).to(ranks.device)
        self.model = ranks.prepare(model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), preset.learning_rate, betas=(0.9, 0.95), weight_decay=0.01
        )
        self.generator = torch.Generator().manual_seed(args.seed)
        self.step, self.seconds, self.log = 0, 0.0, []
        self.recent = []  # losses since the last row of the log
        self.settings = {
            "seed": args.seed,
            "text": corpus.digest,
            "attention": attention,
            **{name: value for name, value in asdict(preset).items() if name != "model"},
            **asdict(preset.model),
        }
        # A folder for the checkpoints of several ranks, a file for those of one process.
        self.sharded = isinstance(ranks, Ranks)
        self.path = args.output / (attention if self.sharded else f"{attention}.pt")

    def resume(self):
        """Continue from the checkpoint, if there is one."""
        if self.sharded:
            state = sharded_checkpoint().load(self.path, self.model, self.optimizer, self.settings)
        else:
            state = load_checkpoint(self.path, self.settings)
        if state is None:
            return
        if not self.sharded:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        self.recent = state["recent"]

    def forget(self):
        """Start over. A file is replaced when it is written; of a folder, old steps would stay."""
        if self.sharded:
            sharded_checkpoint().remove(self.path, self.ranks)

    def save(self):
        """Write the checkpoint and the log."""
        state = {
            "settings": self.settings,
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "recent": self.recent,
        }
        if self.sharded:
            sharded_checkpoint().save(self.path, self.model, self.optimizer, state, self.ranks)
        else:
            state["model"] = self.model.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
            save_checkpoint(self.path, state)
        if self.ranks.first:
            write_csv(self.path.with_suffix(".csv"), self.log)

    def run(self, stop_requested):
        """Train to the end, or until ``stop_requested()``.

        Raises:
            Interrupted: training stopped early, with a checkpoint of its last step.
        """
        steps = self.preset.steps
        columns = {} if sys.stderr.isatty() else {"mininterval": 10, "ncols": 80}
        columns["disable"] = not self.ranks.first
        with tqdm(total=steps, initial=self.step, desc=f"{self.attention:>5}", **columns) as bar:
            while self.step < steps:
                started = time.perf_counter()
                self.recent.append(self.train_step())
                if self.step % self.args.log_every == 0 or self.step == steps:
                    train_loss = sum(self.recent) / len(self.recent)
                    heldout_loss = self.heldout_loss(HELDOUT_BATCHES)
                    self.log.append([self.step, train_loss, heldout_loss, 0.0])
                    self.recent = []
                self.seconds += time.perf_counter() - started
                if self.log and self.log[-1][0] == self.step:
                    self.log[-1][-1] = round(self.seconds, 2)
                    bar.set_postfix(heldout=f"{self.log[-1][2]:.3f}", refresh=False)
                bar.update()
                stopped = self.ranks.any(stop_requested())
                if stopped or self.step % self.args.save_every == 0 or self.step == steps:
                    self.save()
                if stopped and self.step < steps:
                    raise Interrupted

    def train_step(self) -> float:
        """Take one step of the optimizer, and return the loss before it in nats per byte."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(self.corpus.train, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return self.ranks.mean(loss.item())

    def learning_rate(self) -> float:
        """Rise linearly from 0 over the first twentieth of steps, then fall linearly to a tenth."""
        done = self.step / self.preset.steps
        return self.preset.learning_rate * min((done + 1 / self.preset.steps) * 20, 1 - 0.9 * done)

    def loss(self, text: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean loss of this rank's part of a random batch, in nats per byte."""
        preset = self.preset
        batch = random_batch(text, preset.batch_size, preset.context, generator)
        inputs, targets = (self.ranks.own(part).to(self.ranks.device) for part in batch)
        with self.autocast():
            logits = self.model(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def heldout_loss(self, batches: int) -> float:
        """Mean loss over held-out crops, which are the same each time and for each attention."""
        generator = torch.Generator().manual_seed(0)
        losses = [self.loss(self.corpus.heldout, generator) for _ in range(batches)]
        return self.ranks.mean(torch.stack(losses).mean().item())

    def sample(self) -> str:
        """Text that continues the first line of held-out text."""
        prompt = self.corpus.heldout[:64].long().to(self.ranks.device)
        generator = torch.Generator().manual_seed(self.args.seed)
        with self.autocast(), whole_sequences(self.model):
            sampling = Sampling(0.8, 1.0, generator)
            # A cache takes its dtype from the weights, which sharded ones do not show.
            options = dict(use_cache=not self.sharded)
            steps = generate(self.model, [prompt], SAMPLE_BYTES, sampling, **options)
            text = bytes([*prompt.tolist(), *(int(step) for step in steps)])
        return text.decode("utf-8", errors="replace")

    def selection(self):
        """The map of the blocks that the last layer selects on held-out text."""
        context = self.preset.context
        text = self.corpus.heldout[None, :context].long().to(self.ranks.device)
        config = self.preset.model.nsa_config
        with self.autocast(), whole_sequences(self.model):
            indices = self.model.selected_blocks(text, layer=self.preset.model.num_layers - 1)
        return selection_map(indices, text.shape[1], config)

    def autocast(self):
        """Autocast to bfloat16 on a GPU, because the kernels need 16 bits; float32 on a CPU."""
        kind = torch.device(self.ranks.device).type
        if kind == "cpu" or self.sharded:  # sharded weights are cast when they are gathered
            return nullcontext()
        return torch.autocast(kind, torch.bfloat16)


def sharded_checkpoint():
    """Imported at first use, because it imports much of torch.distributed."""
    from lm import sharded_checkpoint

    return sharded_checkpoint


@contextmanager
def deferred_signals():
    """Yield a function that says whether SIGINT or SIGTERM arrived. A second one ends the run."""
    arrived = []

    def handle(number, frame):
        if arrived:
            raise KeyboardInterrupt
        arrived.append(number)

    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", choices=("nsa", "dense", "both"), default="both")
    add("--preset", choices=tuple(PRESETS), default="demo", help="model and NSA configuration")
    add("--text", type=Path, help="a text file or folder (default: Python's standard library)")
    add("--output", type=Path, default=Path("outputs/lm"), help="folder (default: %(default)s)")
    add("--device", type=usable_device, default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--context-parallel", type=int, default=1, help="ranks that share a sequence (torchrun)")
    add("--backend", choices=("auto", "reference", "fused"), default="auto")
    add("--steps", type=int, help="default: the preset's, as for the next two")
    add("--context", type=int, help="bytes of a sequence")
    add("--batch-size", type=int, help="sequences of a step")
    add("--seed", type=usable_seed, default=0)
    add("--log-every", type=int, default=25, help="steps between losses (default: %(default)s)")
    add("--save-every", type=int, default=50, help="steps between checkpoints (%(default)s)")
    add("--fresh", action="store_true", help="ignore the checkpoints of an earlier run")
    args = parser.parse_args(argv)
    for name in ("steps", "context", "batch_size", "log_every", "save_every", "context_parallel"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.context_parallel > 1 and args.attention != "nsa":
        parser.error(f"--context-parallel needs --attention nsa, got {args.attention}")
    return args


def train_all(args: argparse.Namespace, ranks: Alone, stop_requested) -> dict[str, Trainer]:
    """Train each attention that was asked for."""
    sizes = {name: getattr(args, name) for name in ("steps", "context", "batch_size")}
    preset = replace(PRESETS[args.preset], **{k: v for k, v in sizes.items() if v is not None})
    # Now, and not after the first steps, which would be lost.
    args.output.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(args.text)
    say(ranks, f"text: {corpus.description}")
    trainers = {}
    for attention in ("nsa", "dense") if args.attention == "both" else (args.attention,):
        trainer = trainers[attention] = Trainer(preset, attention, corpus, args, ranks)
        if args.fresh:
            trainer.forget()
        else:
            trainer.resume()
        if trainer.step:
            say(ranks, f"{attention}: continuing {trainer.path} after step {trainer.step}")
        trainer.run(stop_requested)
    return trainers


def say(ranks: Alone, text: str, file=None):
    """Print, on one rank."""
    if ranks.first:
        print(text, file=file or sys.stdout, flush=True)


def report(args: argparse.Namespace, trainers: dict[str, Trainer], ranks: Alone):
    """Write the sample and the picture, and print the held-out losses as the last line."""
    shown = trainers.get("nsa") or trainers["dense"]
    # All ranks compute, because they share the weights.
    sample = shown.sample()
    selection = trainers["nsa"].selection() if "nsa" in trainers else None
    losses = [
        f"{attention} {trainer.heldout_loss(FINAL_HELDOUT_BATCHES):.3f} ({trainer.seconds:.0f} s)"
        for attention, trainer in trainers.items()
    ]
    if not ranks.first:
        return
    (args.output / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"\nsample of {shown.attention} (64 bytes of held-out text, then its own):\n{sample}\n")
    picture = args.output / "losses.png"
    logs = {attention: trainer.log for attention, trainer in trainers.items()}
    plot_run(picture, logs, selection, shown.preset.model.nsa_config)
    print(f"picture: {picture}, logs: {', '.join(str(args.output / f'{a}.csv') for a in logs)}")
    print(f"held-out loss after {shown.step} steps, nats per byte: {', '.join(losses)}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # Unordered sums over threads would make a resumed run differ in the last bit.
    torch.use_deterministic_algorithms(torch.device(args.device).type == "cpu")
    ranks = None
    try:
        with deferred_signals() as stop_requested:
            ranks = join(args.device, args.context_parallel)
            trainers = train_all(args, ranks, stop_requested)
        report(args, trainers, ranks)
    except Interrupted:
        assert ranks is not None
        say(ranks, "interrupted; the same command continues from here")
        return 130
    except (OSError, ValueError, nsa.UnsupportedError) as error:
        say(ranks or Alone(args.device), f"train_lm: {error}", file=sys.stderr)
        return 2
    finally:
        if ranks is not None:
            ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
