"""Schemathesis on the served OpenAPI document: inputs that it allows, and that it does not."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.live import LiveServer
from tests.fuzz.fuzzing import KEYS

__all__ = ["CHECKS", "SchemaRun", "run_schemathesis"]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "ignored_auth",
    "use_after_free",
)
"""What is told from the document alone. Not whether every body that it allows is accepted: it
cannot say that a conversation exists or that a prompt fits."""
REQUEST_S = 60


class SchemaRun(NamedTuple):
    """How it ended, and what it printed."""

    passed: bool
    output: str


def run_schemathesis(
    server: LiveServer,
    *,
    seed: int,
    seconds: int,
    max_examples: int = 1000,
    phases: str = "examples,coverage,fuzzing,stateful",
) -> SchemaRun:
    """Let it ask for ``seconds`` at most, in the given phases of its own."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url,
        "--header", f"Authorization: Bearer {KEYS[0]}",
        "--checks", ",".join(CHECKS), "--phases", phases,
        "--max-time", str(seconds),
        "--max-examples", str(max_examples),
        "--seed", str(seed),
        "--request-timeout", str(REQUEST_S),
        "--suppress-health-check", "all",
        "--warnings", "off",
        "--continue-on-failure", "--output-truncate", "false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "openapi.json").write_text(json.dumps(_document(server)))
        run = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    return SchemaRun(run.returncode == 0, run.stdout)


def _document(server: LiveServer) -> dict[str, Any]:
    """Return the served document with the served model's name as the only one.

    It may name any, but of names that are guessed hardly one in a thousand is right: then what is
    tested is how the others are refused.
    """
    document: dict[str, Any] = json.loads(server.get("/openapi.json")[1])
    for name, schema in document["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            schema["properties"]["model"] = {"const": "pebble"}
    return document
