"""The server's settings: frozen, checked once; each component is given the values it needs."""

from __future__ import annotations

from math import inf
from pathlib import Path

import msgspec

from server.metering.ledger import Prices

__all__ = ["ServerSettings", "SettingsError"]

_MIB = 2**20
_DAY_S = 24 * 3600


class SettingsError(ValueError):
    """A setting has a value that can never work."""


def _default_page_dir() -> Path:
    return Path(__file__).resolve().parent.parent / "web" / "dist"


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server is started with. Raises SettingsError on an impossible value."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free port."""
    redis_url: str | None = None
    """``redis://``, ``rediss://``, ``unix://`` or ``redis+sentinel://`` address (see ``sentinel``);
    None: a private store."""
    api_key_file: Path | None = None
    """File of API keys, one a line; None: everyone may call."""
    max_body_bytes: int = 8 * _MIB
    """Largest request body, and largest WebSocket message."""
    max_live_turns: int = 1024
    """Turns served at once; more are refused with 429."""
    max_queue: int = 512
    """Turns that may wait for their first token; more are refused with 429."""
    max_queue_wait_s: float = 60.0
    """Longest expected wait for a first token; what would wait longer is refused with 429."""
    max_connections: int = 8192
    """Open connections, all together; more are closed at once."""
    max_connections_per_address: int = 8192
    """Open connections of one address. Behind a proxy all have the proxy's."""
    head_timeout_s: float = 15.0
    """How long a client may take to send a request's head."""
    body_timeout_s: float = 60.0
    """How long a client may take to send a body."""
    max_unsent_bytes: int = _MIB // 4
    """What a connection may leave unread before it is cut; its stream can be resumed."""
    prices: Prices = Prices()
    """Of a million tokens; for the ledger, and for keys with a limit of money."""
    max_lanes: int = 32
    """Turns at once on one WebSocket."""
    drain_s: float = 30.0
    """How long running turns may go on after SIGTERM, before other servers go on with them."""
    retention_s: int = 30 * _DAY_S
    """How long stored responses and conversations are kept after their last change."""
    unstored_retention_s: int = 600
    """How long the event log of a turn with ``store: false`` is kept."""
    keepalive_s: float = 15.0
    """Longest silence on an SSE stream before a comment, and a WebSocket's ping interval."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins other than the server's own whose pages may call (CORS), e.g.
    ``https://example.org``; ``*`` allows all."""
    page_dir: Path = msgspec.field(default_factory=_default_page_dir)
    """The built page."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port is {self.port}; it must be between 0 and 65535")
        for name in (
            "max_body_bytes",
            "max_live_turns",
            "max_queue",
            "max_connections",
            "max_connections_per_address",
            "max_unsent_bytes",
            "max_lanes",
            "retention_s",
            "unstored_retention_s",
        ):
            value = getattr(self, name)
            if value < 1:
                raise SettingsError(f"{name} is {value}; it must be at least 1")
        if self.drain_s < 0:
            raise SettingsError(f"drain_s is {self.drain_s}; it must be at least 0")
        if self.max_queue_wait_s <= 0:
            raise SettingsError(f"max_queue_wait_s is {self.max_queue_wait_s}; it must be above 0")
        for name in Prices.__struct_fields__:
            if not 0 <= (price := getattr(self.prices, name)) < inf:
                raise SettingsError(f"the {name} price is {price}; it must be at least 0")
        for name in ("head_timeout_s", "body_timeout_s"):
            if (seconds := getattr(self, name)) <= 0:
                raise SettingsError(f"{name} is {seconds}; it must be more than 0")
        if self.keepalive_s <= 0:
            raise SettingsError(f"keepalive_s is {self.keepalive_s}; it must be more than 0")
