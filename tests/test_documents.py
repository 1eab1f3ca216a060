"""The documents are true: the paths and commands that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import tests.clients.readme
from tests.chaos.readme import README, with_tables

ROOT = Path(__file__).resolve().parents[1]
PATHS = re.compile(
    r"`((?:kernels|engine|server|web|tests)/[\w./{},*-]*|[\w.-]+\.(?:md|toml|txt|yaml))`"
)


def expand(path: str) -> list[str]:
    """Return ``a/{b,c}.py`` as ``a/b.py`` and ``a/c.py``."""
    match = re.search(r"\{([^}]*)\}", path)
    if match is None:
        return [path]
    return [path.replace(match.group(0), name) for name in match.group(1).split(",")]


def test_every_path_in_the_architecture_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = [path for match in PATHS.findall(text) for path in expand(match)]
    assert len(named) > 40
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert missing == []


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = {path for match in PATHS.findall(text) for path in expand(match)}
    modules = [
        path.relative_to(ROOT).as_posix()
        for package in ("server", "engine", "kernels")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    ]
    folders = tuple(path for path in named if path.endswith("/"))
    assert [name for name in modules if name not in named and not name.startswith(folders)] == []


def test_every_make_target_in_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    used = set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert used
    assert used <= targets


def test_the_readme_has_the_kept_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text
    assert tests.clients.readme.with_table(text) == text


def test_lock_files_name_no_registry() -> None:
    pinned = (ROOT / "constraints.txt", ROOT / "tests/clients/requirements.txt")
    for lock in (*ROOT.glob("**/package-lock.json"), *pinned):
        if "node_modules" not in lock.parts:
            text = lock.read_text(encoding="utf-8")
            assert '"resolved"' not in text
            assert "index-url" not in text
