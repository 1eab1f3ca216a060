"""Mixed precision by sensitivity, against losses that are made up and against a real model's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Quantization
from engine.errors import ConfigError
from engine.loader import open_checkpoint
from engine.model_config import read_model_config
from engine.tokenizer import Tokenizer
from engine.train.evaluation import perplexity
from engine.train.quantising.plan import QuantiseSettings, Unit, units_of
from engine.train.quantising.run import quantise_checkpoint
from engine.train.quantising.sensitivity import Meter, choose
from engine.train.tuning.dataset import encode_examples
from engine.train.tuning.examples import DataError, read_examples
from engine.train.tuning.loop import heldout_loss
from kernels import Scheme
from tests.engine.checkpoints import Shape, make
from tests.engine.tokenizer_files import byte_level

COSTS = {"a": 0.5, "b": 0.01, "c": 0.2, "d": 0.04, "e": 0.0, "f": -0.01}
UNITS = [Unit(name, {name: (1, 1)}) for name in COSTS]


def additive(units: Sequence[Unit]) -> float:
    return 2 + sum(COSTS[unit.name] for unit in units)


@pytest.mark.parametrize(
    ("max_rise", "kept"),
    [(None, ""), (0.75, ""), (0.3, "a"), (0.25, "a"), (0.1, "ac"), (0.02, "acd"), (1e-9, "acd")],
)
def test_the_most_sensitive_are_kept_and_no_more(max_rise: float | None, kept: str) -> None:
    progress: list[float] = []
    choice = choose(additive, UNITS, max_rise, progress.append)
    assert "".join(unit.name for unit in choice.kept) == kept
    assert [unit.name for unit in choice.units] == [name for name in COSTS if name not in kept]
    assert choice.before == 2
    assert choice.after_all == additive(UNITS)
    assert choice.after == pytest.approx(additive(choice.units))
    assert max_rise is None or choice.after - 2 <= max_rise + 1e-12
    assert progress == sorted(progress)
    if kept:
        assert choice.rises == pytest.approx(COSTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # To a random model any text is a surprise, and rounding may make it a lesser one. This seed's
    # weights are not of that kind.
    shape = Shape(
        vocab_size=520,
        hidden_size=128,
        intermediate_size=128,
        num_layers=2,
        dtype=torch.bfloat16,
        seed=2,
    )
    return byte_level(make(tmp_path_factory.mktemp("base"), shape)[0])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    lines = [{"text": f"the wheel of the mill turns {i}"} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Silent:
    def stage(self, text: str, fraction: float) -> None:
        assert 0 <= fraction <= 1, text


def test_a_budget_is_kept_in_what_is_written(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The perplexities said are those of the directories written, measured anew."""
    monkeypatch.setattr(perplexity, "compute_dtype_of", lambda device: torch.float32)
    common: dict[str, Any] = {"model": str(base), "scheme": Quantization.INT4, "data": text}
    free = quantise_checkpoint(QuantiseSettings(out=tmp_path / "free", **common), Silent())
    assert free.num_quantised == 14
    assert free.perplexity_before is not None
    assert free.perplexity_after == free.perplexity_all
    assert free.perplexity_after is not None
    rise = free.perplexity_after / free.perplexity_before - 1
    assert rise > 0
    tight = QuantiseSettings(out=tmp_path / "tight", budget=rise / 3, **common)
    result = quantise_checkpoint(tight, Silent())
    assert result.kept_for_budget
    assert result.num_quantised < 14
    assert result.perplexity_after is not None
    assert result.perplexity_after <= free.perplexity_before * (1 + rise / 3) * (1 + 1e-9)
    record = json.loads((tmp_path / "tight/quantize.json").read_text())
    assert record["perplexity"]["after"] == result.perplexity_after
    assert len(record["rise_of_loss_by_unit"]) == 8
    for directory, claimed in (("free", free), ("tight", result)):
        assert _perplexity(tmp_path / directory, text) == pytest.approx(
            claimed.perplexity_after, rel=1e-5
        )


def _perplexity(directory: Path, text: Path) -> float:
    tokenizer = Tokenizer.load(directory)
    documents = encode_examples(read_examples(text), tokenizer, max_tokens=16384)
    tokenizer.close()
    return math.exp(heldout_loss(perplexity.load_model(directory, torch.device("cpu")), documents))


def test_the_meter_leaves_no_trace(base: Path, text: Path) -> None:
    tokenizer = Tokenizer.load(base)
    documents = encode_examples(read_examples(text), tokenizer, max_tokens=60)
    tokenizer.close()
    assert sum(len(one) for one in documents) <= 60
    meter = Meter(base, open_checkpoint(base), Scheme.INT4_GROUP, documents)
    units = units_of(read_model_config(base), ())
    before = meter.loss([])
    assert meter.loss(units[:3]) != before
    assert meter.loss(units[2:5]) == meter.loss(units[2:5])
    assert meter.loss([]) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": Quantization.NONE}, "scheme is none"),
        ({"budget": 0.0}, "budget is 0.0; it must be above 0"),
        ({"budget": math.nan}, "budget is nan"),
        ({"budget": 0.1, "measure": False}, "a budget needs the perplexity measured"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ],
)
def test_impossible_settings(changes: dict[str, object], message: str) -> None:
    fields: dict[str, Any] = {"out": Path("o"), "scheme": Quantization.FP8, **changes}
    with pytest.raises(ConfigError, match=message):
        QuantiseSettings(**fields)


def test_text_that_cannot_be_used(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a b c"}\n{"question": 1}\n')
    settings = QuantiseSettings(
        model=str(base), out=tmp_path / "out", scheme=Quantization.FP8, data=path
    )
    with pytest.raises(DataError, match="1 of 2 lines cannot be used"):
        quantise_checkpoint(settings, Silent())
    assert not (tmp_path / "out").exists()
