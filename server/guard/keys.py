"""API keys from a file.

The plain form has one key a line, ``#`` begins a comment. The long form is TOML and gives each key
its limits; the file then holds no secrets, since keys may be given as hashes in both forms::

    [[key]]
    hash = "sha256:..."          # made by the command `millrace key`
    name = "website"
    requests_per_minute = 60     # and the other fields of KeyPolicy

Keys are kept as digests only: a core dump or a log of this process gives none away.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine import ConfigError
from server.errors import ApiError
from server.guard.policy import OPEN, KeyPolicy

__all__ = ["KeyFileError", "KeyRing", "hash_of", "make_key"]

MAX_FILE_BYTES = 1 << 20
MAX_KEY_CHARS = 512
HASH_PREFIX = "sha256:"
_LONG_FORM = re.compile(r"^\s*\[\[\s*key\s*\]\]", re.MULTILINE)
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


def make_key() -> str:
    """Return a new key of 256 random bits."""
    return "mr-" + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """Return a key as a key file may hold it.

    A plain hash is enough: nobody guesses 256 random bits, however fast they can be tried.
    """
    return HASH_PREFIX + _digest(key).hex()


class KeyFileError(ConfigError):
    """A key file is missing, unreadable, readable by everybody, empty or malformed."""


def _digest(key: str) -> bytes:
    # A header may hold any bytes; aiohttp decodes them with surrogates.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _owner(key: str) -> str:
    # Not the digest that keys are checked by: this one is stored beside what the owner stores.
    return hashlib.blake2b(key.encode(), digest_size=16, person=b"millrace-owner").hexdigest()


class KeyRing:
    """The keys that are accepted; an empty ring accepts every caller as the owner ""."""

    def __init__(
        self, keys: frozenset[str] = frozenset(), hashes: Mapping[bytes, KeyPolicy] | None = None
    ) -> None:
        known = {_digest(key): KeyPolicy() for key in sorted(keys)} | dict(hashes or {})
        self._digests = tuple(known)
        self._policies = tuple(known.values())
        self._by_owner: dict[str, KeyPolicy] = {}

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Read a key file; None gives the empty ring.

        Raises KeyFileError. The message never shows a line of the file.
        """
        if path is None:
            return cls()
        return cls(hashes=_parse(path, _read(path)))

    @property
    def required(self) -> bool:
        """Whether a caller must show a key."""
        return bool(self._digests)

    def owner(self, authorization: str | None, api_key: str | None = None) -> str:
        """Return whose request this is: a digest of the key that the caller showed.

        ``authorization`` is the header "Authorization: Bearer KEY" (RFC 6750), ``api_key`` the
        header "api-key" that clients of Azure's API send instead. Raises ApiError 401.
        """
        if not self._digests:
            return ""
        key = _shown(authorization, api_key)
        shown = _digest(key)
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(shown, known) for known in self._digests]
        if not any(matches):
            raise _refused("The API key is not one of this server's keys.")
        owner = _owner(key)
        # Known only now: the owner is made of the key itself, which the file may not hold.
        self._by_owner[owner] = self._policies[matches.index(True)]
        return owner

    def policy(self, owner: str) -> KeyPolicy:
        """Return what an owner that ``owner`` returned may do."""
        return self._by_owner.get(owner, KeyPolicy()) if self._digests else OPEN

    def knows(self, owner: str) -> bool:
        """Return whether the key of ``owner`` was shown to this process."""
        return owner in self._by_owner


def _refused(message: str) -> ApiError:
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key")


def _shown(authorization: str | None, api_key: str | None) -> str:
    if authorization is None:
        if api_key:
            return api_key.strip()
        raise _refused("An API key is required: send the header 'Authorization: Bearer KEY'.")
    scheme, _, key = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise _refused("The Authorization header must have the form 'Bearer KEY'.")
    return key.strip()


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = path.stat()
            if status.st_mode & stat.S_IRWXO:
                raise KeyFileError(
                    f"the key file {path} is open to every user (mode "
                    f"{stat.S_IMODE(status.st_mode):o}); run: chmod 600 {path}"
                )
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise KeyFileError(
            f"the key file {path} is larger than {MAX_FILE_BYTES} bytes; it holds one key a line"
        )
    return data


def _parse(path: Path, data: bytes) -> dict[bytes, KeyPolicy]:
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise KeyFileError(
            f"the key file {path} is not plain text; keys are printable ASCII characters"
        ) from None
    if _LONG_FORM.search(text):
        return _parse_long(path, text)
    keys: dict[bytes, KeyPolicy] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.partition("#")[0].strip()
        if key:
            keys[_known(key, f"line {number} of the key file {path}")] = KeyPolicy()
    if not keys:
        raise KeyFileError(f"the key file {path} holds no key; write one key a line")
    return keys


def _parse_long(path: Path, text: str) -> dict[bytes, KeyPolicy]:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise KeyFileError(f"the key file {path} is not TOML: {error}") from None
    entries = document.pop("key")
    if document or not isinstance(entries, list):
        raise KeyFileError(f"the key file {path} may hold [[key]] tables only")
    keys: dict[bytes, KeyPolicy] = {}
    for number, entry in enumerate(entries, start=1):
        where = f"[[key]] number {number} of the key file {path}"
        digest, policy = _read_entry(entry, where)
        if digest in keys:
            raise KeyFileError(f"{where} is there already")
        keys[digest] = policy
    return keys


def _read_entry(entry: dict[str, Any], where: str) -> tuple[bytes, KeyPolicy]:
    fields = dict(entry)
    key, hashed = fields.pop("key", None), fields.pop("hash", None)
    shown = hashed if key is None else key
    if (key is None) == (hashed is None) or not isinstance(shown, str):
        raise KeyFileError(f"{where} needs a text, either 'hash' or 'key'")
    if hashed is not None and not _HASH.fullmatch(shown):
        raise KeyFileError(f"the hash of {where} must be 'sha256:' and 64 digits of 0-9a-f")
    try:
        return _known(shown, where), msgspec.convert(fields, KeyPolicy)
    except (msgspec.ValidationError, ValueError) as error:
        raise KeyFileError(f"{where}: {error}") from None


def _known(key: str, where: str) -> bytes:
    """Return the digest of a key, or the one that a hash spells."""
    if key.startswith(HASH_PREFIX):
        if not _HASH.fullmatch(key):
            raise KeyFileError(f"{where} is no hash: 'sha256:' and 64 digits of 0-9a-f are right")
        return bytes.fromhex(key.removeprefix(HASH_PREFIX))
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable() or " " in key:
        raise KeyFileError(
            f"{where} is not a key: up to {MAX_KEY_CHARS} printable characters without spaces"
        )
    return _digest(key)
