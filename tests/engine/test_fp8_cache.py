"""A KV cache in 8-bit floats on the oracle's kernels: what it costs, its scales, who refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import KvCacheDtype
from engine.errors import CheckpointError, ConfigError
from engine.loader import WeightSource
from engine.model_config import read_model_config
from tests.engine.checkpoints import Shape, all_logprobs, load_float32, make
from tests.engine.harness import Engine
from tests.engine.test_quantised_checkpoints import FP8_DYNAMIC, changed, with_config

SHAPE = Shape(hidden_size=64, num_layers=2, dtype=torch.bfloat16)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 97, 93, 23, 84, 62, 64, 33, 83]
KV_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False,
             "strategy": "tensor"}  # fmt: skip
SMALL: dict[str, Any] = {"max_model_len": 64, "max_num_tokens": 32, "kv_memory_bytes": 1 << 18}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("base"), SHAPE)[0]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that know 8-bit floats on any machine."""
    monkeypatch.setenv("MILLRACE_KERNELS", "reference")


def with_scales(base: Path, out: Path, scales: dict[str, torch.Tensor], config: Any = None) -> Path:
    """A copy that has these tensors besides, and perhaps another quantization_config."""
    out.mkdir()
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, **scales}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return out if config is None else with_config(base, out, config)


def scales_of(name: str, *values: float, dtype: torch.dtype = torch.float32) -> Any:
    return {
        name.format(layer): torch.tensor(values, dtype=dtype) * (layer + 1) for layer in range(2)
    }


def prompt_logprobs(model: Path, **settings: Any) -> list[float]:
    engine = Engine(model, **{**SMALL, **settings})
    found = engine.generate(PROMPT, max_tokens=1, prompt_logprobs=0).prompt_logprobs
    assert found is not None
    return [entry.logprob for entry in found]


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("oracle")
def test_eight_bits_stay_near_sixteen(base: Path) -> None:
    rows = all_logprobs(load_float32(base), PROMPT)
    exact = [rows[at, token].item() for at, token in enumerate(PROMPT[1:])]
    wide, narrow = (prompt_logprobs(base, kv_cache_dtype=kind) for kind in KvCacheDtype)
    assert worst(wide, exact) < 0.05
    assert 0.02 < worst(narrow, exact) < 0.5, "keys and values have three bits"


@pytest.mark.usefixtures("oracle")
def test_twice_the_tokens_fit(base: Path) -> None:
    sizes = {"max_num_seqs": 1000, "kv_memory_bytes": 1 << 20}
    wide, narrow = (Engine(base, **{**SMALL, **sizes}, kv_cache_dtype=k) for k in KvCacheDtype)
    assert narrow.runner.info.num_blocks == 2 * wide.runner.info.num_blocks
    assert (wide.runner.info.kv_cache_dtype, narrow.runner.info.kv_cache_dtype) == (None, "fp8")


@pytest.mark.usefixtures("oracle")
def test_a_long_answer_in_company_is_the_one_alone(base: Path) -> None:
    """Across steps, blocks and other requests, what was written is what is read."""
    engine = Engine(base, **SMALL, kv_cache_dtype=KvCacheDtype.FP8, block_size=4)
    alone = engine.generate(PROMPT, max_tokens=24, ignore_eos=True).token_ids
    engine.reset(prefix_cache=False, chunk_tokens=7)
    prompts = [PROMPT, PROMPT[4:9], PROMPT[::-1]]
    assert engine.generate_all(prompts, max_tokens=24, ignore_eos=True)[0].token_ids == alone


KEYS, VALUES = "model.layers.{}.self_attn.k_scale", "model.layers.{}.self_attn.v_scale"
PROJECTED = "model.layers.{}.self_attn.k_proj.k_scale"


@pytest.mark.usefixtures("oracle")
def test_scales_of_the_checkpoint_are_used(base: Path, tmp_path: Path) -> None:
    """Powers of two change no result as long as nothing is cut off or lost below."""
    fp8 = {"kv_cache_dtype": KvCacheDtype.FP8}
    plain = prompt_logprobs(base, **fp8)
    half = {**scales_of(KEYS, 0.125, 0.25), **scales_of(VALUES, 0.5, dtype=torch.bfloat16)}
    small = prompt_logprobs(with_scales(base, tmp_path / "small", half), **fp8)
    assert worst(small, plain) < 0.02
    for name, scales in {
        "k": scales_of(KEYS, 1e-4), "v": scales_of(VALUES, 1e-3, 1e-4),
        "projected": scales_of(PROJECTED, 1e-4),
    }.items():  # fmt: skip
        cut_off = with_scales(base, tmp_path / name, scales)
        assert worst(prompt_logprobs(cut_off, **fp8), plain) > 0.3, "448 scales are the most"
        assert worst(prompt_logprobs(cut_off), prompt_logprobs(base)) == 0, "not of 16 bits"


def test_scales_come_for_each_head_or_for_all(tmp_path: Path) -> None:
    shapes = {"all": (), "one": (1,), "each": (3,), "newer": (3, 1, 1)}
    save_file(
        {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    source = WeightSource(tmp_path)
    for name in shapes:
        assert source.take_scales(["not there", name], 3).tolist() == [0.5] * 3
    assert source.take_scales(["not there"], 3).tolist() == [1.0] * 3
    source.finish()


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(2), r"shape \[2\]; it must be one scale, or one for each of 3 heads"),
        (torch.tensor([1.0, 0.0, 1.0]), "scales that are not positive"),
        (torch.tensor([float("nan")]), "scales that are not positive"),
        (torch.tensor([-1.0]), "scales that are not positive"),
        (torch.ones(1, dtype=torch.int8), "stored as I8; it must be BF16 or F16 or F32"),
    ],
)
def test_what_is_no_scale_is_named(scales: torch.Tensor, message: str, tmp_path: Path) -> None:
    save_file({"scales": scales}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        WeightSource(tmp_path).take_scales(["scales"], 3)


def test_auto_is_what_the_checkpoint_was_made_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed("kv_cache_scheme", value=KV_SCHEME, start=FP8_DYNAMIC)
    made = with_scales(base, tmp_path / "made", scales_of(KEYS, 0.5), config)
    assert Engine(made, **SMALL).runner.info.kv_cache_dtype is None, "no kernels for it here"
    monkeypatch.setenv("MILLRACE_KERNELS", "reference")
    assert Engine(made, **SMALL).runner.info.kv_cache_dtype == "fp8"


def test_a_cpu_refuses(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is fp8, but the kernels here \(cpu-"):
        Engine(base, **SMALL, kv_cache_dtype=KvCacheDtype.FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "int"}, "type is 'int'; it must be float"),
        ({"num_bits": 4}, "num_bits is 4; it must be 8"),
        ({"symmetric": False}, "symmetric is False; it must be true"),
        ({"dynamic": True}, "dynamic is True; it must be false"),
        ({"strategy": "channel"}, "strategy is 'channel'; it must be tensor or attn_head"),
    ],
)
def test_other_caches_are_not_supported(
    base: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = changed("kv_cache_scheme", value={**KV_SCHEME, **change}, start=FP8_DYNAMIC)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model_config(with_config(base, tmp_path, config))
    assert "quantization_config.kv_cache_scheme" in str(caught.value)
