"""The models whose sizes are measured, and the tiny one that stands for them in a dry run."""

from __future__ import annotations

from tests.bench.checkpoints import SHAPES, Shape
from tests.gpu.setting import Setting

__all__ = ["GPU_SHAPES", "shape_of"]

GPU_SHAPES = {
    "0.6b": SHAPES["0.6b"],
    "4b": Shape(2560, 36, 32, 8, 128, 9728, 151_936),
    "8b": Shape(4096, 36, 32, 8, 128, 12_288, 151_936, tied=False),
    "14b": Shape(5120, 40, 40, 8, 128, 17_408, 151_936, tied=False),
    # Qwen3-30B-A3B's attention, and as one feed-forward layer the 8 experts of 768 that a token
    # gets: what it reads and computes for one token but for the router.
    "30b-a3b-dense": Shape(2048, 48, 32, 4, 128, 6144, 151_936, tied=False),
}

_DRY = Shape(128, 2, 4, 2, 16, 128, 1000, tied=False)


def shape_of(setting: Setting, model: str) -> Shape:
    """The sizes of this model in this run."""
    return _DRY if setting.dry else GPU_SHAPES[model]
