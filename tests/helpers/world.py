"""Ranks for tests: processes that stay, get a function and arguments, and cannot hang a test."""

import importlib
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection

from tests.helpers.forked import fork_context
from tests.helpers.measuring import measured_rank, options_of_ranks

RANKS = 4
SECONDS = 30
START_SECONDS = 240
"""In which all ranks start: they import PyTorch, on a machine that may do much else."""


class World:
    """Processes with a group of all of them, and of the first two, three, and so on.

    Args:
        folder: a new folder.
        size: how many processes.
        backend: of :func:`torch.distributed.init_process_group`.
        seconds: a case that takes longer has failed.
    """

    def __init__(
        self, folder: str, size: int = RANKS, backend: str = "gloo", seconds: float = SECONDS
    ):
        self._folder, self._started, self._seconds = folder, 0, seconds
        self._size, self._backend = size, backend
        self._patience = seconds
        self._processes: list = []
        self._pipes: list[Connection] = []

    def run(
        self, function: Callable, *args, ranks: int | None = None, seconds: float | None = None
    ) -> list:
        """``function(group, *args)`` on each rank; the results by rank.

        Raises:
            AssertionError: a rank raised, died or took too long; with the traceback by rank.
        """
        self._start()
        ranks = self._size if ranks is None else ranks
        name = (function.__module__, function.__qualname__)
        for pipe in self._pipes[:ranks]:
            pipe.send_bytes(pickle.dumps((name, ranks, args)))
        answers, end = [], time.monotonic() + (seconds or self._seconds)
        for rank, pipe in enumerate(self._pipes[:ranks]):
            answers.append(self._answer(rank, pipe, end))
        problems = [f"rank {i}: {text}" for i, (good, text) in enumerate(answers) if not good]
        if problems:
            # A rank that raised may have left others in a collective.
            self._patience = 3
            self.stop()
            self._patience = self._seconds
            raise AssertionError("\n".join(problems))
        return [result for _, result in answers]

    def _answer(self, rank: int, pipe: Connection, end: float):
        try:
            if pipe.poll(max(0, end - time.monotonic())):
                return pickle.loads(pipe.recv_bytes())
            return False, "no answer in time"
        except EOFError:
            return False, f"died with exit code {self._processes[rank].exitcode}"

    def _start(self):
        if self._processes:
            return
        self._started += 1
        context = self._context()
        store = os.path.join(self._folder, f"store{self._started}")
        for rank in range(self._size):
            near, far = context.Pipe()
            arguments = (rank, self._size, self._backend, store, self._seconds, far)
            options = options_of_ranks()
            process = context.Process(target=_start_rank, args=(options, *arguments), daemon=True)
            process.start()
            far.close()
            self._processes.append(process)
            self._pipes.append(near)
        end = time.monotonic() + START_SECONDS
        for rank in range(self._size):
            started, problem = self._answer(rank, self._pipes[rank], end)
            if not started:
                self.stop()
                raise AssertionError(f"rank {rank} did not start: {problem}")

    def _context(self):
        if "nccl" in self._backend:
            return multiprocessing.get_context("spawn")
        return fork_context()

    def stop(self):
        """End all processes: those that wait for a case at once, others by force."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(self._patience)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _start_rank(measuring: dict | None, *arguments):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    with measured_rank(measuring):
        _serve(*arguments)


def _serve(rank: int, size: int, backend: str, store: str, seconds: float, pipe: Connection):
    """Answer that this rank has started, and then each case."""
    import torch
    from torch import distributed

    if "nccl" in backend:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds / 2),
    )  # fmt: skip
    groups = {ranks: distributed.new_group(list(range(ranks))) for ranks in range(2, size)}
    groups[size] = distributed.group.WORLD
    pipe.send_bytes(pickle.dumps((True, "started")))
    while True:
        try:
            case = pipe.recv_bytes()
        except EOFError:
            return
        (module, name), ranks, args = pickle.loads(case)
        try:
            function = getattr(importlib.import_module(module), name)
            answer = True, function(groups[ranks], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
