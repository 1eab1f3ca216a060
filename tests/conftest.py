"""What must be so before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

# Without a GPU its kernels run in Triton's interpreter, which triton asks for at its first import,
# and that may be by any test that imports transformers.
if not any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
