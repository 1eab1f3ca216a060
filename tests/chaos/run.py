"""Run one scenario on a cluster and judge it."""

from __future__ import annotations

import asyncio
import dataclasses
import math

from tests.chaos.campaign import Campaign
from tests.chaos.cluster import Cluster
from tests.chaos.scenarios import Scenario
from tests.chaos.tally import Tally, problems

__all__ = ["run_scenario"]


def run_scenario(
    cluster: Cluster,
    scenario: Scenario,
    *,
    seed: int,
    count: int,
    strict: bool = False,
    patient: bool = False,
) -> tuple[Tally, list[str]]:
    """Run one scenario on a started cluster; return its sums and what is not as expected.

    ``patient`` asks for the same endings without a limit of time, for machines that are busy.
    """
    expected = scenario.goal if strict else scenario.expected
    if patient:
        expected = dataclasses.replace(expected, within_s=math.inf, hung_s=math.inf)

    async def run() -> Tally:
        answers = await Campaign.answers(cluster, seed)
        campaign = Campaign(cluster, seed, answers, expected)
        await scenario.run(campaign, count)
        campaign.check_logs()
        return campaign.tally

    tally = asyncio.run(run())
    return tally, problems(tally, expected, least_struck=count)
