"""Decoding with a cache on the reference: any split of sequences equals one call."""

from hypothesis import given, settings

from tests.helpers.decoding import assert_decodes, decodable, decodings
from tests.helpers.profiles import examples


@settings(max_examples=examples(150))
@given(decodings(decodable()))
def test_steps_equal_the_whole(case):
    assert_decodes(case, "reference")
