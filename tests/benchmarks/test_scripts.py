"""The benchmarks, as far as a CPU can tell: arguments, tables, counts of work, the chart."""

import functools
import importlib
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import bench_distributed
import bench_layer
import bench_positions
import bench_selected
import bench_varlen
import bench_vs_dense
import cold_start
import nsa
import plot_performance
import probe_max_seqlen
import profile_forward
from measuring import environment, layers, shared_keys, tables, variants, work, workloads
from measuring.timing import Timing
from nsa.testing import make_inputs
from tests.helpers.small_configs import tile_config, token_config

GPU_TOOLS = (
    "bench_vs_dense",
    "bench_varlen",
    "profile_forward",
    "probe_max_seqlen",
    "diagnose_memory",
    "cold_start",
)
# These take their shapes in another form, or none.
OTHER_TOOLS = (
    "bench_selected",
    "bench_positions",
    "bench_layer",
    "bench_distributed",
    "model_ranks",
)


@pytest.mark.parametrize("name", GPU_TOOLS)
def test_defaults_are_the_shape_that_all_tools_measure(name):
    options = importlib.import_module(name).parse_arguments([])
    assert workloads.shape_columns(options) == dict(
        selection="tile", heads=32, kv_heads=8, head_dim=128, dtype="bfloat16"
    )
    assert options.csv is None


