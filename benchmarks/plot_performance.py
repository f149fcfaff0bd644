"""Draw docs/performance.svg from the tables of bench_vs_dense.py and bench_varlen.py.

    python benchmarks/plot_performance.py dense.csv --varlen varlen.csv

The left plot has the latency of dense attention and of nsa over length, for forward and forward
with backward. If a call was measured with and without a CUDA graph, the faster one counts. The
right plot has dense time over nsa's, so they cross at 1. Packed sequences are marks on the left,
and a line of ratios below. Several tables of one GPU and shape may be given. Among rows with the
same length, pass and setting, the last one counts.
"""

import argparse
import sys
from pathlib import Path

from measuring.tables import crossover, read_rows
from measuring.workloads import PASSES

COLORS = {"dense": "#6b6b6b", "none": "#1f6fb4", "sparse": "#d1603d", "packed": "#2f8f4e"}
STYLES = dict(zip(PASSES, ("--", "-"), strict=True))
# Columns that all rows must share, because a chart shows one shape on one GPU.
SHARED = ("gpu", "selection", "heads", "kv_heads", "head_dim", "dtype")


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    rows = read_rows(options.csv)
    varlen = read_rows(options.varlen)
    problem = find_problem(rows, varlen)
    if problem:
        sys.exit(problem)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, varlen, options.output)
    print(options.output)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv", type=Path, nargs="+", help="of bench_vs_dense.py")
    parser.add_argument("--varlen", type=Path, nargs="*", default=[], help="of bench_varlen.py")
    parser.add_argument("--output", type=Path, default=Path("docs/performance.svg"))
    return parser.parse_args(argv)


def find_problem(rows: list[dict], varlen: list[dict]) -> str | None:
    """Why these rows make no chart, or None."""
    if not rows:
        return "the tables have no rows"
    for name in SHARED:
        seen = sorted({row[name] for row in rows + varlen})
        if len(seen) > 1:
            return f"the tables mix {name} {' and '.join(seen)}; draw them apart"
    return None


def latency(row: dict, side: str) -> float | None:
    """Median milliseconds of "dense" or "nsa", the faster of eager and graph; None if neither."""
    times = [row[f"{side}_p50_ms"], row[f"{side}_graph_p50_ms"]]
    return min((float(x) for x in times if x), default=None)


def curves(rows: list[dict]) -> dict[tuple[str, str], list[tuple[int, float, float]]]:
    """(tokens, dense ms, nsa ms) in order of length, by (pass, cmp_groups)."""
    found = {}
    for row in rows:
        times = latency(row, "dense"), latency(row, "nsa")
        if None not in times:
            key = row["pass"], row["cmp_groups"]
            found.setdefault(key, {})[int(row["tokens"])] = times
    return {
        key: [(tokens, *times) for tokens, times in sorted(points.items())]
        for key, points in found.items()
    }


