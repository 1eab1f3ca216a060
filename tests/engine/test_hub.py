"""Finding a model's files: directories, and downloads from a hub that runs in this process."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from engine.errors import CheckpointError
from engine.hub import resolve_model

FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": bytes(range(256)) * 4096,
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"hello",
    "pytorch_model.bin": b"never",
    "README.md": b"never",
    "original/model.safetensors": b"never",
}
SHA = "a" * 40


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a snapshot download needs, for acme/tiny, acme/gated,
    acme/broken.
    """

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        if "acme/gated" in path:
            self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif "acme/broken" in path:
            self._send(500, b"{}", body)
        elif "acme/tiny" not in path:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            self._send_file(path.split(f"/resolve/{SHA}/")[1], body)
        elif "/tree/" in path:
            self._send(200, json.dumps(self._tree()).encode(), body)
        elif path.endswith("/revision/main"):
            self._send(200, json.dumps({"id": "acme/tiny", "sha": SHA}).encode(), body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in FILES.items()
        ]

    def _send_file(self, name: str, body: bool) -> None:
        data = FILES[name]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data, body, {"ETag": etag, "X-Repo-Commit": SHA})

    def _send(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    huggingface_hub.close_session()


class TestDirectories:
    def test_a_checkpoint_is_itself(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert resolve_model(str(tmp_path)) == tmp_path

    def test_without_config(self, tmp_path: Path) -> None:
        (tmp_path / "weights.gguf").touch()
        with pytest.raises(CheckpointError, match=r"no config\.json in it \(but weights\.gguf\)"):
            resolve_model(str(tmp_path))

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(CheckpointError, match="give the directory"):
            resolve_model(str(tmp_path / "model.safetensors"))

    @pytest.mark.parametrize("name", ["./missing", "/no/such/model", "~/nothing-here", "a/b/c", ""])
    def test_a_path_that_is_not_there(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="there is no directory"):
            resolve_model(name)

    @pytest.mark.parametrize("name", ["a model", "owner/mo del", "owner/model@", "ö/x?y"])
    def test_neither_path_nor_name(self, name: str) -> None:
        with pytest.raises(CheckpointError, match="neither a directory nor a hub name"):
            resolve_model(name)


class TestDownloads:
    def test_what_the_engine_needs_and_no_more(self, hub: ThreadingHTTPServer) -> None:
        seen: list[tuple[str, float]] = []
        directory = resolve_model("acme/tiny", lambda stage, done: seen.append((stage, done)))
        held = {str(one.relative_to(directory)) for one in directory.rglob("*") if one.is_file()}
        assert held == {
            "config.json",
            "model.safetensors",
            "tokenizer.model",
            "chat_template.jinja",
        }
        assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
        fractions = [done for _, done in seen]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        assert seen[-1][0].startswith("downloading acme/tiny (")

    def test_the_cache_serves_when_the_hub_is_gone(self, hub: ThreadingHTTPServer) -> None:
        first = resolve_model("acme/tiny")
        hub.shutdown()
        hub.server_close()
        assert resolve_model("acme/tiny") == first

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("acme/none", "no hub model has this name"),
            ("acme/gated", "asks for consent"),
            ("acme/broken", "cannot be reached|status 500"),
            ("acme/tiny@v9", "no such revision"),
        ],
    )
    def test_refusals(self, hub: ThreadingHTTPServer, name: str, reason: str) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            resolve_model(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_hub_that_is_away(self, hub: ThreadingHTTPServer) -> None:
        hub.shutdown()
        hub.server_close()
        with pytest.raises(CheckpointError, match="cannot be reached and the model is not in"):
            resolve_model("acme/tiny")

    def test_offline(self, hub: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
            resolve_model("acme/tiny")
