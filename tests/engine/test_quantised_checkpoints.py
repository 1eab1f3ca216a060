"""Checkpoints of 8 and 4 bits: written and read bit for bit, what is wrong with one is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import Device, EngineConfig, Quantization
from engine.errors import CheckpointError, ConfigError
from engine.loader import WeightSource
from engine.model_config import read_model_config
from engine.quantisation import SCHEMES, quantise
from engine.quantised_tensors import layout_of
from engine.quantization_config import Layout
from engine.runner import Runner
from engine.train.load import load_model
from engine.train.quantising.plan import QuantiseSettings
from engine.train.quantising.run import Result, quantise_checkpoint
from kernels import QuantisedWeight, dequantise
from tests.engine.checkpoints import Shape, make
from tests.engine.harness import Engine

SHAPE = Shape(hidden_size=128, intermediate_size=256, num_layers=2, dtype=torch.bfloat16)
CHOICES = [Quantization.FP8, Quantization.INT8, Quantization.INT4]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Silent:
    def stage(self, text: str, fraction: float) -> None:
        assert 0 <= fraction <= 1, text


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base"), SHAPE)[0]


def written(base: Path, out: Path, scheme: Quantization, **more: Any) -> Result:
    settings = QuantiseSettings(model=str(base), out=out, scheme=scheme, measure=False, **more)
    return quantise_checkpoint(settings, Silent())


def matrices(base: Path) -> list[str]:
    return [name for name in load_file(base / "model.safetensors") if name.endswith("proj.weight")]


def dense_copy(base: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """The checkpoint with its matrices changed, in bfloat16."""
    out.mkdir()
    tensors = load_file(base / "model.safetensors")
    for name in matrices(base):
        tensors[name] = change(name, tensors[name]).to(torch.bfloat16)
    save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text((base / "config.json").read_text())
    return out


def answers(path: Path, **settings: Any) -> Any:
    answer = Engine(path, **settings).generate(PROMPT, max_tokens=6, logprobs=5, prompt_logprobs=3)
    return answer.token_ids, answer.logprobs, answer.prompt_logprobs


@pytest.mark.parametrize("choice", CHOICES)
def test_a_written_checkpoint_answers_as_its_numbers_do(
    base: Path, choice: Quantization, tmp_path: Path
) -> None:
    """Bit for bit: log-probabilities are compared as they are."""
    result = written(base, tmp_path / "few", choice)
    assert result.num_quantised == 14
    assert result.bytes_after < result.bytes_before
    scheme = SCHEMES[choice]
    dense = dense_copy(
        base, tmp_path / "dense", lambda _, w: dequantise(quantise(w, scheme), torch.bfloat16)
    )
    wanted = answers(dense)
    assert answers(tmp_path / "few") == wanted
    assert answers(base, quantization=choice) == wanted
    assert answers(base) != wanted
    runner = Engine(tmp_path / "few").runner
    assert runner.info.quantization == layout_of(scheme).value
    assert Engine(base, quantization=choice).runner.info.quantization == choice.value


@pytest.mark.parametrize("choice", CHOICES)
def test_shards_hold_the_same(base: Path, choice: Quantization, tmp_path: Path) -> None:
    written(base, tmp_path / "one", choice)
    written(base, tmp_path / "many", choice, max_shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert not list((tmp_path / "many").glob("part-*"))
    assert answers(tmp_path / "one") == answers(tmp_path / "many")


def test_transformers_own_names_are_in_the_configuration(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "out", Quantization.INT4, keep=("lm_head", "down_proj", "*.0.mlp.*"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 128
    tensors = load_file(tmp_path / "out/model.safetensors")
    packed = tensors["model.layers.1.mlp.up_proj.weight_packed"]
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (256, 16))
    # Eight to a word, the first one lowest, each plus eight.
    original = load_file(base / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    scale = tensors["model.layers.1.mlp.up_proj.weight_scale"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (256, 1))
    digits = torch.stack([(packed.long() >> (4 * place)) & 15 for place in range(8)], 2).flatten(1)
    wanted = (original.double() / scale.double()).round().clamp(-7, 7)
    assert torch.equal(digits.double() - 8, wanted)
    assert tensors["model.layers.1.mlp.up_proj.weight_shape"].tolist() == [256, 128]
    assert "model.layers.0.mlp.up_proj.weight" in tensors


def test_narrow_matrices_stay_as_they_are(tmp_path: Path) -> None:
    base, _ = make(tmp_path / "base", Shape(dtype=torch.bfloat16, num_layers=1))
    result = written(base, tmp_path / "out", Quantization.INT4)
    assert result.too_narrow == tuple(
        f"model.layers.0.{part}" for part in ("self_attn.qkv", "mlp.gate_up", "mlp.down")
    )
    assert answers(tmp_path / "out") == answers(base, quantization=Quantization.INT4)


def qwen_fp8(base: Path, out: Path) -> None:
    """The layout of Qwen3's published FP8 checkpoints: blocks of 128 x 128, scales in bfloat16."""
    out.mkdir()
    tensors = load_file(base / "model.safetensors")
    for name in matrices(base):
        weight = tensors[name]
        rows, width = weight.shape
        scales = torch.empty(-(-rows // 128), -(-width // 128))
        blocks = weight.float()
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = blocks[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                scales[i, j] = (block.abs().max() / 448).bfloat16()
                block /= scales[i, j]
        tensors[name] = blocks.clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales.bfloat16()
    save_file(tensors, out / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = QWEN_FP8
    (out / "config.json").write_text(json.dumps(config))


QWEN_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def test_blocks_as_qwen_publishes_them(base: Path, tmp_path: Path) -> None:
    qwen_fp8(base, tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8/model.safetensors")

    def stands_for(name: str, weight: torch.Tensor) -> torch.Tensor:
        scales = tensors[f"{name}_scale_inv"].float()
        spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
        return tensors[name].float() * spread[:, : weight.shape[1]]

    dense = dense_copy(base, tmp_path / "dense", stands_for)
    assert answers(tmp_path / "fp8") == answers(dense)
    config = read_model_config(tmp_path / "fp8")
    source = WeightSource(tmp_path / "fp8", torch.bfloat16, stored=config.quantization)
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    joined = source.take_linear(names, [256, 256], 128)
    assert isinstance(joined, QuantisedWeight)
    assert joined.scales.shape == (4, 1)


# As documents of compressed-tensors, llm-compressor and vLLM show them.
GROUP: dict[str, Any] = {
    "input_activations": {
        "actorder": None, "block_structure": None, "dynamic": True, "group_size": None,
        "num_bits": 8, "observer": "memoryless", "observer_kwargs": {}, "strategy": "token",
        "symmetric": True, "type": "int",
    },
    "output_activations": None,
    "targets": ["Linear"],
    "weights": {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
        "num_bits": 8, "observer": "minmax", "observer_kwargs": {}, "strategy": "channel",
        "symmetric": True, "type": "int",
    },
}  # fmt: skip
W8A8: dict[str, Any] = {
    "config_groups": {"group_0": GROUP},
    "format": "int-quantized",
    "global_compression_ratio": 1.2697642717533653,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.2",
}


def changed(*path: str, value: object, start: dict[str, Any] = W8A8) -> dict[str, Any]:
    """A copy with one field changed."""
    copy: dict[str, Any] = json.loads(json.dumps(start))
    inner = copy
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return copy


WEIGHTS = ("config_groups", "group_0", "weights")
W4A16 = changed("format", value="pack-quantized")
W4A16["config_groups"] = {
    "group_0": {
        "targets": ["Linear"],
        "input_activations": None,
        "output_activations": None,
        "weights": {
            **GROUP["weights"], "num_bits": 4, "group_size": 128, "strategy": "group",
            "actorder": "static",
        },
    }
}  # fmt: skip
FP8_DYNAMIC = changed(*WEIGHTS, "type", value="float")
FP8_DYNAMIC["format"] = "float-quantized"


def with_config(base: Path, out: Path, quantization: object) -> Path:
    out.mkdir(exist_ok=True)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("quantization", "layout", "group"),
    [
        (W8A8, Layout.INT, 0),
        (W4A16, Layout.PACKED, 128),
        (FP8_DYNAMIC, Layout.FLOAT, 0),
        (changed(*WEIGHTS, "strategy", value="tensor", start=FP8_DYNAMIC), Layout.FLOAT, 0),
        (QWEN_FP8, Layout.FP8_BLOCKS, 128),
    ],
)
def test_real_configurations_are_read(
    base: Path, quantization: object, layout: Layout, group: int, tmp_path: Path
) -> None:
    found = read_model_config(with_config(base, tmp_path, quantization)).quantization
    assert found is not None
    assert (found.layout, found.group_size) == (layout, group)


ACTIVATIONS = ("config_groups", "group_0", "input_activations")
UNSUPPORTED: list[tuple[object, str]] = [
    ("fp8", "quantization_config is 'fp8'; it must be an object"),
    ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'; it must be compressed-tensors"),
    ({"quant_method": "awq"}, r"supported are .* \(pack-quantized\), and fp8"),
    (changed("format", value="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'; it must"),
    (changed("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme.type is missing"),
    (changed("sparsity_config", value={"format": "sparse-24"}), "sparsity_config.format is"),
    (changed("quantization_status", value="frozen"), "quantization_status is 'frozen'"),
    (changed("config_groups", value={"a": GROUP, "b": GROUP}), "must have one group"),
    (changed("config_groups", value={}), "must have one group"),
    (changed("config_groups", "group_0", "targets", value=["re:.*"]), r"targets is \['re:\.\*'\]"),
    (changed(*WEIGHTS, "num_bits", value=4), "num_bits is 4; it must be 8 for int-quantized"),
    (changed(*WEIGHTS, "symmetric", value=False), "zero points are not supported"),
    (changed(*WEIGHTS, "strategy", value="group"), "must be channel or tensor for int-quantized"),
    (changed(*WEIGHTS, "actorder", value="group"), "reordering is not supported"),
    (changed(*WEIGHTS, "group_size", value=48, start=W4A16), "must be 32, 64, 128 or 256"),
    (changed(*WEIGHTS, "num_bits", value=8, start=W4A16), "must be 4 for pack-quantized"),
    (changed(*ACTIVATIONS, "dynamic", value=False), "static scales are not supported"),
    ({**QWEN_FP8, "weight_block_size": [64, 64]}, r"it must be \[128, 128\]"),
    ({**QWEN_FP8, "weight_block_size": None}, r"it must be \[128, 128\]"),
    ({**QWEN_FP8, "activation_scheme": "static"}, "activation_scheme is 'static'"),
    ({**QWEN_FP8, "fmt": "e5m2"}, "fmt is 'e5m2'; it must be e4m3"),
]


@pytest.mark.parametrize(("quantization", "message"), UNSUPPORTED)
def test_what_is_not_supported_is_named(
    base: Path, quantization: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(with_config(base, tmp_path, quantization))
    assert "config.json: quantization_config" in str(caught.value)


def test_a_scale_of_the_whole_matrix(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "out", Quantization.FP8)
    path = tmp_path / "out/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[f"{name}_scale"] = torch.tensor([0.01], dtype=torch.bfloat16)
    save_file(tensors, path)
    config = read_model_config(tmp_path / "out")
    source = WeightSource(tmp_path / "out", torch.bfloat16, stored=config.quantization)
    weight = source.take_linear([name], [128], 256)
    assert isinstance(weight, QuantisedWeight)
    scale = torch.tensor(0.01).bfloat16().float()
    assert torch.equal(weight.scales, scale.expand(128))
    assert torch.equal(source.take(name, [128, 256]), dequantise(weight, torch.bfloat16))


DOWN = "model.layers.1.mlp.down_proj.weight"
Damage = Callable[[dict[str, torch.Tensor]], object]
DAMAGED: dict[str, tuple[Quantization, Damage, str]] = {
    "scales of another shape": (
        Quantization.FP8,
        lambda t: t.update({f"{DOWN}_scale": torch.ones(64, 1)}),
        r"down_proj.weight_scale has shape \[64, 1\]; by config.json it must be \[128, 1\]",
    ),
    "scales that are no floats": (
        Quantization.INT8,
        lambda t: t.update({f"{DOWN}_scale": torch.ones(128, 1, dtype=torch.int8)}),
        "down_proj.weight_scale is stored as I8; it must be BF16 or F16 or F32",
    ),
    "scales that are not finite": (
        Quantization.INT8,
        lambda t: t[f"{DOWN}_scale"].fill_(float("inf")),
        "down_proj.weight_scale holds values that are not finite",
    ),
    "numbers that are not finite": (
        Quantization.FP8,
        lambda t: t[DOWN].view(torch.uint8)[3, 5:6].fill_(0xFF),
        "down_proj.weight holds values that are not finite",
    ),
    "numbers of another type": (
        Quantization.FP8,
        lambda t: t.update({DOWN: t[DOWN].view(torch.int8)}),
        "down_proj.weight is stored as I8; it must be F8_E4M3",
    ),
    "missing scales": (
        Quantization.INT8,
        lambda t: t.pop(f"{DOWN}_scale"),
        "down_proj.weight is stored as I8; supported are BF16, F16, F32",
    ),
    "missing numbers": (
        Quantization.INT4,
        lambda t: t.pop(f"{DOWN}_packed"),
        "down_proj.weight_packed of a quantised matrix is missing",
    ),
    "another shape stated": (
        Quantization.INT4,
        lambda t: t[f"{DOWN}_shape"].fill_(256),
        r"weight_shape is \[256, 256\]; by config.json it must be \[128, 256\]",
    ),
    "words of another shape": (
        Quantization.INT4,
        lambda t: t.update({f"{DOWN}_packed": torch.zeros(128, 16, dtype=torch.int32)}),
        r"weight_packed has shape \[128, 16\]; by config.json it must be \[128, 32\]",
    ),
    "zero points": (
        Quantization.INT4,
        lambda t: t.update({f"{DOWN}_zero_point": torch.zeros(128, 2, dtype=torch.int32)}),
        "tensors that the model does not have: .*weight_zero_point",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_refused(base: Path, name: str, tmp_path: Path) -> None:
    choice, damage, message = DAMAGED[name]
    written(base, tmp_path / "out", choice)
    tensors = load_file(tmp_path / "out/model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Runner(EngineConfig(model=str(tmp_path / "out"), device=Device.CPU, num_threads=1))


def test_what_is_quantised_is_not_quantised_again(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "out", Quantization.INT8)
    with pytest.raises(ConfigError, match=r"quantised already .int-quantized.; leave it at none"):
        answers(tmp_path / "out", quantization=Quantization.INT4)
    with pytest.raises(ConfigError, match="quantised already"):
        written(tmp_path / "out", tmp_path / "again", Quantization.INT8)
    with pytest.raises(CheckpointError, match="train the model they were made from"):
        load_model(tmp_path / "out", torch.float32)


def test_where_a_run_must_not_write(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(base, out, Quantization.INT8)
    with pytest.raises(ConfigError, match="is there already"):
        written(base, out, Quantization.FP8)
    written(base, out, Quantization.FP8, overwrite=True)
    assert read_model_config(out).quantization is not None
    (out / "quantize.json").unlink()
    with pytest.raises(ConfigError, match="was not made by quantising"):
        written(base, out, Quantization.FP8, overwrite=True)
    with pytest.raises(ConfigError, match="no module of this model is called q_prj"):
        written(base, tmp_path / "other", Quantization.FP8, keep=("q_prj",))
    assert not (tmp_path / "other").exists()
