"""Schemathesis on the served OpenAPI document: inputs that it allows, and that it does not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import NamedTuple

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
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
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
