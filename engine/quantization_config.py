"""How a checkpoint says that its weights have 8 or 4 bits: ``quantization_config``, read strictly.

Two ways are read: that of compressed-tensors, in which llm-compressor and ``millrace quantize``
write, and that of the FP8 checkpoints of Qwen3 and DeepSeek-V3. Whether a matrix *is* quantised is
not asked of the lists of ignored modules (whose regular expressions are never run) but of the
tensors: a quantised one has scales.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import msgspec

from engine.json_file import Fields

__all__ = ["Layout", "StoredQuantization", "compressed_tensors_config", "read_quantization"]


class Layout(Enum):
    """The tensors that stand for a matrix ``X.weight``; see ``engine.quantised_tensors``."""

    FLOAT = "float-quantized"
    INT = "int-quantized"
    PACKED = "pack-quantized"
    FP8_BLOCKS = "fp8"


class StoredQuantization(msgspec.Struct, frozen=True, kw_only=True):
    """What ``quantization_config`` says of the weights."""

    layout: Layout
    group_size: int = 0
    """Elements of a row that share a scale (PACKED, FP8_BLOCKS); 0: a whole row or matrix."""
    fp8_kv_cache: bool = False
    """Keys and values are meant to be cached as 8-bit floats, with scales of the checkpoint."""


_SUPPORTED = (
    "supported are compressed-tensors with 8-bit floats or integers by channel or tensor "
    "(float-quantized, int-quantized) or 4-bit integers by group (pack-quantized), and "
    "fp8 with weight_block_size [128, 128]"
)


def read_quantization(fields: Fields) -> StoredQuantization | None:
    """What ``config.json`` says; None where the weights are not quantised.

    Raises CheckpointError naming the field that asks for what is not supported.
    """
    stated = fields.object("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method")
    if method == "compressed-tensors":
        return _read_compressed_tensors(stated)
    if method == "fp8":
        return _read_fp8(stated)
    raise stated.wrong("quant_method", f"must be compressed-tensors or fp8: {_SUPPORTED}")


def _read_fp8(stated: Fields) -> StoredQuantization:
    if stated.get("weight_block_size") != [128, 128]:
        raise stated.wrong("weight_block_size", "must be [128, 128]")
    if stated.get("fmt") not in (None, "e4m3"):
        raise stated.wrong("fmt", "must be e4m3")
    if stated.get("activation_scheme") not in (None, "dynamic"):
        raise stated.wrong("activation_scheme", "must be dynamic")
    return StoredQuantization(layout=Layout.FP8_BLOCKS, group_size=128)


def _read_compressed_tensors(stated: Fields) -> StoredQuantization:
    if stated.get("transform_config"):
        raise stated.wrong("transform_config", "must be null: this is not supported")
    sparsity = stated.object("sparsity_config")
    if sparsity is not None and sparsity.get("format") not in (None, "dense"):
        raise sparsity.wrong("format", "must be dense: sparse weights are not supported")
    if stated.get("quantization_status") not in (None, "compressed"):
        raise stated.wrong("quantization_status", "must be compressed")
    group = _only_group(stated)
    layout = _layout(stated, group)
    weights = group.object("weights")
    if weights is None:
        raise group.wrong("weights", "must be an object")
    if not weights.flag("symmetric", True):
        raise weights.wrong("symmetric", "must be true: zero points are not supported")
    if weights.get("dynamic"):
        raise weights.wrong("dynamic", "must be false")
    if weights.get("actorder") not in (None, "static", "weight"):
        raise weights.wrong("actorder", "must be null or static: reordering is not supported")
    activations = group.object("input_activations")
    if activations is not None and activations.get("dynamic") is not True:
        raise activations.wrong("dynamic", "must be true: static scales are not supported")
    if group.get("output_activations") is not None:
        raise group.wrong("output_activations", "must be null")
    quantization = _read_weights(layout, weights)
    return msgspec.structs.replace(quantization, fp8_kv_cache=_read_kv_cache(stated))


def _read_kv_cache(stated: Fields) -> bool:
    """Whether the checkpoint has scales for a cache of 8-bit floats."""
    scheme = stated.object("kv_cache_scheme")
    if scheme is None:
        return False
    if scheme.get("type") != "float":
        raise scheme.wrong("type", "must be float: a cache of integers is not supported")
    if scheme.get("num_bits") != 8:
        raise scheme.wrong("num_bits", "must be 8")
    if not scheme.flag("symmetric", True):
        raise scheme.wrong("symmetric", "must be true: zero points are not supported")
    if scheme.get("dynamic"):
        raise scheme.wrong("dynamic", "must be false: what is cached outlives its step")
    if scheme.get("strategy") not in ("tensor", "attn_head"):
        raise scheme.wrong("strategy", "must be tensor or attn_head")
    return True


def _only_group(stated: Fields) -> Fields:
    groups = stated.object("config_groups")
    if groups is None or len(groups.document) != 1:
        raise stated.wrong("config_groups", "must have one group: mixed schemes are not supported")
    name = next(iter(groups.document))
    group = groups.object(name)
    if group is None:
        raise groups.wrong(name, "must be an object")
    if group.get("targets") != ["Linear"]:
        raise group.wrong("targets", 'must be ["Linear"]')
    return group


def _layout(stated: Fields, group: Fields) -> Layout:
    source = group if group.get("format") is not None else stated
    known = (Layout.FLOAT, Layout.INT, Layout.PACKED)
    for layout in known:
        if source.get("format") == layout.value:
            return layout
    names = ", ".join(layout.value for layout in known)
    raise source.wrong("format", f"must be one of {names}: {_SUPPORTED}")


def _read_weights(layout: Layout, weights: Fields) -> StoredQuantization:
    bits = 4 if layout is Layout.PACKED else 8
    kind = "float" if layout is Layout.FLOAT else "int"
    if weights.get("num_bits") != bits:
        raise weights.wrong("num_bits", f"must be {bits} for {layout.value}")
    if weights.get("type") != kind:
        raise weights.wrong("type", f"must be {kind} for {layout.value}")
    if layout is not Layout.PACKED:
        if weights.get("strategy") not in ("channel", "tensor"):
            raise weights.wrong("strategy", f"must be channel or tensor for {layout.value}")
        return StoredQuantization(layout=layout)
    if weights.get("strategy") != "group":
        raise weights.wrong("strategy", f"must be group for {layout.value}")
    size = weights.size("group_size")
    if size not in (32, 64, 128, 256):
        raise weights.wrong("group_size", "must be 32, 64, 128 or 256")
    return StoredQuantization(layout=layout, group_size=size)


def compressed_tensors_config(
    quantization: StoredQuantization, ignore: list[str]
) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint in one of the layouts of compressed-tensors.

    Args:
        quantization: how its matrices are stored; FP8_BLOCKS is not one of those.
        ignore: names of the modules that are not quantised.
    """
    layout = quantization.layout
    floats = layout is Layout.FLOAT
    weights: dict[str, Any] = {
        "num_bits": 4 if layout is Layout.PACKED else 8,
        "type": "float" if floats else "int",
        "symmetric": True,
        "strategy": "group" if layout is Layout.PACKED else "channel",
        "group_size": quantization.group_size or None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    by_token = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        # Integers are multiplied by activations that are not rounded.
        "input_activations": by_token if floats else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout.value,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }
