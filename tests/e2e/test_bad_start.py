"""What cannot be started says so in a line or two, with a status, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from openai import APIStatusError, OpenAI

import engine
from tests.e2e.live import LiveServer, run_millrace

PEBBLE = Path(engine.__file__).parent / "assets" / "pebble"


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It ended with an error that a person can act on."""
    assert done.returncode not in (0, None), done.stdout
    assert done.returncode > 0, f"killed by a signal:\n{done.stdout}"
    assert "Traceback" not in done.stdout, done.stdout
    for word in words:
        assert word in done.stdout, done.stdout
    assert "is ready" not in done.stdout
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline", "ppid", "status"])
        if process.info["ppid"] == 1
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and any("millrace" in part and "redis" in part for part in process.info["cmdline"] or ())
    ]
    assert not left, left


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be broken."""
    copy = tmp_path / "model"
    shutil.copytree(PEBBLE, copy)
    return copy


def edit_config(model: Path, **fields: object) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": ')


def other_architecture(model: Path) -> None:
    edit_config(model, architectures=["MambaForCausalLM"], model_type="mamba")


def other_shape(model: Path) -> None:
    edit_config(model, hidden_size=512)


def impossible_shape(model: Path) -> None:
    edit_config(model, num_attention_heads=0)


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def no_safetensors(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\x80\x04\x95" + b"x" * 1000)


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(model: Path) -> None:
    (model / "tokenizer.model").unlink()


def broken_tokenizer(model: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"no model")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (no_config, "config.json"),
        (broken_config, "config.json"),
        (other_architecture, "MambaForCausalLM"),
        (other_shape, "shape"),
        (impossible_shape, "num_attention_heads"),
        (no_weights, "safetensors"),
        (cut_weights, "safetensors"),
        (no_safetensors, "safetensors"),
        (missing_shard, "model-00001-of-00002.safetensors"),
        (no_tokenizer, "tokenizer"),
        (broken_tokenizer, "tokenizer"),
    ],
)
def test_broken_checkpoints(model: Path, damage: Callable[[Path], None], word: str) -> None:
    damage(model)
    done = run_millrace(["--port", "0", str(model)])
    refused(done, word)


def test_a_broken_chat_template_breaks_chats_only(model: Path) -> None:
    (model / "chat_template.jinja").write_text("{% for message in %}")
    server = LiveServer(["--kv-memory", "64MiB", str(model)])
    try:
        with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            with pytest.raises(APIStatusError) as caught:
                client.chat.completions.create(
                    model="model", messages=[{"role": "user", "content": "Hi"}]
                )
            assert "template" in caught.value.message
            answer = client.completions.create(model="model", prompt="Once", max_tokens=2)
            assert answer.choices
        server.assert_clean()
    finally:
        assert server.stop() == 0


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    refused(run_millrace(["--port", "0", str(tmp_path / "none")]), "none")


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(run_millrace(["--port", str(port)]), str(port), "in use")


def test_a_host_of_others() -> None:
    refused(run_millrace(["--port", "0", "--host", "203.0.113.7"]), "203.0.113.7")


def test_redis_out_of_reach() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        done = run_millrace(["--port", "0", "--redis-url", f"redis://127.0.0.1:{port}"])
    refused(done, "Redis", str(port))


def test_what_is_no_redis() -> None:
    """Something else listens there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run_millrace(["--port", "0", "--redis-url", f"redis://127.0.0.1:{port}"])
    refused(done, "Redis")


def test_a_redis_password_is_not_shown() -> None:
    done = run_millrace(["--port", "0", "--redis-url", "redis://user:hunter2@127.0.0.1:1"])
    refused(done, "Redis")
    assert "hunter2" not in done.stdout


@pytest.mark.parametrize(
    ("text", "mode", "word"),
    [
        (None, 0o600, "No such file"),
        ("", 0o600, "no key"),
        ("# nothing\n", 0o600, "no key"),
        ("sk-one\n", 0o644, "chmod 600"),
        ("two words\n", 0o600, "line 1"),
    ],
)
def test_bad_key_files(tmp_path: Path, text: str | None, mode: int, word: str) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
        path.chmod(mode)
    refused(run_millrace(["--port", "0", "--api-key-file", str(path)]), word)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--kv-memory", "lots"], "lots"),
        (["--kv-memory", "1"], "kv"),
        (["--max-model-len", "0"], "max"),
        (["--max-model-len", "1000000"], "1000000"),
        (["--max-num-tokens", "0"], "max"),
        (["--dtype", "int3"], "int3"),
        (["--device", "tpu"], "tpu"),
        (["--port", "70000"], "65535"),
        (["--redis-url", "http://x"], "Redis"),
        (["--no-such-flag"], "no-such-flag"),
        (["one", "two"], "two"),
    ],
)
def test_bad_settings(arguments: list[str], word: str) -> None:
    refused(run_millrace(["--port", "0", *arguments]), word)


def test_bad_settings_of_the_environment() -> None:
    refused(
        run_millrace(["--port", "0"], {"MILLRACE_MAX_MODEL_LEN": "many"}), "MILLRACE_MAX_MODEL_LEN"
    )
