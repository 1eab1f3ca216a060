"""Put the kept results into the README: ``python -m tests.clients.readme``."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.readme import README, between_marks
from tests.clients.matrix import HEADINGS, kept, short_table

__all__ = ["with_table"]


def with_table(text: str) -> str:
    """Return the README's text with the table of the kept results between its marks."""
    return between_marks(text, "clients", _lines())


def _lines() -> Iterator[str]:
    yield f"| library | APIs | {' | '.join(HEADINGS)} |"
    yield "|---" * (2 + len(HEADINGS)) + "|"
    for line in short_table(kept()):
        yield f"| {' | '.join(line)} |"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
