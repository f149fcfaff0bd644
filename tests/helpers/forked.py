"""Processes that fork from a server, which has imported PyTorch: to import it takes seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ["torch._dynamo", "tests.helpers.rank_cases", "tests.helpers.layer_cases"]


def fork_context() -> ForkServerContext:
    """Its processes fork from one that has imported what ranks need, and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def run_python(
    *command: object, folder: Path, environment: dict | None = None, seconds: float = 400
) -> subprocess.CompletedProcess:
    """What ``python *command`` does, without its start: on a CPU, with one thread.

    Args:
        command: as text: a script, or ``-m`` and a module; and arguments.
        folder: where it runs.
        environment: all of its environment, that of this process without it.
        seconds: after which it is killed, and the call raises.

    Returns:
        As of :func:`subprocess.run`, with text.
    """
    arguments = [str(argument) for argument in command]
    environment = dict(os.environ if environment is None else environment, CUDA_VISIBLE_DEVICES="")
    with tempfile.TemporaryDirectory() as printed:
        paths = [Path(printed, name) for name in ("output", "errors")]
        # No daemon, which may not start processes.
        process = fork_context().Process(target=_run, args=(arguments, folder, environment, *paths))
        process.start()
        try:
            process.join(seconds)
            late = process.exitcode is None
        finally:
            process.kill()
            process.join()
        if late:
            raise subprocess.TimeoutExpired(arguments, seconds, *map(Path.read_text, paths))
        texts = (path.read_text(errors="replace") for path in paths)
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _run(
    arguments: list[str], folder: Path, environment: dict[str, str], output: Path, errors: Path
):
    import torch

    torch.set_num_threads(1)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # Scripts do not find each other's modules.
    sys.path[:] = [path for path in sys.path if Path(path).resolve().parent != ROOT]
    name, *options = arguments
    if name == "-m":
        name, *options = options
        sys.argv = [name, *options]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [name, *options]
        sys.path.insert(0, str(Path(name).parent))
        runpy.run_path(name, run_name="__main__")
