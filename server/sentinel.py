"""A Redis that Sentinels watch: its address, and a client that follows the master they name.

An address is ``redis+sentinel://[user:password@]host:port,host:port/SERVICE[/DB]``, with
``rediss+sentinel://`` for TLS. The user and the password are those of the Redis servers; what the
Sentinels themselves want comes behind a question mark (``sentinel_username``,
``sentinel_password``), and so do files for TLS (``ssl_ca_certs``, ``ssl_certfile``,
``ssl_keyfile``). What is shown of an address never has a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from redis.asyncio import Redis
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from server.background import end

__all__ = [
    "NoSentinelReachable",
    "SentinelAddress",
    "SentinelError",
    "SentinelGroup",
    "UnknownService",
    "is_sentinel_url",
]

log = logging.getLogger("millrace.store")

SCHEMES = {"redis+sentinel": False, "rediss+sentinel": True}
"""Whether TLS is spoken."""
FORM = "redis+sentinel://[user:password@]host:port,host:port,host:port/SERVICE[/DB]"
DEFAULT_PORT = 26379
CHECK_S = 5.0
"""How long the first question to the Sentinels may take, all together."""
CONNECT_TIMEOUT_S = 1.0
SENTINEL_REPLY_S = 1.0
"""Each Sentinel is asked in turn: one that does not answer holds up the others' answer."""
WATCH_S = 0.5
"""How soon a master that was deposed while it lives, and still takes our writes, is left."""
REPLY_TIMEOUT_S = 4.0
"""Longer than any command blocks, and not much: a master that hangs has been replaced by then."""
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OPTIONS = ("sentinel_username", "sentinel_password", *_TLS_FILES)


class SentinelError(Exception):
    """The Sentinels cannot be used as they were named."""


class NoSentinelReachable(SentinelError):
    """None of the named Sentinels answers."""


class UnknownService(SentinelError):
    """Sentinels answer, but watch nothing of that name."""


class SentinelAddress(NamedTuple):
    """Which Sentinels to ask for which service."""

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int = 0
    tls: bool = False
    username: str | None = None
    password: str | None = None
    options: Mapping[str, str] = {}
    """As behind the question mark."""

    def __repr__(self) -> str:
        return f"SentinelAddress({self})"

    def __str__(self) -> str:
        return f"the master of '{self.service}' by the Sentinels at {self.hosts_text}"

    @property
    def hosts_text(self) -> str:
        """For people."""
        return ", ".join(f"{host}:{port}" for host, port in self.hosts)

    @classmethod
    def parse(cls, url: str) -> SentinelAddress:
        """Raises ValueError, whose text never has a part of the address that may be secret."""
        scheme, _, rest = url.partition("://")
        if scheme not in SCHEMES:
            raise ValueError(f"a group of Sentinels is named as {FORM}")
        rest, _, query = rest.partition("?")
        credentials, _, places = rest.rpartition("@")
        hosts, *path = places.rstrip("/").split("/")
        if len(path) not in (1, 2) or not path[0]:
            raise ValueError(f"no service is named; the form is {FORM}")
        if len(path) == 2 and not (path[1].isascii() and path[1].isdecimal()):
            raise ValueError("the database behind the service must be a number")
        username, _, password = credentials.partition(":")
        return cls(
            hosts=tuple(_host(one) for one in hosts.split(",")),
            service=unquote(path[0]),
            db=int(path[1]) if len(path) == 2 else 0,
            tls=SCHEMES[scheme],
            username=unquote(username) or None,
            password=unquote(password) or None,
            options=_options(query),
        )


def is_sentinel_url(url: str) -> bool:
    """Return whether an address names Sentinels rather than a Redis."""
    return url.partition("://")[0] in SCHEMES


def _host(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"a Sentinel is named as host:port; the form is {FORM}")
    return unquote(host), int(port)


def _options(query: str) -> dict[str, str]:
    given = parse_qs(query, keep_blank_values=True)
    if unknown := sorted(given.keys() - set(_OPTIONS)):
        raise ValueError(f"there is no option '{unknown[0]}'; there are: {', '.join(_OPTIONS)}")
    return {name: values[-1] for name, values in given.items()}


class _View(NamedTuple):
    """What one Sentinel knows of a service. ``config_epoch`` grows with each failover."""

    config_epoch: int
    address: tuple[str, int]


