"""How many examples property tests try, and which seed those on a GPU use.

HYPOTHESIS_PROFILE names the profile. "ci" (the default) tries the same examples in each run;
"thorough" tries about 17 times as many, and new ones in each run. NSA_SEED is the seed of the GPU
property tests, any text; without it each run has a new seed.
"""

import os
import secrets
from collections.abc import Callable

from hypothesis import HealthCheck, seed, settings

SEED = "NSA_SEED"

_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", derandomize=True, max_examples=60, **_COMMON)
settings.register_profile("thorough", derandomize=False, max_examples=1000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

WITH_FIXTURES = {"deadline": None, "suppress_health_check": list(HealthCheck)}
"""Settings of property tests whose fixtures replace functions: the same ones in each example."""


def examples(count: int) -> int:
    """``max_examples`` in the current profile, of a test that tries ``count`` in "ci"."""
    return count * settings().max_examples // settings.get_profile("ci").max_examples


def choose_seed() -> None:
    """Choose this run's seed, unless the environment names one.

    The seed is put into the environment, which the workers of pytest-xdist inherit.
    """
    if not os.environ.get(SEED):
        os.environ[SEED] = str(secrets.randbelow(2**32))


def seed_line() -> str:
    """The variable to set to draw the examples of this run again."""
    return f"{SEED}={os.environ[SEED]}"


def gpu_property(name: str, count: int) -> Callable:
    """Decorate a Hypothesis test that runs on a GPU, so that it draws from the run's seed.

    Args:
        name: names the test and its parameters, so that each draws its own examples.
        count: examples to try in the profile "ci".
    """
    chosen = settings(
        max_examples=examples(count),
        derandomize=False,
        # A database would try failures of earlier runs before the seed's examples.
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(f"{os.environ[SEED]} {name}")(chosen(test))
