"""Every bad argument raises before anything runs, and says what it was and what it must be."""

import re

import pytest

import nsa
from tests.helpers import bad_arguments, bad_positions
from tests.helpers.bad_arguments import DV, TILE, TOKEN, batched, packed

CASES = bad_arguments.CASES | {f"positions: {n}": x for n, x in bad_positions.CASES.items()}


def _refuses(function, arguments, error, pattern):
    with pytest.raises(error) as caught:
        function(**arguments)
    assert type(caught.value) is error
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_forward_refuses(case):
    arguments, error, pattern = CASES[case]
    _refuses(nsa.forward, arguments, error, pattern)


@pytest.mark.parametrize("case", [c for c in CASES if "backend" not in c])
def test_explain_backend_refuses_the_same(case):
    arguments, error, pattern = CASES[case]
    _refuses(nsa.explain_backend, arguments, error, pattern)


SELECT_ARGUMENTS = {"q", "k", "config", "compress_k_weight", "compressed_kv", "cu_seqlens"}
SELECT_ARGUMENTS |= {"cu_seqlens_k", "max_seqlen", "max_seqlen_k", "backend"}


def _select_cases():
    for case, (arguments, *_) in CASES.items():
        name = case.split(": ")[1]
        if name.startswith(("v ", "one v", "k and v", "compressed values")):
            continue
        if SELECT_ARGUMENTS | {"v"} >= arguments.keys():
            yield case


@pytest.mark.parametrize("case", list(_select_cases()))
def test_select_blocks_refuses_the_same(case):
    arguments, error, pattern = CASES[case]
    arguments = {name: x for name, x in arguments.items() if name in SELECT_ARGUMENTS}
    _refuses(nsa.select_blocks, arguments, error, pattern)


@pytest.mark.parametrize("config", [TOKEN, TILE], ids=["token", "tile"])
@pytest.mark.parametrize("arguments", [batched, packed])
def test_the_problems_above_are_fine_unchanged(arguments, config):
    arguments = arguments(config=config)
    out = nsa.forward(**arguments)
    assert out.shape == (*arguments["q"].shape[:-1], DV)
    value = arguments.pop("v")
    nsa.forward(**arguments, v=(value,) * 3, block_indices=nsa.select_blocks(**arguments))
