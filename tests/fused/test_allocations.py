"""What the stages allocate on a CPU, against what nsa.fused.memory says that they do."""

import weakref
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import nsa
from nsa.boundaries import boundaries_of
from nsa.fused import fa4, kernel_calls, pipeline, selection
from nsa.fused.attention import (
    compressed_attention,
    compressed_attention_backward,
    compressed_lse,
    selected_attention,
    selected_attention_backward,
    window_attention_backward,
)
from nsa.fused.attention.compressed import (
    _key_rows,
    compressed_backward_bytes,
    compressed_forward_bytes,
    compressed_sums_bytes,
)
from nsa.fused.attention.fa4_calls import sparse_sums_bytes
from nsa.fused.attention.selected import selected_backward_bytes, selected_forward_bytes
from nsa.fused.attention.window import window_backward_bytes, window_sums_bytes
from nsa.fused.block_lists import list_bytes
from nsa.fused.call_tensors import Inputs
from nsa.fused.compressed_forms import CompressedForm
from nsa.fused.compression import compress_bytes
from nsa.fused.fa4_call import Call, Sums, sums_bytes
from nsa.fused.fa4_variants import Mask, backward_tile
from nsa.fused.hardware import LOG2_E
from nsa.fused.kernel_inputs import RowStatistics
from nsa.fused.memory import backward_bytes, workspace_bytes
from nsa.fused.planning import make_plan, with_scale
from nsa.fused.schedule import ChunkSchedule, run_forward
from nsa.fused.selection import select_bytes
from nsa.fused.sizes import make_sizes
from nsa.testing import make_cu_seqlens, make_inputs

WHOLE = ChunkSchedule(chunks=1, recompute=False)
LENGTHS = [300, 0, 1, 130, 101]
# The last tokens of longer sequences, or all of theirs.
KEY_LENGTHS = [428, 64, 1, 194, 101]
HEADS, KV_HEADS, DIM = 8, 4, 32
SIZES = dict(
    compress_block_size=16, select_block_size=64, q_tile_size=64, num_selected_blocks=4,
    window_size=100,
)  # fmt: skip
CONFIGS = {
    "tile": nsa.NSAConfig(**SIZES),
    "non-causal": nsa.NSAConfig(**SIZES, causal=False),
    "sparse": nsa.NSAConfig(
        **(SIZES | dict(compress_block_size=1, num_cmp_selected_blocks=2, cmp_group_size=64))
    ),
    "token": nsa.NSAConfig.paper(num_selected_blocks=4, window_size=100),
    "near blocks": nsa.NSAConfig.paper(num_selected_blocks=4, window_size=128),
}
FORMS = ("batch", "pack", "chunks of a batch", "chunks of a pack")
CASES = [(name, form) for name in CONFIGS for form in FORMS]


