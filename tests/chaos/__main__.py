"""Run scenarios and print the reliability table: ``python -m tests.chaos --seed 7``."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback

from rich.console import Console

from tests.chaos.cluster import Cluster, StoreType
from tests.chaos.report import show
from tests.chaos.run import run_scenario
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.tally import Tally, row


def main() -> int:
    """Parse the arguments, run, print; 1 when something is not as expected."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--scenario", action="append", choices=[*SCENARIOS], help="all, unless given"
    )
    parser.add_argument(
        "--count", type=int, help="faults to inject in each scenario (default: its own long run)"
    )
    parser.add_argument("--strict", action="store_true", help="hold all to their goals")
    options = parser.parse_args()
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, soft_wrap=True)
    rows = []
    failed = False
    with _Clusters() as clusters:
        for name in options.scenario or SCENARIOS:
            scenario = SCENARIOS[name]
            began_s = time.monotonic()
            try:
                tally, found = run_scenario(
                    clusters.get(scenario.store, scenario.arguments),
                    scenario,
                    seed=options.seed,
                    count=options.count or scenario.long,
                    strict=options.strict,
                )
            except Exception as error:
                # One that breaks off is a failure, and no reason to lose the others' lines.
                traceback.print_exception(error)
                tally, found = Tally(), [f"broke off: {type(error).__name__}"]
                clusters.drop()
            failed |= bool(found)
            rows.append(row(name, tally, found))
            taken_s = time.monotonic() - began_s
            console.print(f"{name}: {taken_s:.0f} s, {dict(tally.endings)}", *found, sep="\n  ")
    show(rows)
    return int(failed)


class _Clusters:
    """Keeps the last cluster: the next scenario on the same store need not wait for its start."""

    def __init__(self) -> None:
        self._last: Cluster | None = None
        self._kind: tuple[StoreType, tuple[str, ...]] | None = None

    def __enter__(self) -> _Clusters:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def get(self, store: StoreType, arguments: tuple[str, ...]) -> Cluster:
        """Return a cluster on such a store, of servers with such options."""
        if self._kind != (store, arguments):
            self.drop()
        if self._last is None:
            self._last, self._kind = (
                Cluster(2, store=store, arguments=arguments),
                (store, arguments),
            )
            self._last.start()
        return self._last

    def drop(self) -> None:
        """End what runs."""
        if self._last is not None:
            self._last.stop()
        self._last = self._kind = None


if __name__ == "__main__":
    sys.exit(main())
