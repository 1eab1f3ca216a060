"""Model families: one file each, on the shared layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engine.errors import CheckpointError
from engine.models.layers import KVCache, Model, Workspace, kv_block_bytes
from engine.models.qwen3 import Qwen3

__all__ = ["FAMILIES", "KVCache", "Model", "Workspace", "family_of", "kv_block_bytes"]

FAMILIES: Mapping[str, type[Qwen3]] = MappingProxyType({"Qwen3ForCausalLM": Qwen3})
"""Class name in a checkpoint's ``architectures`` -> who runs it."""


def family_of(architecture: str) -> type[Qwen3]:
    """The family that runs an architecture. Raises CheckpointError for one we do not have."""
    if architecture not in FAMILIES:
        raise CheckpointError(
            f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]