class Allocations(TorchDispatchMode):
    """Bytes of storages that operations made since this was entered, and their peak.

    The insides of emulated kernels do not count, only their results.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(result, (args, kwargs))
        return result

    def count(self, results, arguments):
        """Count the tensors among ``results`` that are no memory of ``arguments``."""
        known = {_address(x) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and (
                _address(x) in self._views or _address(x) not in known
            ):
                self._hold(x)

    def _hold(self, x: torch.Tensor):
        address, nbytes = _address(x), x.untyped_storage().nbytes()
        if self._views.setdefault(address, 0) == 0:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
        self._views[address] += 1
        weakref.finalize(x, self._release, address, nbytes)

    def _release(self, address: int, nbytes: int):
        self._views[address] -= 1
        if self._views[address] == 0:
            del self._views[address]
            self.live -= nbytes

    def kernel(self, function):
        def call(*args, **kwargs):
            with _disable_current_modes():
                results = function(*args, **kwargs)
            self.count(results, (args, kwargs))
            return results

        return call


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


@pytest.fixture
def allocations(fused_on_cpu, monkeypatch):
    """Counts what a function allocates on the emulated kernels: ``peak, results``."""
    # As for long sequences: product of bfloat16 parts.
    monkeypatch.setattr(selection, "FEW_SCORES", 0)

    def measure(function):
        mode = Allocations()
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            for module in (fa4, kernel_calls):
                for name, value in vars(module).items():
                    if name[0] != "_" and getattr(value, "__module__", "").startswith("tests."):
                        patch.setattr(module, name, mode.kernel(value))
            function()  # Computes the index tensors of the plan, which are kept.
            with mode:
                results = function()
        return mode.peak, results

    return measure


def make_case(name: str, form: str):
    config, kind = CONFIGS[name], (HEADS, KV_HEADS, DIM)
    lengths = KEY_LENGTHS if form.startswith("chunks") else LENGTHS
    packed = form.endswith("pack")
    leading, leading_k = ((1, sum(x)) if packed else (2, x[0]) for x in (LENGTHS, lengths))
    q, _, _ = make_inputs(leading, *kind, dtype=torch.bfloat16)
    _, k, v = make_inputs(leading_k, *kind, dtype=torch.bfloat16)
    bounds = None
    if packed:
        keys = None if lengths is LENGTHS else make_cu_seqlens(lengths)
        bounds = boundaries_of(make_cu_seqlens(LENGTHS), max(lengths), keys)
    plan = make_plan(q, with_scale(config, DIM**-0.5), bounds, num_keys=k.shape[1])
    sizes = make_sizes(q, config, bounds, num_keys=k.shape[1], num_kv_heads=KV_HEADS)
    none = dict.fromkeys(Inputs._fields)
    return Inputs(**(none | dict(q=q, k=k, v=v))), plan, sizes


def result_bytes(sizes, *names: str) -> int:
    shapes = sizes.saved_shapes()
    widths = {"o": sizes.itemsize}
    return sum(prod(shapes[x]) * widths.get(x.split("_")[0], 4) for x in names if x in shapes)


class Stage(NamedTuple):
    """A call, the estimate of what it allocates, and how much of that is inside of kernels.

    ``earlier`` is what it may have allocated and freed before the kernel that allocates so much.
    """

    call: Callable
    estimate: int
    inside: int = 0
    earlier: int = 0


def sums_beyond_rows(sizes, block_size: int, keys: int, copied: bool) -> int:
    """What a sparse backward's sums take beyond what leaving the rows takes after them."""
    unpacked = (0 if sizes.packed else sizes.query_copy) + 2 * sizes.key_bytes(keys) * copied
    return max(0, sparse_sums_bytes(sizes, block_size, keys) - unpacked)


def statistics_of(lse: torch.Tensor) -> RowStatistics:
    """Of a gradient of 0."""
    hidden = lse == -torch.inf
    return RowStatistics((lse * LOG2_E).masked_fill(hidden, torch.inf), torch.zeros_like(lse))


def stages_of(inputs: Inputs, plan, sizes) -> dict[str, Stage]:
    """Each stage of a forward and a backward, on what the stages before it give."""
    q, k, v = inputs[:3]
    k_cmp, v_cmp = pipeline._compressed_pair(inputs, plan)
    q_rows = plan.align_queries(q)
    _, branches, blocks, groups = pipeline.attend(inputs, None, None, plan, combines=False)
    names = ("cmp", "slc", "win")
    douts = {x: torch.randn_like(getattr(branches, f"o_{x}")) for x in names}
    # Of gradients of the outputs of 0.
    lses = [getattr(branches, f"lse_{x}") for x in names]
    statistics = dict(zip(names, map(statistics_of, lses), strict=True))
    lse = compressed_lse(branches.lse_cmp, q, plan) if sizes.token_mode else None
    config, token_mode = sizes.config, sizes.token_mode
    compressed_inside = compressed_sums_bytes(sizes)
    if sizes.form is CompressedForm.LISTED:
        compressed_inside = sums_beyond_rows(sizes, config.cmp_group_size, _key_rows(sizes), True)
    selected_inside = selected_backward_bytes(sizes) - sizes.query - 2 * sizes.key
    if not token_mode:
        copied = sizes.key_copy > 0
        rows = sizes.key_rows
        selected_inside = sums_beyond_rows(sizes, config.select_block_size, rows, copied)

    window_inside = window_sums_bytes(sizes)

    def select():
        if sizes.token_mode:
            return selection.select_blocks(q_rows, k_cmp, lse, plan)
        return pipeline._select_missing(q_rows, k_cmp, None, None, plan)

    def backward(branch, function, *tensors, chosen=()):
        of_branch = (douts[branch] * 0, q, *tensors, statistics[branch])
        return lambda: function(*of_branch, *chosen, plan)

    # Token mode's selected branch allocates in its launchers, which are emulated.
    token_inside = selected_forward_bytes(sizes) if sizes.token_mode else 0
    earlier = max(select_bytes(sizes), compressed_forward_bytes(sizes)) if sizes.token_mode else 0
    return {
        "compress": Stage(lambda: pipeline._compressed_pair(inputs, plan), compress_bytes(sizes)),
        "select": Stage(select, select_bytes(sizes) + sizes.indices),
        "compressed": Stage(
            lambda: compressed_attention(q, q_rows, k_cmp, v_cmp, groups, plan),
            compressed_forward_bytes(sizes) + result_bytes(sizes, "o_cmp", "lse_cmp"),
        ),
        "selected": Stage(
            lambda: selected_attention(q_rows, k, v, blocks, plan),
            selected_forward_bytes(sizes)
            + list_bytes(sizes)
            + result_bytes(sizes, "o_slc", "lse_slc"),
            token_inside,
        ),
        "window backward": Stage(
            backward("win", window_attention_backward, k, v),
            window_backward_bytes(sizes),
            window_inside,
        ),
        "selected backward": Stage(
            backward("slc", selected_attention_backward, k, v, chosen=(blocks,)),
            selected_backward_bytes(sizes),
            selected_inside,
        ),
        "compressed backward": Stage(
            backward("cmp", compressed_attention_backward, k_cmp, v_cmp, chosen=(groups,)),
            compressed_backward_bytes(sizes),
            compressed_inside,
        ),
        "forward": Stage(
            lambda: run_forward(inputs, None, plan, WHOLE, save=False),
            workspace_bytes(sizes, KV_HEADS, save=False, recompute=False) + sizes.query,
            token_inside,
            earlier,
        ),
    }