def draw(rows: list[dict], varlen: list[dict], path: Path):
    """Write the SVG."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text; the same rows give the same file.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "nsa", "font.size": 10}
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.6))
    found = curves(rows)
    for name in PASSES:
        settings = sorted((groups for key, groups in found if key == name), key=_by_density)
        if settings:
            # Dense times are the same in all settings, but one of them may have failed.
            tokens, dense, _ = zip(*max((found[name, g] for g in settings), key=len), strict=True)
            style = dict(color=COLORS["dense"], linestyle=STYLES[name], marker="s", markersize=4)
            left.plot(tokens, dense, label=f"dense, {name}", **style)
        for groups in settings:
            _draw_curve(left, right, name, groups, found[name, groups])
    _draw_packed(left, varlen)
    _finish_axes(left, right, [point[0] for points in found.values() for point in points])
    shape = rows[0]
    title = f"H={shape['heads']}, H_kv={shape['kv_heads']}, D={shape['head_dim']}, {shape['dtype']}"
    figure.suptitle(f"Native Sparse Attention beside FlashAttention-4 dense causal: {title}")
    lines = [*varlen_lines(varlen), footer(rows)]
    bottom = 0.06 + 0.033 * len(lines)
    for i, line in enumerate(reversed(lines)):
        color = "#6b6b6b" if i == 0 else "black"
        figure.text(0.01, 0.015 + 0.033 * i, line, fontsize=8 if i == 0 else 9, color=color)
    figure.tight_layout(rect=(0, bottom - 0.04, 1, 1))
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _draw_curve(left, right, name: str, groups: str, points: list[tuple[int, float, float]]):
    tokens, dense, ours = zip(*points, strict=True)
    label = f"nsa, {name}" if groups == "none" else f"nsa, {groups} groups, {name}"
    color = COLORS["none" if groups == "none" else "sparse"]
    style = dict(color=color, linestyle=STYLES[name], marker="o", markersize=4)
    left.plot(tokens, ours, label=label, **style)
    ratios = [x / y for x, y in zip(dense, ours, strict=True)]
    length = crossover(zip(tokens, ratios, strict=True))
    if length is not None:
        label += f" (crosses at {_tokens(length)})"
    right.plot(tokens, ratios, label=label, **style)
    right.annotate(
        f"{ratios[-1]:.1f}x", (tokens[-1], ratios[-1]), xytext=(4, 0), textcoords="offset points",
        color=color, fontsize=8, va="center", annotation_clip=False,
    )  # fmt: skip


def _by_density(groups: str) -> float:
    """The dense compressed branch first."""
    return float("-inf") if groups == "none" else int(groups)


def _draw_packed(axes, varlen: list[dict]):
    """A mark for each case and pass, at its number of tokens; see also the lines below."""
    markers = iter("D^vP*X")
    for case, sequences in dict.fromkeys((row["case"], row["sequences"]) for row in varlen):
        times = {
            row["pass"]: (int(row["tokens"]), float(row["packed_p50_ms"]))
            for row in varlen
            if row["case"] == case and row["packed_p50_ms"]
        }
        if times:
            label = f"nsa, {sequences} packed sequences"
            style = dict(color=COLORS["packed"], marker=next(markers), linestyle="none")
            axes.plot(*zip(*times.values(), strict=True), label=label, **style)


def _finish_axes(left, right, lengths: list[int]):
    ticks = sorted(set(lengths))
    for axes, title, ylabel in (
        (left, "Latency", "milliseconds"),
        (right, "Speedup", "dense time / nsa time"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel, title=title)
        axes.set_xticks(ticks, [_tokens(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    right.axhline(1, color=COLORS["dense"], linewidth=1)
    # Room for the numbers at the ends of the curves.
    right.set_xlim(right=ticks[-1] * (ticks[-1] / ticks[0]) ** 0.12)
    low, high = right.get_ylim()
    powers = [2.0**i for i in range(-6, 12) if low <= 2.0**i <= high]
    right.set_yticks(powers, [f"{power:g}x" for power in powers])


def _tokens(count: float) -> str:
    """16384 as "16K", 1048576 as "1M"."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def varlen_lines(varlen: list[dict]) -> list[str]:
    """One line for each packed case and baseline: the time per pair of both passes."""
    pairs = {}
    for row in varlen:
        if row["pair_ratio"]:
            key = row["case"], f"{row['batch']} x {_tokens(int(row['length']))}"
            pairs.setdefault(key, {})[row["pass"]] = row
    lines = []
    for (case, baseline), rows in pairs.items():
        ratios = ", ".join(
            f"{name} {float(rows[name]['pair_ratio']):.2f} ({float(rows[name]['time_ratio']):.2f} "
            "in time)"
            for name in PASSES
            if name in rows
        )
        lines.append(f"Packed {case} beside a batch of {baseline}, time per attended key: {ratios}")
    return lines


def footer(rows: list[dict]) -> str:
    """Where and when: GPU, host, versions, commits and dates of the rows."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))

    dates = ", ".join(dict.fromkeys(row["time"][:10] for row in rows))
    return (
        f"{values('gpu')}; host {values('host')}; PyTorch {values('torch')}, flash-attn-4 "
        f"{values('flash_attn_4')}, cutlass-dsl {values('cutlass_dsl')}; nsa "
        f"{values('nsa_commit')}; {dates}"
    )


if __name__ == "__main__":
    main()
