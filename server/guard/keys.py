"""API keys from a file: one a line, ``#`` begins a comment.

Keys are kept as digests only: a core dump or a log of this process gives none away.
"""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

from engine import ConfigError
from server.errors import ApiError

__all__ = ["KeyFileError", "KeyRing"]

MAX_FILE_BYTES = 1 << 20
MAX_KEY_CHARS = 512


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

    def __init__(self, keys: frozenset[str] = frozenset()) -> None:
        self._digests = tuple(_digest(key) for key in sorted(keys))

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Read a key file; None gives the empty ring.

        Raises KeyFileError. The message never shows a line of the file.
        """
        if path is None:
            return cls()
        return cls(frozenset(_parse(path, _read(path))))

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
        return _owner(key)


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


def _parse(path: Path, data: bytes) -> set[str]:
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise KeyFileError(
            f"the key file {path} is not plain text; keys are printable ASCII characters"
        ) from None
    keys: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.partition("#")[0].strip()
        if not key:
            continue
        if len(key) > MAX_KEY_CHARS or not key.isprintable() or " " in key:
            raise KeyFileError(
                f"line {number} of the key file {path} is not a key: one key a line, up to "
                f"{MAX_KEY_CHARS} printable characters without spaces"
            )
        keys.add(key)
    if not keys:
        raise KeyFileError(f"the key file {path} holds no key; write one key a line")
    return keys
