"""Idempotency keys: a POST that is sent again with the same key never runs twice.

A key belongs to an API key. With it are stored what was asked (a digest) and the id of what came of
it, before that begins, in one step (SET NX), so that of several servers only one runs it.

Keys (with a time to live)::

    idempotency:<owner>:<digest of the key>   a _Claim
    idempotency:<owner>                       sorted set: those digests by when they run out
"""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple, cast

import msgspec
from redis.exceptions import WatchError

from server.errors import ApiError, invalid
from server.replicas import Replicas
from server.store import Store, reaching

__all__ = ["HEADER", "KEEP_S", "MAX_KEYS", "Idempotency", "Operation"]

HEADER = "Idempotency-Key"
KEEP_S = 24 * 3600
MAX_KEY_CHARS = 255
MAX_KEYS = 10_000
"""Keys of one API key that are remembered at once; more are refused until some run out."""


class Operation(NamedTuple):
    """One POST: which key it has, and what it asks."""

    owner: str
    digest: str
    fingerprint: str

    @classmethod
    def of(cls, owner: str, key: str, path: str, body: bytes) -> Operation:
        """Raises ApiError 400 on a key that cannot be one."""
        if not 0 < len(key) <= MAX_KEY_CHARS or not key.isascii() or not key.isprintable():
            raise invalid(
                f"The header {HEADER} must have 1 to {MAX_KEY_CHARS} printable ASCII characters.",
                param=HEADER,
                code="invalid_value",
            )
        fingerprint = hashlib.blake2b(path.encode() + b"\n" + body, digest_size=16).hexdigest()
        return cls(owner, hashlib.blake2b(key.encode(), digest_size=16).hexdigest(), fingerprint)


class _Claim(msgspec.Struct, frozen=True, array_like=True):
    fingerprint: str
    made_id: str
    replica: str


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Claim).decode


class Idempotency:
    """What was asked under which key. Methods may raise StoreError."""

    def __init__(self, store: Store, replicas: Replicas) -> None:
        self._store = store
        self._redis = store.redis
        self._replicas = replicas

    async def claim(self, operation: Operation, new_id: str) -> str | None:
        """Return None where the caller is to do it, as ``new_id``; else the id of what was made.

        Raises ApiError: 422 when the key was used for something else, 429 when there are too many.
        """
        key, index = self._key(operation), self._index(operation.owner)
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            pipe.set(key, self._claim(operation, new_id), nx=True, ex=KEEP_S)
            pipe.get(key)
            pipe.zremrangebyscore(index, "-inf", int(time.time()))
            pipe.zadd(index, {operation.digest: int(time.time()) + KEEP_S}, nx=True)
            pipe.expire(index, KEEP_S)
            pipe.zcard(index)
            is_new, data, *_, count = await pipe.execute()
        if is_new and count > MAX_KEYS:
            await self.release(operation)
            raise _too_many()
        claim = _decode(cast(bytes, data))
        if claim.fingerprint != operation.fingerprint:
            raise ApiError(
                422,
                f"The {HEADER} was used for another request; use a new one for each request.",
                param=HEADER,
                code="idempotency_key_reused",
            )
        # The answer to the SET may have been lost and the command repeated: the id tells.
        return None if claim.made_id == new_id else claim.made_id

    async def inherit(self, operation: Operation, made_id: str, new_id: str) -> bool:
        """Take a claim of a server that died before anything came of it."""
        key = self._key(operation)
        with reaching():
            async with self._redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(key)
                    data = cast(bytes | None, await pipe.get(key))
                    if data is not None:
                        claim = _decode(data)
                        if claim.made_id != made_id or await self._replicas.lives(claim.replica):
                            return False
                    pipe.multi()  # type: ignore[no-untyped-call]
                    pipe.set(key, self._claim(operation, new_id), ex=KEEP_S)
                    await pipe.execute()
                except WatchError:
                    return False
        return True

    async def release(self, operation: Operation) -> None:
        """Forget a key whose request was refused: it may be sent again."""
        with reaching():
            pipe = self._redis.pipeline(transaction=True)
            pipe.delete(self._key(operation))
            pipe.zrem(self._index(operation.owner), operation.digest)
            await pipe.execute()

    def _claim(self, operation: Operation, new_id: str) -> bytes:
        return _encode(_Claim(operation.fingerprint, new_id, self._replicas.id))

    def _key(self, operation: Operation) -> str:
        return self._store.key("idempotency", operation.owner, operation.digest)

    def _index(self, owner: str) -> Any:
        return self._store.key("idempotency", owner)


def _too_many() -> ApiError:
    return ApiError(
        429,
        f"{MAX_KEYS} idempotency keys are remembered already; they run out after "
        f"{KEEP_S // 3600} hours.",
        kind="rate_limit_error",
        code="too_many_idempotency_keys",
        retry_after_s=60,
    )
