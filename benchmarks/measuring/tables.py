"""CSV tables that are written row by row, so that a stopped run keeps its measurements."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path


class Table:
    """A CSV file with a header; nothing is written if ``path`` is None.

    Args:
        path: the file, replaced if it exists.
        fields: the columns.
    """

    def __init__(self, path: Path | None, fields: Sequence[str]):
        self.path = path
        self.fields = tuple(fields)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write("w", self.fields)

    def add(self, row: dict):
        """Write one row; it must have every column and no other.

        Raises:
            ValueError: it does not.
        """
        if set(row) != set(self.fields):
            wrong = sorted(set(row) ^ set(self.fields))
            raise ValueError(f"the row's columns differ from the table's in {wrong}")
        if self.path is not None:
            self._write("a", ["" if row[name] is None else row[name] for name in self.fields])

    def _write(self, mode: str, values: Iterable):
        # The file is closed after each row, so the row is on disk.
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerow(values)


def read_rows(paths: Iterable[Path]) -> list[dict[str, str]]:
    """The rows of some files, in order."""
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def quantiles(series: Sequence[float]) -> tuple[float, float, float] | None:
    """The 20th, 50th and 80th percentile; None for an empty series."""
    if len(series) < 2:
        return (series[0],) * 3 if series else None
    cuts = statistics.quantiles(series, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def quantile_columns(prefix: str, series: Sequence[float]) -> dict[str, str | None]:
    """``{prefix}_p20_ms`` and so on, empty if nothing was measured."""
    values = quantiles(series) or (None, None, None)
    return {
        f"{prefix}_{name}_ms": rounded(value, 4)
        for name, value in zip(("p20", "p50", "p80"), values, strict=True)
    }


def ratio_of_medians(series: Sequence[float], other: Sequence[float]) -> float | None:
    """Median of ``series`` over that of ``other``; None if one is empty."""
    if not series or not other:
        return None
    return statistics.median(series) / statistics.median(other)


def rounded(value: float | None, digits: int) -> str | None:
    """Fixed-point text; None stays None."""
    return None if value is None else f"{value:.{digits}f}"


def crossover(points: Iterable[tuple[float, float]]) -> float | None:
    """The length from which a ratio is at least 1.

    Args:
        points: (length, ratio), in any order. Between points the ratio is taken as a power law.

    Returns:
        The length; None if the ratio does not rise through 1 between two of the points.
    """
    for (low, before), (high, after) in pairwise(sorted(points)):
        if before < 1 <= after:
            share = math.log(1 / before) / math.log(after / before)
            return low * (high / low) ** share
    return None
