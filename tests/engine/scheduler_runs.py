"""Very many random runs of the scheduler on tiny pools: ``python -m tests.engine.scheduler_runs``.

Each is a world of its own (``scheduler_world``), checked after every step: a stall, a wrong answer,
a block that is left, or books that do not agree end the run with its seed.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.progress import track

from tests.chaos.report import show
from tests.engine.mutants import load_modules
from tests.engine.scheduler_world import drive, random_settings


def main() -> int:
    """Run ``--count`` worlds from ``--seed`` on; print and keep the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.engine.scheduler_runs", description=__doc__
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100_000)
    options = parser.parse_args()
    modules = load_modules()
    began_s = time.monotonic()
    answers = preemptions = deaths = 0
    failure = ""
    runs = range(options.seed, options.seed + options.count)
    for done, seed in enumerate(track(runs, description="worlds"), start=1):  # noqa: B007
        try:
            world = drive(random_settings(seed), modules, seed)
        except AssertionError as error:
            failure = f"seed {seed}: {error}"
            break
        answers += len(world.done)
        preemptions += world.total("preemptions")
        deaths += world.deaths
    row = {
        "what": "scheduler on a tiny pool",
        "runs": done,
        "answers": answers,
        "preemptions": preemptions,
        "engine deaths": deaths,
        "minutes": f"{(time.monotonic() - began_s) / 60:.1f}",
        "verdict": failure or "ok",
    }
    show([row], "scheduler")
    return int(bool(failure))


if __name__ == "__main__":
    sys.exit(main())
