"""Decoding with a cache on the reference: any split of sequences equals one call."""

import pytest
import torch
from hypothesis import given, settings

import nsa
from tests.helpers.decoding import (
    CLOSE,
    Feed,
    assert_decodes,
    decodable,
    decodings,
    laid_out_rows,
)
from tests.helpers.profiles import examples


@pytest.mark.unmeasured
@settings(max_examples=examples(100))
@given(decodings(decodable()))
def test_steps_equal_the_whole(case):
    assert_decodes(case, "reference")


@settings(max_examples=examples(40))
@given(decodings(decodable()))
def test_steps_with_blocks_of_the_caller(case):
    problem, steps, cache, seed = case
    other = problem._replace(q=problem.q.flip(0))
    indices = other.select_blocks()
    whole = problem.forward(block_indices=indices)
    rows, feed = whole.reshape(-1, *whole.shape[-2:]), Feed(problem, seed)
    for step in steps:
        # Blocks of wrong tokens would have to be made up.
        step = step._replace(
            wrong=[0] * len(step.new), batched=step.batched and not any(step.wrong)
        )
        blocks = laid_out_rows(feed.unit_rows(indices, step), step, problem.config)
        arguments = feed.arguments(step)
        out = nsa.forward(**arguments, block_indices=blocks, cache=cache, backend="reference")
        own, expected = feed.rows(step)
        out = out.reshape(-1, *out.shape[-2:])
        torch.testing.assert_close(out[own], rows[expected], **CLOSE)
        feed.advance(step)