# An estimate may be above what is allocated, but not by much; nor below, but for index tensors.
SLACK, SPARE, INDEX_TENSORS = 1.05, 0.75, 8 << 10


@pytest.mark.parametrize(("name", "form"), CASES)
def test_stages_allocate_what_is_estimated(name, form, allocations):
    inputs, plan, sizes = make_case(name, form)
    for stage, (call, estimate, inside, earlier) in stages_of(inputs, plan, sizes).items():
        peak, _ = allocations(call)
        most = SLACK * (estimate - inside + earlier) + INDEX_TENSORS
        assert peak <= most, (stage, peak, estimate, inside)
        assert peak >= SPARE * (estimate - inside), (stage, peak, estimate, inside)
        if stage in ("compress", "selected", "window backward"):
            # One copy of the queries more would be noticed.
            assert peak + inputs.q.nbytes > most, stage


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_backward_holds_no_more_than_is_estimated(name, form, allocations):
    """Between and after its branches. Sums inside of kernels are not counted here."""
    inputs, plan, sizes = make_case(name, form)
    _, *results = pipeline.attend(inputs, None, None, plan, combines=False)
    dout = torch.randn_like(inputs.q)
    branches, *blocks = results
    # The list is emptied.
    peak, grads = allocations(lambda: pipeline.backward(dout, inputs, [branches], *blocks, plan))
    assert peak <= SLACK * backward_bytes(sizes) + INDEX_TENSORS
    gradients = sum(x.nbytes for x in grads if x is not None)
    assert gradients == sizes.query + 2 * sizes.key


@pytest.mark.parametrize("sequences", [None, 1, 8, 1000])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4), (128, 2)])
def test_sums_of_fa4_are_what_is_estimated(heads, kv_heads, head_dim, sequences):
    """FA4 gives each packed sequence tiles of its own, so many short ones take much."""
    leading, bounds = (1, 5000), None
    if sequences is not None:
        leading, bounds = (5000,), torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    q, k = (
        torch.empty(*leading, n, head_dim, dtype=torch.bfloat16, device="meta")
        for n in (heads, kv_heads)
    )
    call = Call(q, k, k, 1.0, Mask(causal=True), bounds=(bounds, bounds))
    variant = call.variant(q)
    sums = Sums.new(call, variant, backward_tile(variant))
    allocated = sum(4 * x.numel() for x in sums if x is not None)
    estimate = sums_bytes(heads, kv_heads, head_dim, 5000, 5000, sequences)
    assert 0.45 * estimate <= allocated <= estimate
