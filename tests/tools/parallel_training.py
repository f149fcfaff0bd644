"""tools/train_lm.py for torchrun, with something that happens to rank 1 after its third step.

torchrun --run-path ... parallel_training.py {nothing,signal,death} OPTIONS
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import train_lm


def after_step(event: str, step: int):
    if os.environ["RANK"] != "1" or step != 3:
        return
    if event == "signal":
        signal.raise_signal(signal.SIGTERM)
    if event == "death":
        raise RuntimeError("rank 1 is ill")


@record
def main() -> int:
    event, *options = sys.argv[1:]
    torch.set_num_threads(1)
    original = train_lm.Trainer.train_step

    def step(self):
        loss = original(self)
        after_step(event, self.step)
        return loss

    train_lm.Trainer.train_step = step
    train_lm.SAMPLE_BYTES = 2
    return train_lm.main(options)


# torchrun --run-path waits for what the script of a rank that succeeds returns.
if __name__ == "__main__" and main():
    sys.exit(1)
