"""The process that measures one part: ``python -m tests.gpu`` starts it, anew after each crash."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tests.gpu.journal import Journal
from tests.gpu.parts import PARTS, run_part
from tests.gpu.setting import Setting, dry_environment


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--until", type=float, required=True, help="seconds since 1970")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--rows", nargs="*", default=[])
    given = parser.parse_args()
    if given.dry:
        os.environ.update(dry_environment())
    setting = Setting.find(dry=given.dry, out=given.out, until_s=given.until)
    journal = Journal(given.out / "rows.jsonl", given.run)
    run_part(given.part, setting, journal, given.rows, given.all)


if __name__ == "__main__":
    main()
