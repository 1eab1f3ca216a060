"""The time of day in a city, from the system's time zone database (IANA)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

__all__ = ["UnknownPlace", "time_in"]

MAX_PLACE_CHARS = 100

# Cities that people ask for and the database does not name, by the zone that they are in.
_MORE = {
    "America/New_York": "atlanta boston miami philadelphia washington orlando baltimore",
    "America/Chicago": "austin dallas houston minneapolis nashville memphis",
    "America/Los_Angeles": "san_francisco san_diego seattle las_vegas portland san_jose",
    "America/Sao_Paulo": "rio_de_janeiro brasilia",
    "America/Toronto": "ottawa montreal",
    "Europe/London": "edinburgh manchester liverpool oxford cambridge glasgow",
    "Europe/Berlin": "hamburg munich frankfurt cologne stuttgart dresden leipzig",
    "Europe/Madrid": "barcelona seville valencia",
    "Europe/Paris": "lyon marseille nice",
    "Europe/Rome": "milan naples florence venice turin",
    "Europe/Zurich": "geneva basel bern",
    "Europe/Amsterdam": "rotterdam the_hague",
    "Europe/Warsaw": "krakow",
    "Asia/Shanghai": "beijing shenzhen guangzhou hangzhou chengdu wuhan nanjing xian",
    "Asia/Tokyo": "osaka kyoto",
    "Asia/Kolkata": "mumbai delhi new_delhi bangalore chennai",
    "Asia/Ho_Chi_Minh": "hanoi",
    "Australia/Sydney": "canberra",
    "Pacific/Auckland": "wellington",
}


class UnknownPlace(ValueError):
    """No time zone is known for a place."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


def time_in(place: str, now: Callable[[], datetime] = _utc_now) -> str:
    """Return the time of day in a city or an IANA zone as ``HH:MM``; "" and "UTC" are UTC.

    Raises UnknownPlace.
    """
    zone = _zone(place[:MAX_PLACE_CHARS]) if place.strip() else UTC
    return now().astimezone(zone).strftime("%H:%M")


def _zone(place: str) -> ZoneInfo:
    # "Paris, France" and "New York City" are in the zones of Paris and New York.
    first = _key(place.partition(",")[0])
    known = _zones()
    for key in (_key(place), first, first.removesuffix("_city")):
        if key in known:
            try:
                return ZoneInfo(known[key])
            except ZoneInfoNotFoundError:
                break
    raise UnknownPlace(f"no time zone is known for {place!r}; name a large city")


def _key(place: str) -> str:
    return "_".join(place.lower().replace(".", "").split())


@functools.cache
def _zones() -> dict[str, str]:
    """Zones by their names and by their cities, as ``_key`` spells them."""
    zones: dict[str, str] = {}
    for name in sorted(available_timezones()):
        zones.setdefault(_key(name), name)
        zones.setdefault(_key(name.rpartition("/")[2]), name)
    for name, cities in _MORE.items():
        zones |= dict.fromkeys(cities.split(), name)
    return zones
