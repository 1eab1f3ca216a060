"""Show on a GPU what Millrace claims of it, by one command that fits ten minutes.

    python -m tests.gpu --out DIR                         the default rows of all parts but tuning
    python -m tests.gpu --out DIR --only engine serve     of these parts
    python -m tests.gpu --out DIR --rows 'engine/8b-*/decode-*' 'kernels/linear/*'
    python -m tests.gpu --out DIR --only engine --all     rows that take longer, too
    python -m tests.gpu --list                            every row, * before the default ones
    python -m tests.gpu --out DIR --dry                   the same steps on a CPU, tiny

Rows are kept as they are measured, in DIR/rows.jsonl; the same command again goes on after them.
Each part has its share of ``--seconds`` and runs in a process of its own, which is started again
behind a row that breaks it. At the end come tables and one CSV a part. The exit status is 1 if a
check does not hold or was not reached, or if something of ours broke; peers that cannot run only
leave a reason. ``python -m tests.gpu.keep DIR`` keeps the results among those of the project.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.report import commit_name
from tests.gpu.journal import Journal, State
from tests.gpu.parts import PARTS, load_groups, name_of
from tests.gpu.setting import Setting, dry_environment
from tests.gpu.tables import records_of, show, write_csv

__all__ = ["main", "watch"]

SECONDS = 560.0
"""Of ten minutes, with some to write and to end in."""
GRACE_S = 15.0
MOST_CRASHES = 6
"""Of a part; what breaks so often says nothing new."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for what is measured")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[], help="these parts")
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="these rows")
    parser.add_argument("--all", action="store_true", help="rows that take long, too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for all of it")
    parser.add_argument("--dry", action="store_true", help="on a CPU; figures mean nothing")
    parser.add_argument("--commit", default=None, help="what is measured, where git is not there")
    parser.add_argument("--list", action="store_true", help="print the names of all rows")
    given = parser.parse_args(arguments)
    if given.out is None and not given.list:
        parser.error("--out is needed")
    return given


def parts_of(given: argparse.Namespace) -> list[str]:
    """The parts to run, in order."""
    if given.only:
        return [part for part in PARTS if part in given.only]
    if given.rows:
        return [part for part in PARTS if any(row.startswith(f"{part}/") for row in given.rows)]
    return [part for part, about in PARTS.items() if about.share]


def watch(part: str, given: argparse.Namespace, journal: Journal, until_s: float) -> None:
    """Run a part's process until it ends, again behind rows that end it."""
    command = [
        sys.executable, "-m", "tests.gpu.child", part, f"--out={given.out}",
        f"--run={journal.run}", f"--until={until_s}",
    ]  # fmt: skip
    command += [flag for flag in ("--dry", "--all") if getattr(given, flag[2:])]
    command += ["--rows", *given.rows] if given.rows else []
    for _ in range(MOST_CRASHES):
        with (given.out / "log.txt").open("ab") as log:
            # In a group of its own, which ends with it: servers, checkers.
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                ended = _wait(process, journal, until_s + GRACE_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        broken = [name for name, entry in journal.last().items() if entry.state is State.STARTED]
        for name in broken:
            journal.write(name, State.FAILED, reason=ended or f"exit status {process.returncode}")
        if process.returncode == 0 or time.time() > until_s:
            return
        if not broken and process.returncode != 3:
            journal.write(
                f"{part}/start/start", State.FAILED, reason=f"exit status {process.returncode}"
            )
            return


def _wait(process: subprocess.Popen[bytes], journal: Journal, until_s: float) -> str:
    """Wait for its end, or until it must be ended: why."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            return ""
        entries = journal.last().values()
        late = [
            entry
            for entry in entries
            if entry.state is State.STARTED and time.time() > entry.at_s + entry.limit_s
        ]
        if late or time.time() > until_s:
            return f"stopped after {late[-1].limit_s:.0f} s" if late else "stopped: no time left"


def verdict(parts: list[str], journal: Journal) -> list[str]:
    """What is wrong with a run, a line each."""
    last = {name: one for name, one in journal.last().items() if name.split("/")[0] in parts}
    found = [f"{name}: {one.reason}" for name, one in last.items() if one.state is State.FAILED]
    found += [
        f"{name}: this check was not reached"
        for name, one in last.items()
        if name.startswith("checks/") and one.state is State.LEFT_OUT
    ]
    if not any(one.state is State.DONE for one in last.values()):
        found.append("nothing at all was measured")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; gives the exit status."""
    given = parse(arguments)
    if given.dry or given.list:
        os.environ.update(dry_environment())
    if given.list:
        setting = Setting.find(dry=True, out=Path(), until_s=0.0)
        for part in PARTS:
            for group in load_groups(part, setting):
                for row in group.rows:
                    print(("* " if row.default else "  ") + name_of(part, group, row))
        return 0
    started = time.time()
    setting = Setting.find(dry=given.dry, out=given.out, until_s=started + given.seconds)
    given.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(given.out / "rows.jsonl", f"{started:.0f}")
    parts = parts_of(given)
    device, commit = setting.name, given.commit or commit_name()
    print(f"{device}, commit {commit}: {', '.join(parts)}", flush=True)
    for number, part in enumerate(parts):
        # What earlier parts did not need is for the others.
        shares = [PARTS[name].share or 1 for name in parts[number:]]
        until_s = time.time() + setting.left_s * shares[0] / sum(shares)
        watch(part, given, journal, until_s)
        records = records_of(part, journal.last())
        show(part, records, device)
        write_csv(part, records, given.out, device, commit)
    wrong = verdict(parts, journal)
    print(f"{time.time() - started:.0f} s", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
