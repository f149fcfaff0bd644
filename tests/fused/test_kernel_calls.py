"""The functions that call kernels, their emulations and the launchers take the same."""

import inspect
from types import SimpleNamespace

import pytest

from nsa.fused import decode_calls, kernel_calls, kernels
from tests.helpers import (
    emulated_decoding,
    emulated_kernels,
    emulated_plan,
    emulated_token_kernels,
)
from tests.helpers.requirements import import_fused

EMULATIONS = {
    name: module
    for module in (emulated_kernels, emulated_plan, emulated_token_kernels)
    for name in module.NAMES
}
LAUNCHERS = {
    "gated_sum": ("gating_forward", "gating_backward"),
    "few_keys": ("few_key_deltas",),
    "query_gradient": ("query_gradient",),
    "query_sums": ("gradient_of_sums",),
    "rotation": ("rotate",),
    "block_rows": ("gather_blocks", "scatter_blocks"),
    "column_sums": ("activation_gradient", "column_sums"),
    "product": ("split_product", "product_gradient"),
    "means": ("mean_forward", "mean_backward"),
    "sequence_tables": ("sequence_bounds", "plan_tables"),
    "key_block_lists": ("list_key_blocks", "count_query_tiles", "list_query_tiles"),
    "listed_backward": ("listed_backward",),
    "block_sums": ("round_listed_sums",),
    "float_sums": ("round_sums",),
    "importance": ("importance_scores",),
    "selected_forward": ("selected_forward", "closing_forward"),
    "selected_backward": ("selected_backward",),
    "near_block_statistics": ("join_near_blocks",),
    "row_statistics": ("row_statistics",),
    "tile_scores": ("tile_scores",),
    "top_blocks": ("top_blocks", "top_blocks_and_groups"),
}
COMPOSED = ("float32_products",)
"""Functions without a kernel of their own."""


def parameters(function) -> list[tuple]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_each_function_is_emulated_and_has_a_launcher():
    functions = dict(inspect.getmembers(kernel_calls, inspect.isfunction))
    names = {name for name, x in functions.items() if x.__module__.startswith("nsa.")}
    launched = [name for names in LAUNCHERS.values() for name in names]
    assert sorted(names) == sorted([*launched, *COMPOSED])
    assert sorted(EMULATIONS) == sorted(names)


@pytest.mark.parametrize("name", EMULATIONS)
def test_emulations_take_the_same_arguments(name):
    emulation = getattr(EMULATIONS[name], name)
    assert parameters(emulation) == parameters(getattr(kernel_calls, name))


@pytest.mark.parametrize("module", LAUNCHERS)
def test_launchers_take_the_same_arguments(module):
    file = import_fused(f"nsa.fused.kernels.{module}")
    for name in LAUNCHERS[module]:
        assert parameters(getattr(file, name)) == parameters(getattr(kernel_calls, name)), name


@pytest.mark.parametrize("module", LAUNCHERS)
def test_calls_pass_each_argument_by_its_name(module, monkeypatch):
    class Recorder:
        def __getattr__(self, name):
            return lambda **arguments: called.append((name, arguments))

    called = []
    monkeypatch.setattr(kernels, "load", {module: Recorder()}.__getitem__)
    for name in LAUNCHERS[module]:
        function = getattr(kernel_calls, name)
        arguments = {parameter: object() for parameter, _, _ in parameters(function)}
        function(**arguments)
        assert called.pop() == (name, arguments)


@pytest.mark.parametrize("name", emulated_decoding.NAMES)
def test_decoding_takes_the_same_arguments(name, monkeypatch):
    call, emulation = (getattr(x, name) for x in (decode_calls, emulated_decoding))
    assert parameters(emulation) == parameters(call)
    launcher = getattr(import_fused(f"nsa.fused.kernels.{name}"), name)
    assert parameters(launcher) == parameters(call)
    called = []
    file = SimpleNamespace(**{name: lambda **arguments: called.append(arguments)})
    monkeypatch.setattr(kernels, "load", {name: file}.__getitem__)
    arguments = {parameter: object() for parameter, _, _ in parameters(call)}
    call(**arguments)
    assert called == [arguments]


def test_each_function_of_decoding_is_emulated():
    functions = dict(inspect.getmembers(decode_calls, inspect.isfunction))
    names = {name for name, x in functions.items() if x.__module__ == decode_calls.__name__}
    assert names == set(emulated_decoding.NAMES)
