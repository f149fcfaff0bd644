"""Where coverage is measured: measured Python, all of torch's included, is up to twice as slow.

So what is measured of the cases of a test, unless it is marked ``unmeasured``, are the first ones,
until they have taken half a second; and the ranks of :mod:`tests.helpers.world`. Other cases of a
test reach the same lines, but where they are many errors, which are fast. Of imports, those of the
package are measured.
"""

import importlib
import pkgutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

SECONDS = 0.5
"""CPU time in which the cases of a test are measured."""

_spent: Counter = Counter()


IMPORTED_FIRST = ("torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils")
"""What the package imports and takes long."""


def import_package() -> None:
    """Import the modules of ``nsa`` that can be imported here, but for kernels, if measured."""
    if sys.gettrace() is None:
        return
    with warnings.catch_warnings():
        # Some packages warn about themselves.
        warnings.simplefilter("ignore")
        with paused():
            _import(*IMPORTED_FIRST)
        package = importlib.import_module("nsa")
        for module in pkgutil.walk_packages(package.__path__, "nsa."):
            if not module.name.startswith("nsa.fused.kernels"):
                _import(module.name)


def _import(*names: str) -> None:
    for name in names:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)


@contextmanager
def measured(item: pytest.Item) -> Iterator[None]:
    """Run a test, measured or not."""
    test, start = item.nodeid.partition("[")[0], time.process_time()
    if item.get_closest_marker("unmeasured") is None and _spent[test] < SECONDS:
        yield
        _spent[test] += time.process_time() - start
        return
    with paused():
        yield


@contextmanager
def paused() -> Iterator[None]:
    """Measure nothing for a time."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
        # A tracer of coverage.py is its fast self again, which also sees this function's return,
        # after the next call.
        _call()


def _call() -> None:
    pass


def options_of_ranks() -> dict | None:
    """The options of ``coverage.Coverage`` in a process to measure, None where nothing is."""
    coverage = sys.modules.get("coverage")
    current = None if coverage is None else coverage.Coverage.current()
    if current is None:
        return None
    config = current.config
    return dict(config_file=config.config_file, data_file=config.data_file, data_suffix=True)


@contextmanager
def measured_rank(options: dict | None) -> Iterator[None]:
    """Measure this process with ``options_of_ranks()`` of the one that started it."""
    if options is None:
        yield
        return
    from coverage import Coverage

    coverage = Coverage(**options)
    coverage.start()
    try:
        yield
    finally:
        coverage.stop()
        coverage.save()
