"""What a checkpoint's ``config.json`` says of its model, read strictly.

Both layouts of the rotary settings are read: ``rope_theta`` beside ``rope_scaling`` (transformers
up to 4) and ``rope_parameters`` (from 5 on). A field that is missing, impossible or asks for what
is not supported raises ``CheckpointError`` naming file, field and value.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

from engine.config import Dtype
from engine.json_file import Fields, read_json
from engine.quantization_config import StoredQuantization, read_quantization

__all__ = ["ModelConfig", "Rope", "Yarn", "read_model_config"]

_DTYPES = {
    "bfloat16": Dtype.BFLOAT16,
    "float16": Dtype.FLOAT16,
    "half": Dtype.FLOAT16,
    "float32": Dtype.FLOAT32,
    "float": Dtype.FLOAT32,
}


class Yarn(msgspec.Struct, frozen=True, kw_only=True):
    """YaRN context extension (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float
    """By how much the context grows, >= 1."""
    original_max_position_embeddings: int
    """Context of the model before the extension."""
    attention_factor: float
    """Multiplies cosines and sines; resolved from ``mscale`` where the file does not give it."""
    beta_fast: float
    """Dimensions that turn more often than this over the original context keep their frequency."""
    beta_slow: float
    """Dimensions that turn less often than this are interpolated in full."""
    truncate: bool
    """Whether the borders between the two are rounded outward to whole dimensions."""


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

    theta: float
    """Base of the frequencies."""
    yarn: Yarn | None = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and settings of a decoder-only transformer, all of them checked."""

    architecture: str
    """First of the file's ``architectures``; picks the model family."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Divides ``num_heads``."""
    head_dim: int
    """Even; need not be ``hidden_size / num_heads``."""
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    """From ``generation_config.json`` and ``config.json``, without repeats."""
    dtype: Dtype | None
    """The stored type the file names, if it does; never ``AUTO``."""
    quantization: StoredQuantization | None
    """How the weight matrices are stored, where in fewer bits than that."""

    @property
    def max_context(self) -> int:
        """Most tokens the positions reach: with YaRN the extended context."""
        if self.rope.yarn is None:
            return self.max_position_embeddings
        extended = self.rope.yarn.factor * self.rope.yarn.original_max_position_embeddings
        return max(self.max_position_embeddings, int(extended))


def read_model_config(directory: Path) -> ModelConfig:
    """Read ``config.json`` and, for the end tokens, ``generation_config.json``.

    Raises CheckpointError as the module says.
    """
    fields = Fields(directory / "config.json", read_json(directory / "config.json"))
    architectures = fields.get("architectures")
    if (
        not isinstance(architectures, list)
        or not architectures
        or not isinstance(architectures[0], str)
    ):
        raise fields.wrong("architectures", "must be a list of class names")
    _refuse_unsupported(fields)
    config = ModelConfig(
        architecture=architectures[0],
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.size("num_attention_heads"),
        num_kv_heads=fields.size("num_key_value_heads"),
        head_dim=fields.size("head_dim"),
        max_position_embeddings=fields.size("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, 0.0),
        rope=_read_rope(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        eos_token_ids=_read_eos(directory, fields),
        dtype=_read_dtype(fields),
        quantization=read_quantization(fields),
    )
    if config.num_heads % config.num_kv_heads:
        raise fields.wrong(
            "num_key_value_heads", f"must divide num_attention_heads, which is {config.num_heads}"
        )
    if config.head_dim % 2:
        raise fields.wrong("head_dim", "must be even for rotary positions")
    return config


def _refuse_unsupported(fields: Fields) -> None:
    if fields.flag("attention_bias", False):
        raise fields.wrong("attention_bias", "must be false: attention biases are not supported")
    if fields.flag("use_sliding_window", False):
        raise fields.wrong("use_sliding_window", "must be false: sliding windows are not supported")
    layer_types = fields.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise fields.wrong("layer_types", "must name full_attention for every layer")
    if fields.get("hidden_act") not in (None, "silu", "swish"):
        raise fields.wrong("hidden_act", "must be silu")


def _read_rope(fields: Fields) -> Rope:
    rope = fields.object("rope_parameters")
    if rope is None:
        theta = fields.number("rope_theta", 10000.0, 1.0)
        rope = fields.object("rope_scaling") or Fields(fields.path, {})
    else:
        theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, 1.0), 1.0)
    key = "type" if "rope_type" not in rope.document and "type" in rope.document else "rope_type"
    kind = rope.get(key) or "default"
    if kind not in ("default", "yarn"):
        raise rope.wrong(key, "must be default or yarn; other rotary scalings are not supported")
    if rope.number("partial_rotary_factor", 1.0, 0.0) != 1.0:
        raise rope.wrong("partial_rotary_factor", "must be 1: partial rotation is not supported")
    return Rope(theta=theta, yarn=_read_yarn(rope, fields) if kind == "yarn" else None)


def _read_yarn(rope: Fields, fields: Fields) -> Yarn:
    max_positions = fields.size("max_position_embeddings")
    if rope.get("original_max_position_embeddings") is None:
        original = max_positions
    else:
        original = rope.size("original_max_position_embeddings")
    factor = rope.number("factor", max(1.0, max_positions / original), 1.0)
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all:
        scale = _mscale(factor, rope.number("mscale", 1.0, 0.0))
        inferred = scale / _mscale(factor, rope.number("mscale_all_dim", 1.0, 0.0))
    else:
        inferred = _mscale(factor, 1.0)
    yarn = Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", inferred, 0.0),
        beta_fast=rope.number("beta_fast", 32.0, 0.0),
        beta_slow=rope.number("beta_slow", 1.0, 0.0),
        truncate=rope.flag("truncate", True),
    )
    if yarn.beta_fast <= yarn.beta_slow:
        raise rope.wrong("beta_fast", f"must be above beta_slow, which is {yarn.beta_slow}")
    return yarn


def _mscale(factor: float, mscale: float) -> float:
    """Section 3.4 of the YaRN paper: how much sharper attention must be on a longer context."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_eos(directory: Path, fields: Fields) -> tuple[int, ...]:
    sources = [fields]
    generation = directory / "generation_config.json"
    if generation.exists():
        sources.insert(0, Fields(generation, read_json(generation)))
    found: list[int] = []
    vocab_size = fields.size("vocab_size")
    for source in sources:
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if type(token) is not int or not 0 <= token < vocab_size:
                raise source.wrong("eos_token_id", f"must name tokens in 0..{vocab_size - 1}")
            found.append(token)
    return tuple(dict.fromkeys(found))


def _read_dtype(fields: Fields) -> Dtype | None:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if value is None:
        return None
    dtype = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if dtype is None:
        raise fields.wrong(name, "must be bfloat16, float16 or float32")
    return dtype
