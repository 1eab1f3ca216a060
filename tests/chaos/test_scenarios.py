"""A short seeded run of each scenario, on real processes: two servers on one Redis."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.cluster import Cluster
from tests.chaos.run import run_scenario
from tests.chaos.scenarios import SCENARIOS, Scenario

SEED = 20_261_124
SHORT = sorted(
    (scenario for scenario in SCENARIOS.values() if scenario.short),
    # After it the others would wait for the engine's new start.
    key=lambda scenario: scenario.name == "engine-kill",
)
TIMEOUT_S = 300
"""Two servers start before the first of them, on a machine that may be busy."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(2).running() as cluster:
        yield cluster


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
def test_short_run(cluster: Cluster, scenario: Scenario) -> None:
    tally, found = run_scenario(cluster, scenario, seed=SEED, count=scenario.short, patient=True)
    assert not found, (found, tally)
