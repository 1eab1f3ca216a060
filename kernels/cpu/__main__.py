"""``python -m kernels.cpu``: build the compiled ops ahead of time and print where they are."""

from __future__ import annotations

from kernels.cpu.build import BuildError, library

if __name__ == "__main__":
    try:
        print(f"CPU kernels: {library()}")
    except BuildError as error:
        # No reason to fail a set-up: the ops fall back to torch, more slowly.
        print(f"CPU kernels: {error}; torch's own operations will be used")
