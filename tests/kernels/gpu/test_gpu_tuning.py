"""The tuning tables: the right rule is found, the files are whole, what is written reads back."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest
import torch

from kernels.gpu import tuning
from kernels.gpu.tuning import Config, capability_of, config, rules_of, trying
from kernels.gpu.tuning import __main__ as measuring
from kernels.gpu.tuning.__main__ import CASES, main, render
from kernels.interface import KernelError


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_every_op_has_a_rule_for_every_shape(capability: tuple[int, int]) -> None:
    for op, rules in rules_of(capability).items():
        assert rules[-1].bounds == {}, f"the last rule of {op} must hold for all"
        assert all(rule.bounds for rule in rules[:-1]), f"{op} has rules that cannot be reached"
        for rule in rules:
            sizes = [*rule.config.constants.values(), rule.config.num_warps]
            assert all(size > 0 for size in sizes)
            assert rule.config.num_warps in (1, 2, 4, 8, 16, 32)


def test_the_first_rule_that_holds_is_taken() -> None:
    small, large = (config("rms_norm", (9, 0), H=width) for width in (512, 513))
    assert small is rules_of((9, 0))["rms_norm"][0].config
    assert large is rules_of((9, 0))["rms_norm"][1].config
    assert small.launch == {"ROWS": small["ROWS"], "num_warps": 4, "num_stages": 1}
    with pytest.raises(KernelError, match=r"no tuning rule for nonsense on sm_90 with \{'H': 3\}"):
        config("nonsense", (9, 0), H=3)


def test_other_architectures_get_the_nearest_older_table() -> None:
    assert rules_of((8, 9)) == rules_of((8, 0)) == rules_of((7, 5))
    assert rules_of((12, 0)) == rules_of((9, 0))
    assert capability_of(torch.device("cpu")) == (9, 0)


def test_a_trial_holds_for_its_op_and_its_block_only() -> None:
    trial = Config({"ROWS": 77}, 2, 1)
    with trying("rms_norm", trial):
        assert config("rms_norm", (9, 0), H=64) is trial
        assert config("swiglu", (9, 0), I=64) is not trial
    assert config("rms_norm", (9, 0), H=64) is not trial


def test_a_rule_with_unknown_words_is_refused() -> None:
    with pytest.raises(KernelError, match=r"tuning rule of rms_norm: cannot read \['num_wraps'\]"):
        tuning._rule("rms_norm", {"ROWS": 1, "num_wraps": 4})


def test_what_is_written_reads_back() -> None:
    tables = dict(rules_of((9, 0)))
    read = tomllib.loads(render((9, 0), tables))
    assert {op: tuple(tuning._rule(op, rule) for rule in read[op]) for op in read} == tables


def test_candidates_have_the_constants_of_the_table() -> None:
    for op, case in CASES.items():
        wanted = set(rules_of((9, 0))[op][-1].config.constants)
        candidates = list(case.candidates("a device"))
        assert len(candidates) > 1
        assert {frozenset(one.constants) for one in candidates} == {frozenset(wanted)}


def test_without_a_gpu_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, message in ([], "finds no GPU"), (["nonsense"], "unknown ops: nonsense"):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", CASES)
def test_what_is_measured_runs(
    op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_ROWS", 2)
    case = CASES[op]
    call = case.make(64, device)
    for candidate in list(case.candidates("a device"))[:2]:
        with trying(op, candidate), np.errstate(all="ignore"):
            call()
