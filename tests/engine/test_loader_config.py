"""``config.json``: both layouts read alike, every impossible or unsupported field is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from engine.config import Dtype
from engine.errors import CheckpointError
from engine.model_config import ModelConfig, read_model_config
from engine.models.layers import rope_table

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "eos_token_id": 3,
    "torch_dtype": "bfloat16",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def read(directory: Path, generation: object = None, **changes: object) -> ModelConfig:
    document = {**BASE, **changes}
    document = {name: value for name, value in document.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(document))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return read_model_config(directory)


def test_reads_the_old_layout(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.rope.theta, config.rope.yarn) == (1e6, None)
    assert config.dtype is Dtype.BFLOAT16
    assert config.eos_token_ids == (3,)
    assert config.rms_norm_eps == 1e-6
    assert not config.tie_word_embeddings
    assert config.max_context == 512


def test_both_rope_layouts_mean_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_scaling=YARN)
    new = read(tmp_path, rope_theta=..., rope_parameters={"rope_theta": 1e6, **YARN})
    assert old == new
    oldest = {("type" if name == "rope_type" else name): value for name, value in YARN.items()}
    assert read(tmp_path, rope_scaling=oldest) == new
    assert read(tmp_path, rope_scaling=None) == read(
        tmp_path, rope_theta=..., rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
    )


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    config = read(tmp_path, rope_scaling={**YARN, "factor": 8.0})
    assert config.max_context == 1024
    assert config.rope.yarn is not None
    assert config.rope.yarn.attention_factor == pytest.approx(0.1 * math.log(8) + 1)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    config = read(tmp_path, generation={"eos_token_id": [9, 3]}, eos_token_id=[3, 4])
    assert config.eos_token_ids == (9, 3, 4)
    (tmp_path / "generation_config.json").unlink()
    assert read(tmp_path, eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "torch.float16"])
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_dtype(field: str, name: str, tmp_path: Path) -> None:
    config = read(tmp_path, **{"torch_dtype": None, field: name})
    assert config.dtype is Dtype(name.removeprefix("torch."))


def test_dtype_may_be_absent(tmp_path: Path) -> None:
    assert read(tmp_path, torch_dtype=...).dtype is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ...}, "architectures is missing; it must be a list"),
    ({"architectures": []}, r"architectures is \[\]"),
    ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM'; it must be a"),
    ({"vocab_size": 0}, "vocab_size is 0; it must be a positive integer"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"intermediate_size": 96.0}, r"intermediate_size is 96\.0"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": ...}, "num_attention_heads is missing"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads"),
    ({"head_dim": 33}, "head_dim is 33; it must be even"),
    ({"head_dim": None}, "head_dim is None"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1; it must be a number above 0"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps is 'tiny'"),
    ({"attention_bias": True}, "attention_bias is True; it must be false"),
    ({"attention_bias": "no"}, "attention_bias is 'no'; it must be true or false"),
    ({"use_sliding_window": True}, "use_sliding_window is True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
    (
        {"quantization_config": {"bits": 4}},
        "quantization_config.quant_method is missing; it must be",
    ),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; it must be bfloat16, float16 or float32"),
    ({"torch_dtype": 16}, "torch_dtype is 16"),
    ({"eos_token_id": 1000}, r"eos_token_id is 1000; it must name tokens in 0\.\.999"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"rope_theta": 0}, "rope_theta is 0"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
    (
        {"rope_scaling": {"rope_type": "llama3"}},
        r"rope_type is 'llama3'; it must be default or yarn",
    ),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "type is 'linear'"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters.rope_type is"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor is 0.5; it must be a number of at least 1"),
    ({"rope_scaling": {**YARN, "factor": math.inf}}, "factor is inf"),
    (
        {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}},
        "beta_fast is 1; it must be above",
    ),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max.* is 0"),
    ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor is -1"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"[1]", "holds a list; it must be an object"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (None, "does not exist; a checkpoint needs it"),
    ],
)
def test_files_that_are_no_config(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        YARN,
        {**YARN, "truncate": False},
        {**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "factor": 16.0},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "attention_factor": 0.9},
        {**YARN, "rope_theta": 100.0, "original_max_position_embeddings": 4096},
        {"rope_type": "yarn", "factor": 2.0},
    ],
)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_rotary_tables_are_those_of_transformers(
    rope: dict[str, Any], head_dim: int, tmp_path: Path
) -> None:
    theirs = Qwen3Config(
        head_dim=head_dim, max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope}
    )
    theirs.architectures = ["Qwen3ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    cos, sin = Qwen3RotaryEmbedding(theirs)(torch.zeros(1), torch.arange(512)[None])
    table = rope_table(config.rope, head_dim, 512)
    half = head_dim // 2
    # transformers multiplies in float32: at position 511 that is good for about 3e-5.
    assert torch.allclose(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-4)
    assert torch.allclose(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-4)


def test_rotary_table_is_exact_at_long_positions() -> None:
    from engine.model_config import Rope

    table = rope_table(Rope(theta=1e6), 64, 10_001)
    angle = 10_000 * 1e6 ** (-6 / 64)
    assert table[10_000, 3].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert table[10_000, 32 + 3].item() == pytest.approx(math.sin(angle), abs=1e-7)
