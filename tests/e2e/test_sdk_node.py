"""The official ``openai`` package for Node.js, unchanged, against a real server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer

HERE = Path(__file__).parent / "node"
NODE = shutil.which("node")
NPM = shutil.which("npm")

pytestmark = [
    pytest.mark.node,
    pytest.mark.skipif(NODE is None or NPM is None, reason="Node.js 20 or newer is missing"),
]


@pytest.fixture(scope="module")
def packages() -> None:
    """Install exactly what the lock file names, unless that is there."""
    wanted = json.loads((HERE / "package.json").read_text())["dependencies"]
    installed = {
        name: json.loads(path.read_text())["version"]
        for name in wanted
        if (path := HERE / "node_modules" / name / "package.json").exists()
    }
    if installed != wanted:
        assert NPM is not None
        subprocess.run([NPM, "ci"], cwd=HERE, check=True, capture_output=True, timeout=240)


@pytest.mark.usefixtures("packages")
def test_ordinary_examples(server: LiveServer) -> None:
    assert NODE is not None
    done = subprocess.run(
        [NODE, "ordinary.mjs", server.url, "pebble"],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["chat"]
    assert seen["chat"] == seen["chatStream"] == seen["chatHelper"]
    assert seen["usage"]["total_tokens"] == seen["streamUsage"]["total_tokens"]
    assert seen["response"]
    assert seen["response"] == seen["retrieved"] == seen["responseStream"] == seen["socket"]
    assert seen["eventTypes"][0] == "response.created"
    assert seen["eventTypes"][-1] in ("response.completed", "response.incomplete")
    assert seen["completion"]
    assert seen["models"] == ["pebble"]
    assert seen["errors"] is True
    server.assert_clean()


def test_the_lock_file_names_no_registry() -> None:
    assert not re.search(r"https?://", (HERE / "package-lock.json").read_text())
