"""API keys: which files are accepted, which callers come in."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from engine import ConfigError
from server.errors import ApiError
from server.guard.keys import KeyFileError, KeyRing


def key_file(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def test_without_a_file_everybody_comes_in() -> None:
    ring = KeyRing.load(None)
    assert not ring.required
    assert ring.owner(None) == ""
    assert ring.owner("Bearer anything") == ""


def test_known_keys_come_in_as_different_owners(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, "# staff\nsk-one\n\n  sk-two  # the second\n"))
    assert ring.required
    one, two = ring.owner("Bearer sk-one"), ring.owner("bearer  sk-two")
    assert one
    assert one != two
    assert ring.owner(None, "sk-one") == one
    assert "sk" not in one + two
    assert KeyRing(frozenset({"sk-one", "sk-three"})).owner("Bearer sk-one") == one


@pytest.mark.parametrize(
    ("authorization", "api_key", "word"),
    [
        (None, None, "required"),
        (None, "", "required"),
        ("", None, "Bearer KEY"),
        ("sk-one", None, "Bearer KEY"),
        ("Bearer", None, "Bearer KEY"),
        ("Basic sk-one", None, "Bearer KEY"),
        ("Bearer sk-on", None, "not one of"),
        ("Bearer sk-one sk-one", None, "not one of"),
        ("Bearer SK-ONE", None, "not one of"),
        ("Bearer \u00fc", None, "not one of"),
        ("Bearer \udcff", None, "not one of"),
        ("Bearer wrong", "sk-one", "not one of"),
        (None, "wrong", "not one of"),
    ],
)
def test_others_are_refused(
    tmp_path: Path, authorization: str | None, api_key: str | None, word: str
) -> None:
    ring = KeyRing.load(key_file(tmp_path, "sk-one\n"))
    with pytest.raises(ApiError) as caught:
        ring.owner(authorization, api_key)
    error = caught.value
    assert (error.status, error.kind, error.code) == (
        401,
        "authentication_error",
        "invalid_api_key",
    )
    assert word in error.message
    assert "sk-on" not in error.message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no key"),
        ("# only a comment\n\n", "no key"),
        ("sk-one\nsk two\n", "line 2"),
        ("sk-\x07\n", "line 1"),
        ("k" * 513, "line 1"),
        ("schl\u00fcssel\n", "not plain text"),
        (b"\x80\x04\x95", "not plain text"),
        ("k\n" * (1 << 20), "larger than"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, text: str | bytes, word: str) -> None:
    path = key_file(tmp_path, text)
    with pytest.raises(KeyFileError, match=word) as caught:
        KeyRing.load(path)
    assert isinstance(caught.value, ConfigError)
    assert str(path) in str(caught.value)
    assert "sk two" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o601])
def test_a_file_that_everybody_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(KeyFileError, match="chmod 600"):
        KeyRing.load(key_file(tmp_path, "sk-one\n", mode))


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        KeyRing.load(tmp_path / "none")
    with pytest.raises(KeyFileError, match="directory"):
        KeyRing.load(tmp_path)


def test_keys_are_not_kept_in_memory(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, "sk-very-secret-key\n"))
    reachable = [ring, *gc.get_referents(ring), *vars(ring).values()]
    assert "sk-very-secret-key" not in repr([vars(ring), reachable])
