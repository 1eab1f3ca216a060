"""The kernels' comparisons at the sizes of real layers, and at small ones for the memory checker.

    python -m tests.gpu.comparisons [--dry]

runs the small ones, and nothing else, so that a checker that slows each launch a hundredfold ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch

from tests.gpu.setting import Setting, dry_environment

__all__ = ["LAYERS", "SMALL", "compare_all"]

Comparison = tuple[str, dict[str, Any]]

SMALL: tuple[Comparison, ...] = (
    ("embed", {"tokens": 5, "vocab": 33, "width": 130}),
    ("gather_rows", {"tokens": 9, "rows": 4, "width": 130}),
    ("rms_norm", {"tokens": 5, "width": 513}),
    ("add_rms_norm", {"tokens": 5, "width": 513}),
    ("swiglu", {"tokens": 5, "width": 130}),
    ("qk_norm_rope_write", {"tokens": 6, "q_heads": 6, "kv_heads": 3, "head_dim": 64, "padded": 2}),
    ("paged_attention", {"new": [1, 0, 7, 40], "context": [33, 0, 50, 40], "q_heads": 4,
                         "kv_heads": 2, "head_dim": 64, "padded_tokens": 3}),
    ("linear", {"tokens": 5, "width": 130, "features": 70}),
    ("linear", {"tokens": 130, "width": 64, "features": 70}),
    ("apply_penalties", {"rows": 4, "vocab": 100, "count": 301}),
    ("add_bias", {"rows": 4, "vocab": 100, "count": 301}),
    ("apply_token_mask", {"rows": 3, "vocab": 1001}),
    ("sample", {"rows": 8, "vocab": 1100}),
    ("logprobs", {"rows": 3, "vocab": 2500, "k": 5}),
    ("rms_norm_fp8", {"tokens": 5, "width": 130}),
    ("add_rms_norm_fp8", {"tokens": 5, "width": 130}),
    ("swiglu_fp8", {"tokens": 5, "width": 130}),
    ("qk_norm_rope_write_fp8", {"tokens": 6, "q_heads": 4, "kv_heads": 2, "head_dim": 64}),
)  # fmt: skip

LAYERS: tuple[Comparison, ...] = (
    ("embed", {"tokens": 300, "vocab": 4000, "width": 4096}),
    ("add_rms_norm", {"tokens": 300, "width": 4096}),
    ("swiglu", {"tokens": 100, "width": 12_288}),
    ("qk_norm_rope_write", {"tokens": 300, "q_heads": 32, "kv_heads": 8, "head_dim": 128}),
    ("paged_attention", {"new": [1] * 6, "context": [1, 15, 16, 700, 1023, 1024], "q_heads": 32,
                         "kv_heads": 8, "head_dim": 128}),
    ("paged_attention", {"new": [300, 1, 17], "context": [300, 900, 500], "q_heads": 16,
                         "kv_heads": 8, "head_dim": 128}),
    ("linear", {"tokens": 1, "width": 4096, "features": 6144}),
    ("linear", {"tokens": 64, "width": 12_288, "features": 1024}),
    ("linear", {"tokens": 300, "width": 1024, "features": 4096}),
    ("sample", {"rows": 16, "vocab": 151_936}),
    ("logprobs", {"rows": 4, "vocab": 151_936, "k": 20}),
    ("add_rms_norm_fp8", {"tokens": 300, "width": 4096}),
    ("swiglu_fp8", {"tokens": 100, "width": 12_288}),
    ("qk_norm_rope_write_fp8", {"tokens": 300, "q_heads": 32, "kv_heads": 8, "head_dim": 128}),
)  # fmt: skip


def compare_all(
    setting: Setting, wanted: tuple[Comparison, ...], dtype: torch.dtype
) -> Mapping[str, int]:
    """Run them with activations, weights and cache of this type; how often each op was compared.

    Raises AssertionError where the device and the oracle disagree.
    """
    from kernels import gpu
    from kernels.fp8 import Fp8Ops
    from tests.kernels import comparisons, comparisons_fp8
    from tests.kernels.gpu.on_device import on_device

    ops = on_device(gpu.load(setting.device.type), setting.device)
    done: dict[str, int] = {}
    for name, sizes in wanted:
        fp8 = name.endswith("_fp8")
        compare: Any = getattr(comparisons_fp8 if fp8 else comparisons, name)
        kinds = {"act": dtype, "weight": dtype, "cache": dtype}
        asked = compare.__kwdefaults__ or {}
        more = {kind: value for kind, value in kinds.items() if kind in asked}
        compare(cast(Fp8Ops, ops) if fp8 else ops, **sizes, **more)
        done[name] = done.get(name, 0) + 1
    return done


def main() -> None:
    """The small ones, in the types that the device computes with."""
    dry = "--dry" in sys.argv
    if dry:
        os.environ.update(dry_environment())
    device = torch.device("cpu" if dry else "cuda")
    setting = Setting(dry, device, out=cast(Any, None), until_s=float("inf"))
    for dtype in (torch.float32, setting.act):
        print(dtype, dict(compare_all(setting, SMALL, dtype)), flush=True)


if __name__ == "__main__":
    main()
