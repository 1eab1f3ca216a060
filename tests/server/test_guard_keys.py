"""API keys: which files are accepted, which callers come in."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine import ConfigError
from server.__main__ import app
from server.errors import ApiError
from server.guard.keys import KeyFileError, KeyRing, hash_of, make_key
from server.guard.policy import KeyPolicy


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


LONG = """
# staff
[[key]]
name = "website"
hash = "%s"
requests_per_minute = 60
tokens_per_minute = 1000
max_turns = 3
money_per_day = 2.5
weight = 4
priority = -2

[[key]]
key = "sk-two"
""" % hash_of("sk-one")  # noqa: UP031


def test_the_long_form_gives_each_key_its_policy(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, LONG))
    one = ring.owner("Bearer sk-one")
    assert ring.policy(one) == KeyPolicy(
        name="website",
        requests_per_minute=60,
        tokens_per_minute=1000,
        max_turns=3,
        money_per_day=2.5,
        weight=4.0,
        priority=-2,
    )
    assert ring.policy(ring.owner("Bearer sk-two")) == KeyPolicy()
    assert one == KeyRing(frozenset({"sk-one"})).owner("Bearer sk-one"), "what is stored stays"
    with pytest.raises(ApiError):
        ring.owner(f"Bearer {hash_of('sk-one')}")


def test_plain_files_may_hold_hashes(tmp_path: Path) -> None:
    ring = KeyRing.load(key_file(tmp_path, f"{hash_of('sk-one')}  # one\nsk-two\n"))
    assert ring.owner("Bearer sk-one") != ring.owner("Bearer sk-two")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[key]]\n", "either 'hash' or 'key'"),
        ('[[key]]\nkey = "a"\nhash = "b"\n', "either 'hash' or 'key'"),
        ('[[key]]\nhash = "md5:1"\n', "64 digits"),
        ('[[key]]\nkey = "sha256:1"\n', "64 digits"),
        ('[[key]]\nkey = "a"\nweigth = 2\n', "weigth"),
        ('[[key]]\nkey = "a"\nweight = 0\n', "weight is 0"),
        ('[[key]]\nkey = "a"\nmax_turns = 0\n', "max_turns is 0"),
        ('[[key]]\nkey = "a"\nmoney_per_day = -1\n', "money_per_day is -1"),
        ('[[key]]\nkey = "a"\nrequests_per_minute = "many"\n', "int"),
        ('[[key]]\nkey = "a"\n[[key]]\nkey = "a"\n', "number 2 .* there already"),
        ('[[key]]\nkey = "a"\n[other]\nb = 1\n', "tables only"),
        ("[[key]]\nkey = \n", "not TOML"),
    ],
)
def test_malformed_long_files_are_refused(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(KeyFileError, match=word):
        KeyRing.load(key_file(tmp_path, text))


def test_the_command_makes_a_key_whose_entry_lets_it_in(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["key", 'my "site"'])
    assert result.exit_code == 0
    (key,) = re.findall(r"^ +(mr-\S+)$", result.output, re.MULTILINE)
    entry = result.output[result.output.index("[[key]]") :]
    assert key not in entry
    ring = KeyRing.load(key_file(tmp_path, entry + "    weight = 2\n"))
    policy = ring.policy(ring.owner(f"Bearer {key}"))
    assert (policy.name, policy.weight) == ("my site", 2.0)


def test_made_keys_are_new_and_fit_a_header() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    ring = KeyRing(frozenset(keys))
    assert all(ring.owner(f"Bearer {key}") for key in keys)