@pytest.mark.parametrize("name", [*GPU_TOOLS, *OTHER_TOOLS, "plot_performance"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", [*GPU_TOOLS, *OTHER_TOOLS])
def test_without_a_gpu_the_tools_say_so(name):
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        importlib.import_module(name).main([])


def test_shares_of_pieces_add_up():
    runs = bench_positions.make_runs(bench_positions.parse_arguments([]))
    (prefill,), pieces, _, (shared,), (end,) = (cases for _, cases, _ in runs)
    assert (prefill.chunks, shared.chunks) == (8, 4)
    # Half of the time is for keys before the query. Half the length takes a quarter of it, and half
    # of the rest.
    times = (8.0, 3.0)
    assert bench_positions.share(prefill, *times) == pytest.approx(1)
    shares = [bench_positions.share(x, *times) for x in pieces]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares)
    # The last queries have twice the average of the keys before them.
    assert bench_positions.share(end, *times) == pytest.approx(1.5 / 128, rel=0.01)


@pytest.mark.usefixtures("fused_on_cpu")
@pytest.mark.parametrize("config", [token_config(), tile_config()], ids=["token", "tile"])
def test_pieces_that_share_keys_have_the_gradients_of_the_whole(config):
    q, k, v = make_inputs((1, 512), 4, 2, 64, dtype=torch.float64)
    weight, dout = torch.randn(4, 3, 64, dtype=torch.float64), torch.randn_like(q)
    leaves = [x.requires_grad_() for x in (q, k, v, weight)]
    tensors = workloads.Tensors(*leaves, dout, {})
    out = nsa.forward(q, k, v, config=config, gate_proj_weight=weight, backend="reference")
    expected = torch.autograd.grad(out, leaves, dout)
    found = shared_keys.shared_step(tensors, 192, config)()
    for x, wanted in zip(found, (out, *expected), strict=True):
        torch.testing.assert_close(x.double().view_as(wanted), wanted, rtol=0, atol=1e-5)


def test_wrong_lengths_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_varlen.parse_arguments(["--total", "1000", "--longest", "300"])
    assert "--longest must divide --total=1000, got 300" in capsys.readouterr().err


def test_a_table_is_on_disk_after_each_row(tmp_path):
    path = tmp_path / "new" / "table.csv"
    table = tables.Table(path, ("tokens", "note", "ms"))
    table.add(dict(tokens=1, note="a, b", ms=None))
    assert tables.read_rows([path]) == [dict(tokens="1", note="a, b", ms="")]
    table.add(dict(ms="0.5", tokens=2, note=""))
    assert [row["tokens"] for row in tables.read_rows([path, path])] == ["1", "2", "1", "2"]
    with pytest.raises(ValueError, match=r"differ from the table's in \['ms', 'other'\]"):
        table.add(dict(tokens=1, note="", other=2))
    tables.Table(None, ("tokens",)).add(dict(tokens=1))


def test_quantiles_and_ratios():
    assert tables.quantiles([]) is None
    assert tables.quantiles([3.0]) == (3, 3, 3)
    assert tables.quantiles(range(11)) == (2, 5, 8)
    assert tables.ratio_of_medians([4, 9, 8], [2]) == 4
    assert tables.ratio_of_medians([], [2]) is None


def test_crossover():
    assert tables.crossover([(400, 2), (100, 0.5)]) == pytest.approx(200)
    assert tables.crossover([(100, 2), (400, 4)]) is None
    assert tables.crossover([(100, 0.1), (400, 0.4)]) is None
    assert tables.crossover([(100, 0.5), (200, 1)]) == pytest.approx(200)


def test_environment_has_a_value_for_every_column():
    columns = environment.columns()
    assert tuple(columns) == environment.FIELDS
    assert all(columns.values())


def test_commit_of_a_copied_tree_is_given(monkeypatch):
    commit = environment.commit.__wrapped__
    monkeypatch.delenv("NSA_COMMIT", raising=False)
    own = commit()
    monkeypatch.setenv("NSA_COMMIT", "1234567")
    assert commit() == "1234567"
    monkeypatch.setenv("NSA_COMMIT", "")
    assert commit() == own


@pytest.mark.parametrize("groups", [None, 2])
def test_attended_pairs_equal_a_count_of_each(groups):
    config = nsa.NSAConfig(
        compress_block_size=4,
        num_selected_blocks=3,
        window_size=5,
        num_cmp_selected_blocks=groups,
        cmp_group_size=2,
    )
    length = 41
    compressed = selected = window = 0
    for t in range(length):
        blocks = sum(4 * j + 3 <= t for j in range(length))
        compressed += blocks if groups is None else min(blocks, 4)
        selected += min(t + 1, 3 * 4)
        window += sum(t - 5 < s <= t for s in range(length))
    assert work.attended_pairs(length, config) == (compressed, selected, window)
    assert work.dense_pairs(length) == sum(t + 1 for t in range(length))


def test_work_of_a_stage():
    options = bench_vs_dense.parse_arguments([])
    config = nsa.NSAConfig()
    counted = work.stage_work(1024, options, config)
    query, key = (1024 * heads * 128 * 2 for heads in (32, 8))
    # Within a window of 512: 1 + ... + 512 keys, then 512 each.
    pairs = 32 * (512 * 513 // 2 + 512 * 512)
    assert counted["window_attention"] == (2 * query + 2 * key, 4 * 128 * pairs)
    assert counted["window_attention_backward"] == (3 * query + 4 * key, 10 * 128 * pairs)
    many = work.stage_work(65536, options, config)
    assert many["closing_window"].bytes == 64 * (4 * query + 2 * key)
    assert not {"window_attention", "combine_branches"} & many.keys()
    assert counted["compress_pair"].bytes == 2 * (key + key // 64)
    assert work.floor_milliseconds(work.Work(4_200_000_000, 0), 4.2, 770) == (1.0, "bytes")
    assert work.floor_milliseconds(work.Work(0, 770_000_000_000), 4.2, 770) == (1.0, "flops")


def test_lengths_of_packed_sequences():
    many = bench_varlen.mixed_lengths(64, 32768, 262144)
    assert (len(many), sum(many), min(many), max(many)) == (64, 262144, 1, 32768)
    few = bench_varlen.halving_lengths(8, 262144)
    assert (len(few), sum(few)) == (8, 262144)
    assert all(length % 64 for length in few)
    with pytest.raises(ValueError, match="100 tokens are too few for 8"):
        bench_varlen.halving_lengths(8, 100)


def test_rows_of_the_layer():
    options = bench_layer.parse_arguments(["--dims", "1024", "--shapes", "4x4096", "1x16384"])
    rows = list(bench_layer.cases(options))
    # Two shapes, three ways to run; two modes with four forms of input, and the dense twin.
    assert len(rows) == 2 * 3 * (2 * 4 + 1)
    assert all(tuple(row) == bench_layer.FIELDS[: len(row)] for row in rows)
    assert {(row["heads"], row["kv_heads"]) for row in rows} == {(16, 1)}
    with pytest.raises(SystemExit):
        bench_layer.parse_arguments(["--shapes", "4x-1"])
    lengths = [bench_layer.packed_lengths(16384, first) for first in range(7)]
    assert all(sum(x) == 16384 and min(x) >= 0 for x in lengths)
    assert len(set(map(tuple, lengths))) == 7
    assert bench_layer.covered([(0, 3), (1, 2), (5, 6)]) == 4


@pytest.mark.parametrize("side", ["token", "tile", "dense"])
def test_layers_of_a_stack_have_the_same_projections(side):
    stack = layers.Stack(side, 64, 4, 1, 2, False)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    for layer in stack.layers:
        assert [tuple(layer.get_submodule(name).weight.shape) for name in names] == [
            (64, 64), (16, 64), (16, 64), (64, 64)
        ]  # fmt: skip


def test_batches_of_a_training_run():
    batches = list(cold_start.make_batches(4096, 5))
    packed = [(leading[0], lengths) for case, leading, lengths in batches if case == "packed"]
    assert len(packed) == 7
    assert all(sum(lengths) == total for total, lengths in packed)
    assert len({tuple(lengths) for _, lengths in packed}) == 7
    assert [total for total, _ in packed][-3:] == [4096, 832, 257]
    assert [leading for case, leading, _ in batches if case == "batched"][-1] == (2, 511)


@pytest.mark.parametrize(
    ("most", "halvings", "longest", "tried"),
    [
        (5000, 0, 4096, [1024, 2048, 4096, 8192]),
        (5000, 2, 4096, [1024, 2048, 4096, 8192, 6144, 5120]),
        (1000, 3, None, [1024]),
        (10**9, 3, 16384, [1024, 2048, 4096, 8192, 16384]),
    ],
)
def test_search_for_the_longest(most, halvings, longest, tried):
    seen = []

    def fits(length):
        seen.append(length)
        return length <= most

    assert probe_max_seqlen.search(fits, 1024, 16384, halvings) == longest
    assert seen == tried


def test_default_benchmark_fits_ten_minutes():
    options = bench_vs_dense.parse_arguments([])
    configs = bench_vs_dense.make_configs(options)
    assert list(configs) == [None, 16]
    assert 60 < bench_vs_dense.estimate_seconds(options, configs) < 500


def test_kernel_variants_counts_what_compile_functions_hold(monkeypatch):
    own = types.ModuleType("nsa.fused.kernels.fake")
    own.compile_forward = functools.lru_cache(lambda size: size)
    own.compile_forward.__module__ = own.__name__
    own.compile_forward(1), own.compile_forward(2)
    other = types.ModuleType("nsa.fused.kernels.other")
    other.imported = own.compile_forward
    for module in (own, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    counts = variants.kernel_variants()
    assert counts["fake.compile_forward"] == 2
    assert not any(name.startswith("other.") for name in counts)


def dense_rows() -> list[dict]:
    options = bench_vs_dense.parse_arguments([])
    rows = []
    for tokens, dense, ours, graph in ((8192, 1.0, 4.0, [2.0]), (131072, 256.0, 16.0, [])):
        for name in workloads.PASSES:
            for groups in (None, 16):
                sides = Timing([dense], graph and [dense], 1.0), Timing([ours] * 3, graph, 2.0)
                sides += (Timing([0.5 * dense] if graph else []), Timing([1.1 * ours]))
                rows.append(bench_vs_dense.make_row(tokens, name, groups, *sides, options))
    return rows


def varlen_rows() -> list[dict]:
    options, config = bench_varlen.parse_arguments([]), nsa.NSAConfig()
    sides = Timing([12.0], [], 1.0), Timing([10.0], [], 1.0)
    return [
        bench_varlen.make_row(
            "2 of 100 to 156", [100, 156], (2, 128), name, config, *sides, options
        )
        for name in workloads.PASSES
    ]


def write(path: Path, fields: tuple, rows: list[dict]) -> str:
    table = tables.Table(path, fields)
    for row in rows:
        table.add(row)
    return str(path)


def test_rows_and_what_the_terminal_says_of_them():
    rows = dense_rows()
    assert all(set(row) == set(bench_vs_dense.FIELDS) for row in rows)
    assert rows[0]["speedup"] == "0.250"
    assert rows[0]["graph_speedup"] == "0.500"
    assert rows[0]["compiled_speedup"] == "2.000"
    assert rows[-1]["graph_speedup"] is None
    assert rows[-1]["compiled_speedup"] is None
    assert rows[0]["deterministic_ratio"] == "1.100"
    shown = ("0.250x", "0.500x", "2.000x", "deterministic 1.100")
    assert all(x in bench_vs_dense.describe(rows[0]) for x in shown)
    lines = bench_vs_dense.crossovers(rows)
    # 0.25 at 8K and 16 at 128K: a third of the way between them.
    assert "forward, groups 16, eager: faster than dense from 20643 tokens on" in lines
    assert "forward, groups 16, CUDA graphs: no crossover among the lengths measured" in lines
    sides = Timing([1.0]), Timing(note="out of memory"), Timing(note="not captured"), Timing()
    options = bench_vs_dense.parse_arguments([])
    row = bench_vs_dense.make_row(8192, "forward", None, *sides, options)
    assert row["note"] == "nsa: out of memory; compiled: not captured"
    assert "out of memory" in bench_vs_dense.describe(row)

    row = varlen_rows()[0]
    assert set(row) == set(bench_varlen.FIELDS)
    assert row["time_ratio"] == "1.2000"
    assert float(row["pair_ratio"]) < 1.2  # of two unequal lengths one attends more
    assert "1.2000" in bench_varlen.describe(row)


def test_rows_of_the_selected_branch_alone():
    options = bench_selected.parse_arguments(["--shapes", "64/4", "32/8"])
    assert options.shapes == [(64, 4), (32, 8)]
    assert options.indices == ("forced", "random")
    options.heads, options.kv_heads = options.shapes[0]
    config = nsa.NSAConfig.paper()
    timings = dict(nsa=Timing([10.0]), fla=Timing([25.0]))
    row = bench_selected.make_row("forward", "forced", timings, 2.0, 5 * 10**12, config, options)
    assert set(row) == set(bench_selected.FIELDS)
    assert (row["ratio"], row["gib_per_s"], row["blocks"]) == ("2.500", "200", 16)
    assert (row["indices"], row["pass"], row["call"]) == ("forced", "forward", "stage")
    assert (row["block_size"], row["tflops"]) == (64, "500")
    assert "2.500x" in bench_selected.describe(row)
    timings = dict(nsa=Timing([10.0]))
    alone = bench_selected.make_row("forward", "random", timings, 2.0, 1, config, options)
    assert alone["ratio"] is None
    assert "fla - ms" in bench_selected.describe(alone)
    x = torch.ones(2)
    with pytest.raises(AssertionError, match="dq differs by"):
        bench_selected.check_agreement((x, x, x, x), (x, 2 * x, x, x))


@pytest.mark.parametrize("indices", bench_selected.INDICES)
def test_useful_work_of_the_selected_branch(indices, monkeypatch):
    monkeypatch.setattr(workloads, "DEVICE", "cpu")
    options = bench_selected.parse_arguments(["--block-size", "32", "--blocks", "3"])
    config = bench_selected.make_config(indices, options)
    taken = bench_selected.random_blocks(200, 2, config)
    keys = torch.arange(200)
    listed = (taken[0, :, :, :, None] == keys // 32).any(-2)
    expected = int((listed & (keys <= keys[:, None])[:, None]).sum())
    assert bench_selected.attended_pairs(taken, 32) == expected
    if indices == "local":
        assert (taken[0, :, 0] == (keys // 32)[:, None]).any(-1).all()


@pytest.mark.parametrize("forced", [0, 1])
def test_random_blocks_are_distinct_and_causal(forced, monkeypatch):
    monkeypatch.setattr(workloads, "DEVICE", "cpu")
    config = nsa.NSAConfig.paper(
        num_selected_blocks=4,
        select_block_size=32,
        num_initial_blocks=forced,
        num_local_blocks=2 * forced,
    )
    taken = bench_selected.random_blocks(200, 3, config)
    assert taken.shape == (1, 200, 3, 4)
    own = torch.arange(200)[:, None] // 32
    real = taken[0] >= 0
    assert torch.equal(real.sum(-1), (own + 1).clamp(max=4).expand(200, 3))
    assert (taken[0].amax(-1) <= own).all()
    assert (taken[0].diff(dim=-1) > 0)[real[..., 1:]].all()
    paper = [own * 0, (own - 1).clamp(min=0), own]
    has_all = all((taken[0] == block[..., None]).any(-1).all() for block in paper)
    assert has_all == forced


def test_rows_of_a_profile():
    options = profile_forward.parse_arguments(["--backward", "--top-kernels", "1"])
    times = {
        (): (10.0, 5.0),
        ("compress_pair",): (4.0, 1.0),
        ("compress_pair", "mean_forward"): (3.0, 0.5),
        ("compress_pair", "mean_forward", "deeper"): (1.0, 0.1),
        ("select",): (5.0, 2.0),
    }
    calls = dict.fromkeys([path for path in times if path], 2)
    kernels = [("kernel", 7, 3.0), ("other", 3, 1.0)]
    rows = profile_forward.make_rows(8192, times, calls, kernels, nsa.NSAConfig(), options)
    assert all(set(row) == set(profile_forward.FIELDS) for row in rows)
    stages = [row["stage"] for row in rows]
    assert stages == ["compress_pair", "compress_pair/mean_forward", "select", "rest", "total"]
    assert [row["gpu_ms"] for row in rows] == ["4.0000", "3.0000", "5.0000", "1.0000", "10.0000"]
    assert rows[0]["bound"] == "bytes"
    assert rows[-1]["launches"] == 10
    text = profile_forward.describe(rows, kernels, options)
    assert "  mean_forward" in text
    assert "7 x  kernel" in text


def test_chart(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    dense = write(tmp_path / "dense.csv", bench_vs_dense.FIELDS, dense_rows())
    varlen = write(tmp_path / "varlen.csv", bench_varlen.FIELDS, varlen_rows())
    output = tmp_path / "docs" / "performance.svg"
    plot_performance.main([dense, "--varlen", varlen, "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output)
    root = ElementTree.parse(output).getroot()
    texts = ["".join(x.itertext()).strip() for x in root.iter("{http://www.w3.org/2000/svg}text")]
    for label in (
        "dense, forward",
        "dense, forward+backward",
        "nsa, 16 groups, forward+backward",
        "nsa, 2 packed sequences",
        "128K",
    ):
        assert label in texts
    # With the graph the ratio at 8K is 0.5.
    assert "nsa, forward (crosses at 13.9K)" in texts
    assert any(text.startswith("Packed 2 of 100 to 156 beside") for text in texts)
    assert any(environment.host() in text for text in texts)
    before = output.read_bytes()
    plot_performance.main([dense, "--varlen", varlen, "--output", str(output)])
    assert output.read_bytes() == before


def test_a_chart_is_of_one_gpu(tmp_path):
    rows = dense_rows()
    rows[0]["gpu"] = "another"
    mixed = write(tmp_path / "mixed.csv", bench_vs_dense.FIELDS, rows)
    empty = write(tmp_path / "empty.csv", bench_vs_dense.FIELDS, [])
    for path, message in ((mixed, "the tables mix gpu another and"), (empty, "have no rows")):
        with pytest.raises(SystemExit, match=message):
            plot_performance.main([path, "--output", str(tmp_path / "chart.svg")])


def test_time_in_which_only_communication_runs():
    spans = [(0, 4, False), (2, 6, True), (7, 9, True), (8, 10, False)]
    # From 4 to 6 and from 7 to 8, of 10.
    assert bench_distributed.only_communication(spans) == pytest.approx(0.3)
    assert bench_distributed.only_communication([(0, 1, False)]) == 0
