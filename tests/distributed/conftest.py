"""The ranks of the tests in this folder."""

import pytest

from tests.helpers.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    ranks = World(str(tmp_path_factory.mktemp("world")))
    yield ranks
    ranks.stop()
