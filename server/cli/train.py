"""``millrace train``: the training program of the engine, with its own options."""

from __future__ import annotations

__all__ = ["train"]


def train(arguments: list[str]) -> int:
    """Run ``python -m engine.train`` with these arguments; return its exit status."""
    # Imported here: it loads torch, which no other command needs in this process.
    from engine.train.__main__ import main

    return main(arguments)
