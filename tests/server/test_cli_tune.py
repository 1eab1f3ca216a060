"""``millrace tune`` and ``millrace train``: options, words, and the command end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3ForCausalLM
from typer.testing import CliRunner

import server.cli.serve
import server.cli.train
import server.cli.tune
from engine import EngineConfig
from engine.train.tuning.plan import Method, TuneSettings
from server.__main__ import app
from server.cli.tune import default_out
from server.settings import ServerSettings
from tests.engine.checkpoints import Shape, make
from tests.engine.tokenizer_files import byte_level


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory, _ = make(tmp_path / "base", Shape(vocab_size=520))
    return byte_level(directory)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"ask {i}", "completion": f"the answer is {i % 3}"} for i in range(20)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TuneSettings] = []

    def record(settings: TuneSettings) -> int:
        seen.append(settings)
        return 0

    monkeypatch.setattr(server.cli.tune, "tune", record)
    result = invoke(
        "tune", "some/model", "d/data.jsonl", "--out=o", "--method=lora", "--keep-adapter",
        "--epochs=2.5", "--learning-rate=1e-4", "--batch-tokens=99", "--max-len=77", "--rank=4",
        "--alpha=3", "--rslora", "--target-modules=q_proj, v_proj", "--patience=5", "--skip-bad",
        "--overwrite", "--seed=9", "--device=cpu", "--num-threads=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert seen == [
        TuneSettings(
            data=Path("d/data.jsonl"),
            out=Path("o"),
            model="some/model",
            method=Method.LORA,
            keep_adapter=True,
            epochs=2.5,
            learning_rate=1e-4,
            batch_tokens=99,
            max_len=77,
            rank=4,
            alpha=3.0,
            rslora=True,
            target_modules=("q_proj", "v_proj"),
            patience=5,
            skip_bad=True,
            overwrite=True,
            seed=9,
            device="cpu",
            num_threads=2,
        )
    ]


@pytest.mark.parametrize(
    ("data", "model", "out"),
    [
        ("d/me.jsonl", "pebble", "d/me-pebble"),
        ("me.jsonl.xz", "Qwen/Qwen3-0.6B@main", "me-Qwen3-0.6B"),
        ("/a/me.jsonl.gz", "/models/own/", "/a/me-own"),
    ],
)
def test_output_lies_beside_the_data(data: str, model: str, out: str) -> None:
    assert default_out(Path(data), model) == Path(out)


def test_bad_lines_are_shown_before_any_model_is_loaded(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"messages": [}\n{"text": ""}\n')
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    result = invoke("tune", base, path)
    assert result.exit_code == 2
    assert f"{path}:2: not JSON" in result.output
    assert f"{path}:3: text is ''" in result.output
    assert "millrace: error: 2 of 3 lines cannot be used" in result.output
    assert not (tmp_path / "data-base").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-file.jsonl"], "there is no file no-such-file.jsonl"),
        (["{data}", "--rank=0"], "rank is 0; it must be at least 1"),
        (["{data}", "--target-modules=head"], "target modules are head"),
        (["{data}", "--method=full", "--keep-adapter"], "full fine-tuning makes no adapter"),
        (["{data}", "--out={base}"], "is there already"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    base: Path, data: Path, arguments: list[str], words: str
) -> None:
    result = invoke("tune", base, *(one.format(data=data, base=base) for one in arguments))
    assert result.exit_code == 2
    (line,) = result.output.strip().splitlines()
    assert line.startswith("millrace: error: ")
    assert words in line


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "server", *(str(one) for one in arguments)]


def test_the_command_makes_a_model_that_loads(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "data-base"
    result = subprocess.run(
        command("tune", base, data, "--epochs=4", "--learning-rate=3e-3"),
        capture_output=True, text=True, timeout=55, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for words in ("16 to learn from, 4 held out", "LoRA of rank 16", "held-out loss", "done after"):
        assert words in result.stdout
    assert f"millrace serve {out}" in result.stdout
    Qwen3ForCausalLM.from_pretrained(out)
    again = invoke("tune", base, data)
    assert (again.exit_code, "--overwrite" in again.output) == (2, True)


def test_interrupted_command_keeps_the_best(base: Path, data: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("tune", base, data, "--epochs=100000", "--patience=100000", "--keep-adapter"),
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            if line.startswith("step") and "held out" in line and not lines:
                process.send_signal(signal.SIGINT)
                lines.append(line)
            elif lines:
                lines.append(line)
    assert process.returncode == 0
    assert "stopped after" in "".join(lines)
    assert "--adapter" in lines[-1]
    names = {path.name for path in (tmp_path / "data-base").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tune.json"}


def test_serve_hands_the_adapter_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str | None] = []

    def record(settings: ServerSettings, config: EngineConfig) -> int:
        seen.append(config.adapter)
        return 0

    monkeypatch.setattr(server.cli.serve, "serve", record)
    monkeypatch.chdir(tmp_path)
    assert invoke("serve", "--adapter", "mine").exit_code == 0
    assert invoke("serve").exit_code == 0
    assert seen == [str(tmp_path / "mine"), None]


def test_train_hands_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def record(arguments: list[str]) -> int:
        seen.append(arguments)
        return 3

    monkeypatch.setattr(server.cli.train, "train", record)
    arguments = ["--data", "D", "--out=O", "--minutes", "1.5", "--no-compile", "-x"]
    assert invoke("train", *arguments).exit_code == 3
    assert invoke("train", "--help").exit_code == 3
    assert seen == [arguments, ["--help"]]


def test_train_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        server.cli.train.train(["--help"])
    assert ended.value.code == 0
    assert "--recipe" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["pebble", "{path}"]])
def test_torch_waits_for_usable_data(tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n')
    given = ["tune", *(one.format(path=path) for one in arguments)]
    code = (
        "import sys; from typer.testing import CliRunner; from server.__main__ import app; "
        "result = CliRunner().invoke(app, sys.argv[1:]); "
        "sys.exit('torch' in sys.modules or result.exit_code)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *given], check=False)
    assert ended.returncode == (0 if "--help" in given else 2)
