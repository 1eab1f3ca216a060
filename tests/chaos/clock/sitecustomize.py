"""A wall clock that can be moved: loaded by every Python that starts with this folder on its path.

``CHAOS_CLOCK`` names a file of one double, the seconds by which ``time.time`` is off. What is
meant to measure durations (``time.monotonic``) stays, as it does when a machine's clock is set.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

_path = os.environ.get("CHAOS_CLOCK")

if _path:
    with open(_path, "r+b") as _file:
        _view = mmap.mmap(_file.fileno(), 8)
    _real = time.time

    def _moved() -> float:
        return _real() + float(struct.unpack("d", _view[:8])[0])

    time.time = _moved
