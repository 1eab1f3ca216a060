"""A gate to test with: no keys, and room for everybody unless said otherwise."""

from __future__ import annotations

from typing import Any

from server.guard.gate import Gate
from server.guard.keys import KeyRing
from server.guard.limits import Limits
from server.guard.queue import WaitingTurns
from server.metering.ledger import Ledger, Prices
from server.metering.metrics import Metrics
from server.metering.pace import Pace
from server.store import Store

__all__ = ["open_gate"]


def open_gate(engine: Any, store: Store, metrics: Metrics, keys: KeyRing | None = None) -> Gate:
    waiting = WaitingTurns(lambda: engine.stats, Pace(), max_waiting=1000, max_wait_s=1000.0)
    return Gate(keys or KeyRing(), Limits(store, Ledger(store, Prices())), waiting, metrics)
