"""Where coverage is measured: measured Python, all of torch's included, is up to twice as slow.

So what is measured of the cases of a test, unless it is marked ``unmeasured``, are the first ones,
until they have taken half a second; and the ranks of :mod:`tests.helpers.world`. Other cases of a
test reach the same lines, but where they are many errors, which are fast.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

SECONDS = 0.5
"""CPU time in which the cases of a test are measured."""

_spent: Counter = Counter()


@contextmanager
def measured(item: pytest.Item) -> Iterator[None]:
    """Run a test, measured or not."""
    test = item.nodeid.partition("[")[0]
    tracer, start = sys.gettrace(), time.process_time()
    chosen = item.get_closest_marker("unmeasured") is None and _spent[test] < SECONDS
    if tracer is None or chosen:
        yield
        _spent[test] += time.process_time() - start
        return
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
