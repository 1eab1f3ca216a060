"""What one API key may do: limits, share and priority."""

from __future__ import annotations

from math import inf

import msgspec

__all__ = ["OPEN", "KeyPolicy"]


class KeyPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of a key; None is no limit. Raises ValueError on an impossible value."""

    name: str = ""
    """For the operator; shown nowhere else."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and completion tokens together, those from the prefix cache included."""
    max_turns: int | None = None
    """Turns at once."""
    money_per_day: float | None = None
    """In the unit of the server's prices, from midnight to midnight UTC."""
    weight: float = 1.0
    """Share of the engine; 2 is due twice the tokens of 1."""
    priority: int = 0
    """The most urgent (least) priority its requests may have; others are set back to it."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "max_turns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.money_per_day is not None and not 0 < self.money_per_day < inf:
            raise ValueError(f"money_per_day is {self.money_per_day}; it must be more than 0")
        if not 1e-3 <= self.weight <= 1e3:
            raise ValueError(f"weight is {self.weight}; it must be between 0.001 and 1000")
        if not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority is {self.priority}; it must fit into 32 bits")


OPEN = KeyPolicy(priority=-(2**31))
"""Of a server without keys: whoever reaches it is its owner."""
