"""Outputs, gradients and selection of several ranks equal those of one process, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.blocks import num_compressed_blocks
from nsa.testing import make_inputs
from tests.helpers import rank_cases
from tests.helpers.profiles import examples
from tests.helpers.shared_problems import COMMON, check_ranks, cut_problems
from tests.helpers.small_configs import SMALL
from tests.helpers.strategies import Problem, tile_problems, token_problems

CALLS = st.sampled_from([rank_cases.output_and_gradients, rank_cases.separate_calls])
"""One call of the backend for all query segments, or one for each."""


@settings(max_examples=examples(50), **COMMON)
@given(case=cut_problems(), calls=CALLS)
def test_output_and_gradients_equal_one_process(world, case, calls):
    check_ranks(world, *case, case=calls)


STRICT = {"causal": True, "compressed_visibility": "complete"}


@settings(max_examples=examples(20), **COMMON)
@given(case=cut_problems((tile_problems, token_problems), most=300, **STRICT), calls=CALLS)
def test_the_fused_backend_equals_one_process(world, case, calls):
    check_ranks(world, *case, backend="fused", case=calls)


@settings(max_examples=examples(20), **COMMON)
@given(case=cut_problems())
def test_selection_equals_one_process_and_may_be_given(world, case):
    problem, ranks, order = case
    indices = problem.select_blocks(backend="reference")
    results = world.run(rank_cases.selected_blocks, problem, order, "reference", ranks=ranks)
    given = problem._replace(extras=problem.extras | {"block_indices": indices})
    for rank, own in enumerate(results):
        part = rank_cases.own_part(given, ranks, rank, order)
        assert torch.equal(own, part.extras["block_indices"])
    check_ranks(world, given, ranks, order)


@pytest.mark.parametrize("config", SMALL.values(), ids=SMALL)
def test_a_batch_without_sequences(world, config):
    q, k, v = make_inputs((0, 4 * config.q_tile_size), 4, 2, 4, dtype=torch.float64)
    problem = Problem(q, k, v, config, {})
    indices = problem.select_blocks(backend="reference")
    blocks = num_compressed_blocks(q.shape[1], config)
    given = {"compressed_kv": (q.new_empty(0, blocks, 2, 4), q.new_empty(0, blocks, 2, 4))}
    check_ranks(world, problem._replace(extras=given), 2, "head-tail")
    arguments = problem, "head-tail", "reference"
    for own in world.run(rank_cases.selected_blocks, *arguments, ranks=2):
        shape = (0, *indices.shape[1:])
        units = 1 if config.selection == "token" else 2
        assert own.shape == (*shape[:units], shape[units] // 2, *shape[units + 1 :])
    check_ranks(world, problem, 2, "head-tail")
