"""``python -m kernels.cpu``: build the compiled ops ahead of time and print where they are."""

from __future__ import annotations

from kernels.cpu.build import library

if __name__ == "__main__":
    print(library())