class _Newest(Sentinel):
    """Believes the Sentinel that knows of the latest failover.

    redis-py takes the first one's word. For seconds after a failover others still name the former
    master, which may have been started again by then, and takes writes that are lost when it
    becomes a replica.
    """

    _seen_epoch = 0

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the master's address. Raises MasterNotFoundError."""
        asked = (_view(one, service_name) for one in self.sentinels)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        views = [one for one in answers if isinstance(one, _View)]
        newest = max(views, default=None)
        if newest is None or newest.config_epoch < self._seen_epoch:
            raise MasterNotFoundError(
                f"no Sentinel knows who is the master of '{service_name}' now"
            )
        self._seen_epoch = newest.config_epoch
        return newest.address


async def _view(sentinel: Redis, service: str) -> _View | None:
    """Return what a Sentinel says; None: it knows no such service. Raises what redis-py raises."""
    pipe = sentinel.pipeline(transaction=False)
    # Amid a failover the first has the new epoch already, and the second the new address.
    pipe.execute_command("SENTINEL MASTER", service)
    pipe.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", service)
    state, address = await pipe.execute(raise_on_error=False)
    if address is None:
        return None
    for answer in (state, address):
        if isinstance(answer, Exception):
            raise answer
    host, port = address
    return _View(int(state["config-epoch"]), (_text(host), int(port)))


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


class SentinelGroup:
    """The Sentinels of one address, and ``client``, which follows the master they name."""

    def __init__(self, address: SentinelAddress, *, max_connections: int, retry: Retry) -> None:
        self.address = address
        options = address.options
        tls: dict[str, Any] = {"ssl": True} if address.tls else {}
        tls |= {name: options[name] for name in _TLS_FILES if name in options and address.tls}
        self._manager = _Newest(  # type: ignore[no-untyped-call]
            list(address.hosts),
            sentinel_kwargs={
                "username": options.get("sentinel_username"),
                "password": options.get("sentinel_password"),
                "socket_connect_timeout": CONNECT_TIMEOUT_S,
                "socket_timeout": SENTINEL_REPLY_S,
                "retry": Retry(NoBackoff(), 0),
                "protocol": 2,
                **tls,
            },
        )
        self._pool = SentinelConnectionPool(  # type: ignore[no-untyped-call]
            address.service,
            self._manager,
            username=address.username,
            password=address.password,
            db=address.db,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=REPLY_TIMEOUT_S,
            max_connections=max_connections,
            retry=retry,
            protocol=2,
            redis_connect_func=_greet_master,
            **tls,
        )
        self.client: Redis = Redis.from_pool(self._pool)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for another master."""
        self._task = asyncio.create_task(self._watch_forever(), name="sentinel-watch")

    async def _watch_forever(self) -> None:
        pool = self._pool
        while True:
            await asyncio.sleep(WATCH_S)
            known = pool.master_address
            with contextlib.suppress(RedisError, OSError):
                address = await self._manager.discover_master(self.address.service)
                if known is not None and known != address:
                    log.warning("the Sentinels name another master: %s:%d", *address)
                    await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
                    await pool.disconnect(inuse_connections=False)

    async def check(self) -> None:
        """See that the service is known. Raises NoSentinelReachable, UnknownService."""
        service = self.address.service
        asked = [asyncio.create_task(_view(one, service)) for one in self._manager.sentinels]
        done, late = await asyncio.wait(asked, timeout=CHECK_S)
        for task in late:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        errors = [error for task in done if (error := task.exception()) is not None]
        if len(errors) == len(done):
            reason = f": {errors[0]}" if errors else ""
            raise NoSentinelReachable(
                f"none of the Sentinels at {self.address.hosts_text} answers{reason}"
            )
        if not any(task.result() for task in done if task.exception() is None):
            raise UnknownService(
                f"the Sentinels at {self.address.hosts_text} watch no service '{service}'"
            )

    async def close(self) -> None:
        """Stop looking and close all connections. Idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None
        await self.client.aclose()
        await self._manager.aclose()


async def _greet_master(connection: SentinelManagedConnection) -> None:
    """Begin a connection, and refuse a server that is no master any more, or not yet.

    A Sentinel's word may be a moment old. A replica would refuse our writes, but answer our reads
    with what it has so far.
    """
    await connection.on_connect()
    await connection.send_command("ROLE")
    try:
        role: Any = await connection.read_response()
    except RedisError as error:
        raise RedisConnectionError(f"the server does not tell its role: {error}") from error
    if role[0] != b"master":
        raise RedisConnectionError("the server that the Sentinels name is a replica")
