"""The command for a machine with a GPU, dry: every step of it but for CUDA."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import parts
from tests.gpu.checks_steps import Steps, judge
from tests.gpu.goals import GOALS
from tests.gpu.journal import Journal, State
from tests.gpu.parts import PARTS, Absent, Group, Part, Row, load_groups, name_of, run_part
from tests.gpu.setting import Setting, dry_environment
from tests.gpu.tables import columns_of, records_of

ROOT = Path(__file__).resolve().parents[2]
SLICE = {
    "checks": ["checks/kernels/real-sizes-fp32", "checks/engine-bf16/greedy-graphs",
               "checks/steps/no-waiting"],
    "kernels": ["kernels/roof/*", "kernels/linear/fp8-8b-down-64", "kernels/rows/swiglu-8b-64",
                "kernels/attention/decode-bf16-8b-16x1-of-8192", "kernels/layer/fused-8b-1"],
    "engine": ["engine/8b-bf16/memory", "engine/8b-bf16/decode-1@1024", "engine/8b-bf16/read-2048",
               "engine/8b-transformers/decode-1@1024"],
}  # fmt: skip


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(True, torch.device("cpu"), tmp_path, time.time() + 600)


def read_csv(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["row"]: row for row in csv.DictReader(file)}


@pytest.mark.timeout(300)
def test_a_dry_run_measures_and_checks(tmp_path: Path) -> None:
    names = [name for rows in SLICE.values() for name in rows]
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--dry", f"--out={tmp_path}", "--rows", *names],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, **dry_environment(), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert run.returncode == 0, run.stdout + run.stderr + log
    for part, wanted in SLICE.items():
        rows = read_csv(tmp_path / f"gpu-{part}.csv")
        assert len(rows) == len(wanted)
        assert all("dry" in row["device"] for row in rows.values())
        assert not any(row["why not"] for row in rows.values())
    kernels = read_csv(tmp_path / "gpu-kernels.csv")
    assert "flashinfer" in kernels["attention/decode-bf16-8b-16x1-of-8192"]["flashinfer us"]
    assert float(kernels["linear/fp8-8b-down-64"]["error"]) < 0.06
    engine = read_csv(tmp_path / "gpu-engine.csv")
    assert float(engine["8b-bf16/decode-1@1024"]["times best peer"]) > 0


@pytest.mark.timeout(180)
def test_a_dry_load_through_http(setting: Setting) -> None:
    journal = Journal(setting.out / "rows.jsonl", "1")
    run_part("serve", setting, journal, ["serve/0.6b-bf16/rate-8"], False)
    (record,) = records_of("serve", journal.last())
    assert not record["why not"]
    assert float(record["good_per_s"]) > 0


@pytest.mark.timeout(120)
def test_tuning_goes_on_where_it_was(setting: Setting) -> None:
    journal = Journal(setting.out / "rows.jsonl", "1")
    for op in ("rms_norm", "swiglu"):
        run_part("tuning", setting, journal, [f"tuning/op/{op}"], False)
    text = (setting.out / "sm_90.toml").read_text(encoding="utf-8")
    assert text.count('measured_on = ["dry run"]') == 2


def test_every_row_has_its_own_name_and_every_goal_its_row(setting: Setting) -> None:
    names = [
        name_of(part, group, row)
        for part in PARTS
        for group in load_groups(part, setting)
        for row in group.rows
    ]
    assert len(set(names)) == len(names) > 500
    for goal in GOALS:
        assert {goal.row, goal.over or goal.row} <= set(names)
        assert goal.column in columns_of(goal.row.split("/")[0])


def a_part(monkeypatch: pytest.MonkeyPatch, *rows: Row, **more: Any) -> None:
    module = type("module", (), {"groups": staticmethod(lambda s: [Group("g", rows, **more)])})
    monkeypatch.setitem(sys.modules, "a_part", module)
    monkeypatch.setitem(parts.PARTS, "checks", Part("a_part", ("shown",), 1))


def refuse(_: object) -> dict[str, object]:
    raise Absent("not installed")


def fail(_: object) -> dict[str, object]:
    raise AssertionError("3 is not 4")


def test_what_becomes_of_rows(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def good(subject: object) -> dict[str, object]:
        calls.append(subject)
        return {"shown": "it holds"}

    a_part(
        monkeypatch, Row("good", good), Row("absent", refuse), Row("bad", fail),
        Row("long", good, needs_s=1e6), Row("extra", good, default=False),
    )  # fmt: skip
    for run in ("1", "1", "2"):
        run_part("checks", setting, Journal(setting.out / "rows.jsonl", run), [], False)
    journal = Journal(setting.out / "rows.jsonl", "2")
    states = {name: entry.state for name, entry in journal.last().items()}
    assert states == {
        "checks/g/good": State.DONE,
        "checks/g/absent": State.ABSENT,
        "checks/g/bad": State.FAILED,
        "checks/g/long": State.LEFT_OUT,
    }
    assert calls == [setting], "what is done is not done again"
    planned = journal.path.read_text().splitlines()[:4]
    assert all('"left out"' in line for line in planned), "whatever happens, no row is lost"
    failures = [line for line in journal.path.read_text().splitlines() if '"failed"' in line]
    assert len(failures) == 2, "what failed is tried again by the next run, not by this one"
    wrong = command.verdict(["checks"], journal)
    assert [line.split(":")[0] for line in wrong] == ["checks/g/bad", "checks/g/long"]
    shown = {record["row"]: record["why not"] for record in records_of("checks", journal.last())}
    assert shown["g/absent"] == "absent: not installed"
    assert shown["g/bad"] == "failed: AssertionError: 3 is not 4"


def test_a_group_that_cannot_be_opened_fails_its_rows(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_part(monkeypatch, Row("a", fail), Row("b", fail), open=fail)
    journal = Journal(setting.out / "rows.jsonl", "1")
    run_part("checks", setting, journal, [], False)
    assert [entry.state for entry in journal.last().values()] == [State.FAILED] * 2


def test_what_goes_wrong_with_a_peer_is_no_failure(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_part(monkeypatch, Row("a", fail), is_peer=True)
    journal = Journal(setting.out / "rows.jsonl", "1")
    run_part("checks", setting, journal, [], False)
    (entry,) = journal.last().values()
    assert (entry.state, entry.reason) == (State.ABSENT, "AssertionError: 3 is not 4")


def test_nothing_measured_is_no_success(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl", "1")
    assert command.verdict(["kernels"], journal) == ["nothing at all was measured"]


CHILD = """\
    #!{python}
    import os, sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from tests.gpu.journal import Journal, State
    journal = Journal(Path({out!r}) / "rows.jsonl", "1")
    if "checks/g/a" in journal.last():
        journal.write("checks/g/b", State.DONE, figures={{"shown": "well"}})
    else:
        journal.write("checks/g/a", State.STARTED, limit_s={limit_s})
        {end}
