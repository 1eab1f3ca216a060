"""A restaurant guide to try tool calls with: the houses are made up, whatever the city.

Nothing is booked anywhere. Answers depend on the question alone, so a conversation can be repeated,
and so can a booking: the same table has the same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

__all__ = ["BookingError", "book_table", "find_restaurants"]

MAX_GUESTS = 20
_FIRST = ("Golden", "Blue", "Silver", "Little", "Old", "Green", "Royal", "White")
_SECOND = ("Pepper", "Garden", "Lantern", "Spoon", "Table", "House", "Bistro", "Olive")
_STREETS = ("Oak Street", "Main Street", "Park Street", "Mill Lane", "River Road", "Church Street")
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"


class BookingError(ValueError):
    """A table that cannot be had."""


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(part.strip().lower() for part in parts).encode()).digest()


def find_restaurants(location: str, food: str) -> Mapping[str, Any]:
    """Return one to three made-up restaurants of a place, the best first."""
    if not location.strip():
        raise BookingError("name a city")
    digest = _digest(location, food)
    return {
        "results": [
            {
                "name": f"{_FIRST[digest[i] % 8]} {_SECOND[digest[i + 3] % 8]}",
                "rating": (49 - 2 * i - digest[i + 6] % 2) / 10,
                "address": f"{digest[i + 9] % 150 + 1} {_STREETS[digest[i + 12] % 6]}",
            }
            for i in range(digest[15] % 3 + 1)
        ]
    }


def book_table(restaurant: str, date: str, time: str, people: int) -> Mapping[str, Any]:
    """Return a made-up confirmation. Raises BookingError for a party that no table holds."""
    if not restaurant.strip():
        raise BookingError("name a restaurant")
    if not 1 <= people <= MAX_GUESTS:
        raise BookingError(f"a table is for 1 to {MAX_GUESTS} people")
    digest = _digest(restaurant, date, time, str(people))
    return {"success": True, "code": "".join(_CODE_LETTERS[byte % 32] for byte in digest[:5])}
