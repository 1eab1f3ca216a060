"""Keep what was measured on a GPU: ``python -m tests.gpu.keep DIR [DIR ...]``.

The CSVs of the folders, a later one's rows over an earlier one's, go into ``tests/bench/results``
with a chart of them, and the README's tables are made anew. Figures of a dry run are refused, and
so are those of different devices. Without a folder only chart and README are made.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import RESULTS
from tests.gpu.goals import GOALS
from tests.gpu.parts import PARTS

__all__ = ["BEGIN", "END", "README", "NotKept", "keep", "kept_rows", "with_gpu_tables"]

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
CHART = "gpu.svg"
Rows = dict[str, dict[str, str]]
"""``part/group/row`` -> column -> text."""
NOTHING = (
    "Nothing was measured on a GPU yet. `make gpu` measures on one, in ten minutes: the kernels "
    "beside\ntorch's, the engine beside transformers, the server under open-loop load, and the "
    "checks that need CUDA."
)


class NotKept(Exception):
    """These figures must not be among the results; the message says why."""


def read_rows(folder: Path) -> Rows:
    """All rows of a folder's CSVs."""
    rows: Rows = {}
    for part in PARTS:
        path = folder / f"gpu-{part}.csv"
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows |= {f"{part}/{row['row']}": row for row in csv.DictReader(file)}
    return rows


def kept_rows() -> Rows:
    """The results."""
    return read_rows(RESULTS)


def keep(folders: list[Path], results: Path = RESULTS) -> None:
    """Put the rows of these folders among the results.

    Raises NotKept if they hold none, come from a dry run, or from several devices.
    """
    rows: Rows = {}
    devices: set[str] = set()
    for folder in folders:
        found = read_rows(folder)
        if not found:
            raise NotKept(f"{folder} holds no gpu-*.csv with rows")
        devices |= {row["device"] for row in found.values()}
        # A row that was measured is not replaced by the reason why it was not, another time.
        rows |= {name: row for name, row in found.items() if name not in rows or not row["why not"]}
    if any("dry" in device or "GiB" not in device for device in devices):
        raise NotKept("these figures are of a dry run and mean nothing")
    if len(devices) > 1:
        raise NotKept(f"these figures are of several devices: {', '.join(sorted(devices))}")
    results.mkdir(exist_ok=True)
    for part in PARTS:
        mine = [row for name, row in rows.items() if name.startswith(f"{part}/")]
        if mine:
            columns = list(dict.fromkeys(column for row in mine for column in row))
            with (results / f"gpu-{part}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(mine)


def with_gpu_tables(text: str, rows: Rows) -> str:
    """The README's text with what is known of GPUs between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    lines = list(_tables(rows)) if rows else [NOTHING]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def _tables(rows: Rows) -> Iterator[str]:
    any_row = next(iter(rows.values()))
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    yield f"On one {any_row['device']} ({any_row['date']}, commit {commits}); goals are of an H200:"
    yield ""
    yield "| | goal | measured | |"
    yield "|---|---:|---:|---|"
    for goal in GOALS:
        value = goal.measured(rows)
        if value is None:
            yield f"| {goal.about} | {goal.wanted} | not measured | |"
        else:
            met = "met" if goal.is_met(value) else "missed"
            yield f"| {goal.about} | {goal.wanted} | {value:,.3g}{goal.unit} | {met} |"
    checks = [(name, row) for name, row in rows.items() if name.startswith("checks/")]
    if checks:
        yield ""
        yield "| check | |"
        yield "|---|---|"
        for name, row in checks:
            yield f"| {name.removeprefix('checks/')} | {row['shown'] or row['why not']} |"
    yield ""
    yield f"![Kernels and engine](tests/bench/results/{CHART})"


def draw(rows: Rows, path: Path) -> None:
    """Bars of the kernels' shares of the roofline, and of the engine's tokens a second."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "millrace"  # the same figures make the same file
    from matplotlib import pyplot as plt

    panels = [("kernels", "share", "share of the measured roofline"),
              ("engine", "tokens_per_s", "tokens a second")]  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(16, 12))
    for axis, (part, column, title) in zip(axes, panels, strict=True):
        bars = {
            name.partition("/")[2]: float(row[column])
            for name, row in rows.items()
            if name.startswith(f"{part}/") and row.get(column)
        }
        axis.barh(list(bars), list(bars.values()), color="#3b6ea5")
        axis.invert_yaxis()
        axis.set_title(title)
        axis.tick_params(labelsize=7)
        if part == "engine":
            axis.set_xscale("log")
        else:
            axis.axvline(1.0, color="#999999", linewidth=1)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Keep, draw, write."""
    try:
        if arguments:
            keep([Path(name) for name in arguments])
    except NotKept as error:
        print(f"Not kept: {error}", file=sys.stderr)
        return 1
    rows = kept_rows()
    if rows:
        draw(rows, RESULTS / CHART)
    README.write_text(with_gpu_tables(README.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