"""


@pytest.mark.parametrize(
    ("limit_s", "end", "reason"),
    [(60, "os.kill(os.getpid(), 9)", "exit status -9"), (0, "time.sleep(60)", "stopped after 0 s")],
)
def test_behind_a_row_that_breaks_the_process_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_s: int, end: str, reason: str
) -> None:
    child = tmp_path / "child"
    text = textwrap.dedent(CHILD).format(
        python=sys.executable, root=str(ROOT), out=str(tmp_path), limit_s=limit_s, end=end
    )
    child.write_text(text)
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    journal = Journal(tmp_path / "rows.jsonl", "1")
    given = command.parse([f"--out={tmp_path}"])
    command.watch("checks", given, journal, time.time() + 60)
    last = journal.last()
    assert (last["checks/g/a"].state, last["checks/g/a"].reason) == (State.FAILED, reason)
    assert last["checks/g/b"].state is State.DONE


def test_a_line_that_was_cut_is_passed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl", "1")
    journal.write("a", State.DONE, figures={"us": 1.5})
    with journal.path.open("a") as file:
        file.write('{"row": "b", "sta')
    assert list(journal.last()) == ["a"]


@pytest.mark.parametrize(
    ("calls", "busy_s", "why"),
    [
        ({"cudaStreamSynchronize": 1}, 0.99, "cudaStreamSynchronize"),
        ({"cudaMemcpy": 3}, 0.99, "cudaMemcpy"),
        ({"Memcpy HtoD (Pageable -> Device)": 1}, 0.99, "Pageable"),
        ({"cudaEventSynchronize": 20}, 0.99, "20 waits"),
        ({}, 0.5, "idle 50.0 %"),
    ],
)
def test_a_profile_in_which_something_waits(calls: dict[str, int], busy_s: float, why: str) -> None:
    usual = {"cudaGraphLaunch": 10, "cudaEventSynchronize": 10, "cudaMemcpyAsync": 10}
    good = Steps(10, Counter(usual), 0.99, 1.0)
    assert "10 waits for an event, device idle 1.0 %" in judge(good)
    with pytest.raises(AssertionError, match=why):
        judge(good._replace(calls=Counter({**usual, **calls}), busy_s=busy_s))
