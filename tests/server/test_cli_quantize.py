"""``millrace quantize``: options, words, and the command end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

import server.cli.quantize
import server.cli.serve
from engine import Quantization
from engine.train.quantising.plan import QuantiseSettings
from server.__main__ import app
from server.cli.banner import banner
from server.cli.quantize import QuantizeError, parse_share
from server.dialects.projection import fingerprint
from server.settings import ServerSettings
from server.store import StoreKind
from tests.engine.checkpoints import Shape, make
from tests.engine.tokenizer_files import byte_level
from tests.server.test_cli_serve import TestBanner as BannerTests


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shape = Shape(vocab_size=520, hidden_size=128, num_layers=1, dtype=torch.bfloat16)
    return byte_level(make(tmp_path / "base", shape)[0])


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[QuantiseSettings] = []

    def record(settings: QuantiseSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(server.cli.quantize, "quantize", record)
    result = invoke(
        "quantize", "some/model", "o", "--scheme=int4", "--keep=lm_head, *.0.mlp.*", "--budget=2%",
        "--data=d.jsonl", "--max-tokens=9", "--overwrite", "--num-threads=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen == [
        QuantiseSettings(
            model="some/model",
            out=Path("o"),
            scheme=Quantization.INT4,
            keep=("lm_head", "*.0.mlp.*"),
            budget=0.02,
            data=Path("d.jsonl"),
            max_tokens=9,
            overwrite=True,
            num_threads=2,
        )
    ]


def test_serve_takes_it_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(settings: Any, config: Any) -> int:
        seen.append(config.quantization)
        return 0

    monkeypatch.setattr(server.cli.serve, "serve", record)
    assert invoke("serve", "some/model", "--quantization=int8").exit_code == 0
    assert seen == [Quantization.INT8]


def test_who_asks_can_tell_the_weights_apart(tmp_path: Path) -> None:
    plain = BannerTests.INFO
    made = msgspec.structs.replace(plain, quantization="int4")
    assert fingerprint(made) != fingerprint(plain)
    shown = banner(ServerSettings(page_dir=tmp_path), ("::1", 81), made, StoreKind.REDIS, "h:1")
    assert "10.5M parameters, int4 and bfloat16 on cpu" in shown
    cached = msgspec.structs.replace(made, kv_cache_dtype="fp8")
    assert fingerprint(cached) != fingerprint(made)
    shown = banner(ServerSettings(page_dir=tmp_path), ("::1", 81), cached, StoreKind.REDIS, "h:1")
    assert "int4 and bfloat16 (KV cache fp8) on cpu" in shown


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


def test_no_share() -> None:
    with pytest.raises(QuantizeError, match="'much' is no share"):
        parse_share("much")


def test_the_command(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("quantize", base, out, "--scheme=int8", "--num-threads=1")
    assert result.exit_code == 0, result.output
    assert "7 of 7 in int8" in result.output
    assert "as written" in result.output
    assert f"millrace serve {out}" in result.output
    assert (out / "quantize.json").is_file()
    assert (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme=none"], "scheme is none; it must be fp8, int8 or int4"),
        (["--budget=much"], "'much' is no share"),
        (["--keep=middle"], "no module of this model is called middle"),
        (["--data=no-such.jsonl"], "there is no file no-such.jsonl"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    base: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = invoke("quantize", base, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    *_, line = result.output.strip().splitlines()
    assert line.startswith("millrace: error: ")
    assert words in line
    assert not (tmp_path / "out").exists()
