"""What must be so before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

# How fast inputs are drawn says something of the machine's load alone.
settings.register_profile("millrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("millrace")

# Without a GPU its kernels run in Triton's interpreter, which triton asks for at its first import,
# and that may be by any test that imports transformers.
if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
