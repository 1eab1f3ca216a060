"""Try the client libraries against one running server: ``make clients``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.report import WIDTH, commit_name
from tests.clients.libraries import CASES, LIBRARIES, ROOT, Library
from tests.clients.matrix import HEADINGS, RESULTS, Row, keep, table
from tests.clients.worker import Worker
from tests.e2e.live import LiveServer

MODEL = "pebble"
KEY = "key-of-the-client-tests"
LOGS = ROOT / "build/clients"
ENDED = "millrace_turns_total{{dialect={},status=cancelled}}"
ABORTED = "millrace_aborted_sequences_total"


def main() -> int:
    """Parse the arguments, run, print; 1 when a case fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument(
        "--library", action="append", choices=[one.name for one in LIBRARIES], help="default: all"
    )
    options = parser.parse_args()
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True, soft_wrap=True)
    chosen = [one for one in LIBRARIES if one.name in (options.library or (one.name,))]
    for library in chosen:
        if not library.is_installed:
            console.print(f"{library.name} is not installed: run `make clients`")
            return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.touch(mode=0o600)
        keys.write_text(KEY)
        server = LiveServer(["--kv-memory", "256MiB", "--api-key-file", str(keys)])
        try:
            rows = [row for library in chosen for row in _run(server, library, console)]
        finally:
            server.stop()
    keep(rows)
    _show(rows)
    return int(any(row["verdict"] == "fail" for row in rows))


def _run(server: LiveServer, library: Library, console: Console) -> Iterator[Row]:
    log = LOGS / f"{'-'.join(library.worker)}.log"
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit_name(), "library": library.name}
    with Worker(library, f"{server.url}/v1", KEY, MODEL, log) as worker:
        for api in library.apis:
            for case in CASES:
                verdict, note = _try(server, worker, api, case)
                if verdict == "fail":
                    console.print(f"{library.name}, {api}, {case}: {note}", markup=False)
                if verdict != "none":
                    yield {
                        **stamp,
                        "version": worker.version,
                        "api": api,
                        "case": case,
                        "verdict": verdict,
                        "note": " ".join(note.split()),
                    }


def _try(server: LiveServer, worker: Worker, api: str, case: str) -> tuple[str, str]:
    """Run a case, and look at what it left in the server."""
    printed = len(server.log)
    before = server.idle_metrics()
    verdict, note = worker.run(api, case)
    try:
        server.assert_clean(printed)
        if case == "cancel" and verdict == "ok":
            after = server.idle_metrics()
            ended = ENDED.format("responses" if api == "websocket" else api)
            for name in (ended, ABORTED):
                assert after[name] == before.get(name, 0) + 1, f"{name} did not rise by one"
    except AssertionError as error:
        return "fail", str(error)
    return verdict, note


def _show(rows: list[Row]) -> None:
    shown = Table(title="client libraries", title_justify="left")
    for heading in ("library", "API", *HEADINGS):
        shown.add_column(heading)
    for line in table(rows):
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(shown)
    console.print(f"kept, case by case, in {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
