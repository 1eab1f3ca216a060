"""Where a request handler finds what the application consists of: typed application keys."""

from __future__ import annotations

from aiohttp import web

from engine import Tokenizer
from server.control import Control
from server.guard.connections import Connections
from server.guard.gate import Gate
from server.guard.keys import KeyRing
from server.idempotency import Idempotency
from server.journals import Journals
from server.metering.metrics import Metrics
from server.sequence import Engine
from server.sessions import Sessions
from server.settings import ServerSettings
from server.store import Store
from server.takeover import Takeover
from server.turns import Turns

__all__ = [
    "CONNECTIONS",
    "CONTROL",
    "ENGINE",
    "GATE",
    "IDEMPOTENCY",
    "JOURNALS",
    "KEYS",
    "METRICS",
    "OWNER",
    "REQUEST_ID",
    "SESSIONS",
    "SETTINGS",
    "SOCKETS",
    "STORE",
    "TAKEOVER",
    "TOKENIZER",
    "TURNS",
]

ENGINE: web.AppKey[Engine] = web.AppKey("engine", Engine)
TOKENIZER: web.AppKey[Tokenizer] = web.AppKey("tokenizer", Tokenizer)
STORE: web.AppKey[Store] = web.AppKey("store", Store)
JOURNALS: web.AppKey[Journals] = web.AppKey("journals", Journals)
SESSIONS: web.AppKey[Sessions] = web.AppKey("sessions", Sessions)
TURNS: web.AppKey[Turns] = web.AppKey("turns", Turns)
METRICS: web.AppKey[Metrics] = web.AppKey("metrics", Metrics)
CONTROL: web.AppKey[Control] = web.AppKey("control", Control)
TAKEOVER: web.AppKey[Takeover] = web.AppKey("takeover", Takeover)
IDEMPOTENCY: web.AppKey[Idempotency] = web.AppKey("idempotency", Idempotency)
SETTINGS: web.AppKey[ServerSettings] = web.AppKey("settings", ServerSettings)
KEYS: web.AppKey[KeyRing] = web.AppKey("keys", KeyRing)

GATE: web.AppKey[Gate] = web.AppKey("gate", Gate)
CONNECTIONS: web.AppKey[Connections] = web.AppKey("connections", Connections)

SOCKETS: web.AppKey[set[web.WebSocketResponse]] = web.AppKey("sockets", set)
"""The open WebSockets, to be closed when the server stops."""

OWNER: web.RequestKey[str] = web.RequestKey("owner", str)
"""Who calls: the digest of the API key, or "" where none is needed. Set by the middleware."""
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
"""Sent back as ``x-request-id``."""
