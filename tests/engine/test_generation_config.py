"""``generation_config.json``: what the makers advise, read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import SamplingDefaults
from engine.errors import CheckpointError
from engine.generation_config import read_sampling_defaults


def read(directory: Path, **document: object) -> SamplingDefaults:
    (directory / "generation_config.json").write_text(json.dumps(document))
    return read_sampling_defaults(directory)


def test_no_file_advises_nothing(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()


def test_what_is_named_is_read(tmp_path: Path) -> None:
    assert read(
        tmp_path, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0, eos_token_id=3
    ) == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, min_p=0.0)
    assert read(tmp_path, repetition_penalty=1.1) == SamplingDefaults(repetition_penalty=1.1)


def test_no_sampling_is_greedy(tmp_path: Path) -> None:
    assert read(tmp_path, do_sample=False, temperature=0.6) == SamplingDefaults(temperature=0.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "warm"),
        ("temperature", True),
        ("top_k", 1.5),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_what_no_request_could_ask_for_is_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is {value!r}"):
        read(tmp_path, **{name: value})


def test_the_bundled_model_has_its_own(tmp_path: Path) -> None:
    bundled = Path(__file__).parents[2] / "engine" / "assets" / "pebble"
    stated = json.loads((bundled / "generation_config.json").read_bytes())
    defaults = read_sampling_defaults(bundled)
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (
        stated.get("temperature"),
        stated.get("top_k"),
        stated.get("top_p"),
    )
