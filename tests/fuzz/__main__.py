"""Fuzz a server for long: ``python -m tests.fuzz --requests 10000 --frames 10000``."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.chaos.report import show
from tests.fuzz.fuzzing import GROWTH, Outcome, fuzz, serve_fuzzed, throw_frames, throw_request
from tests.fuzz.openapi import run_schemathesis


def main() -> int:
    """Parse the arguments, run, print; 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--schemathesis", type=int, default=60, help="seconds; 0: not at all")
    options = parser.parse_args()
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, soft_wrap=True)
    rows = []
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        server = serve_fuzzed(Path(folder))
        try:
            for name, throw, count in (
                ("requests", throw_request, options.requests),
                ("frames", throw_frames, options.frames),
            ):
                began_s = time.monotonic()
                outcome = asyncio.run(fuzz(server, throw, seed=options.seed, count=count))
                if outcome.growth > GROWTH:
                    outcome.bad.append(f"memory grew by {100 * outcome.growth:.1f} %")
                console.print(f"{name}: {time.monotonic() - began_s:.0f} s", *outcome.bad, sep="\n")
                failed |= bool(outcome.bad)
                rows.append(_row(name, outcome))
            if options.schemathesis:
                run = run_schemathesis(server, seed=options.seed, seconds=options.schemathesis)
                console.print(run.output[-6000:])
                failed |= not run.passed
        finally:
            server.stop()
    show(rows, "fuzz")
    return int(failed)


def _row(name: str, outcome: Outcome) -> dict[str, object]:
    statuses = outcome.statuses
    return {
        "inputs": name,
        "sent": outcome.sent,
        "accepted": sum(number for status, number in statuses.items() if status < 300),
        "refused": sum(number for status, number in statuses.items() if 400 <= status < 500),
        "5xx": sum(number for status, number in statuses.items() if status >= 500),
        "memory": f"{100 * outcome.growth:+.1f} %",
        "verdict": "failed" if outcome.bad else "ok",
    }


if __name__ == "__main__":
    sys.exit(main())
