"""The runner's settings: devices, memory, lengths; and that it says what it loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Device, Dtype, EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.memory import num_kv_blocks, zeroed_memory
from engine.runner import Runner
from engine.steps import Plan
from tests.engine.checkpoints import Shape, make
from tests.engine.harness import Engine

# Tiny model: 3 layers, 2 key-value heads of 32, float32: 1,536 bytes a token.
TOKEN_BYTES = 2 * 3 * 2 * 32 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "tiny-model")[0]


def runner(model: Path, **settings: Any) -> Runner:
    defaults: dict[str, Any] = {"device": Device.CPU, "num_threads": 1}
    return Runner(EngineConfig(model=str(model), **{**defaults, **settings}))


def test_info(model: Path) -> None:
    info = runner(model, kv_memory_bytes=100 * 16 * TOKEN_BYTES + 5).info
    assert info.name == "tiny-model"
    assert (info.max_model_len, info.vocab_size, info.eos_token_ids) == (512, 131, (7, 9))
    assert (info.dtype, info.device, info.block_size) == ("float32", "cpu", 16)
    assert info.num_blocks == 100
    assert runner(model, served_name="other").info.name == "other"


def test_num_parameters(tmp_path: Path) -> None:
    for tied in (True, False):
        path, theirs = make(tmp_path / str(tied), Shape(tied=tied, num_heads=8, head_dim=64))
        assert runner(path).info.num_parameters == theirs.num_parameters()


def test_progress_is_told(model: Path) -> None:
    told: list[tuple[str, float]] = []
    config = EngineConfig(model=str(model), device=Device.CPU, num_threads=1)
    Runner(config, lambda stage, fraction: told.append((stage, fraction)))
    loading = [fraction for stage, fraction in told if stage == "loading weights"]
    assert len(loading) > 3 * 8
    assert loading == sorted(loading)
    assert loading[-1] == 1.0
    assert told[-1] == ("ready", 1.0)


def test_an_empty_plan_is_no_work(model: Path) -> None:
    output = runner(model).step(Plan([], 0))
    assert (output.token_ids, output.logprobs, output.prompt_logprobs) == ([], [], {})


@pytest.mark.parametrize("block_size", [1, 2, 32, 1024])
def test_block_sizes(block_size: int, model: Path) -> None:
    engine = Engine(model, block_size=block_size, kv_memory_bytes=8 << 20)
    plain = Engine(model, kv_memory_bytes=8 << 20)
    prompt = list(range(40))
    expected = plain.generate(prompt, max_tokens=10, logprobs=0)
    assert engine.generate(prompt, max_tokens=10, logprobs=0).token_ids == expected.token_ids


def test_more_prompt_logprobs_than_rows_of_logits(model: Path) -> None:
    narrow = Engine(model, max_num_seqs=2, kv_memory_bytes=8 << 20)
    prompt = list(range(50))
    answers = [
        engine.generate(prompt, max_tokens=1, prompt_logprobs=2)
        for engine in (narrow, Engine(model, kv_memory_bytes=8 << 20))
    ]
    assert answers[0].prompt_logprobs is not None
    assert len(answers[0].prompt_logprobs) == 49
    assert answers[1].prompt_logprobs is not None
    for ours, theirs in zip(answers[0].prompt_logprobs, answers[1].prompt_logprobs, strict=True):
        assert ours.top_ids == theirs.top_ids
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_the_shortest_limits_work(model: Path) -> None:
    engine = Engine(model, max_num_tokens=1, max_num_seqs=1, max_model_len=5)
    wide = Engine(model)
    assert engine.runner.info.max_model_len == 5
    expected = wide.generate([1, 2, 3], max_tokens=2)
    assert engine.generate([1, 2, 3], max_tokens=2).token_ids == expected.token_ids


def test_longest_request_fits_exactly(model: Path) -> None:
    engine = Engine(model, max_model_len=64, kv_memory_bytes=5 * 16 * TOKEN_BYTES)
    answer = engine.generate(list(range(32)), max_tokens=1000, ignore_eos=True)
    assert len(answer.token_ids) == 32


def test_refuses_a_cache_too_small_for_one_request(model: Path) -> None:
    granted = 5 * 16 * TOKEN_BYTES - 1
    with pytest.raises(ConfigError) as caught:
        runner(model, max_model_len=64, kv_memory_bytes=granted)
    message = str(caught.value)
    assert f"needs {5 * 16 * TOKEN_BYTES} bytes" in message
    assert f"{granted} bytes" in message
    assert "enough for 48 tokens" in message


def test_refuses_a_length_the_positions_do_not_reach(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_model_len is 513; .* reach 512"):
        runner(model, max_model_len=513)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_refuses_cuda_without_a_gpu(model: Path) -> None:
    with pytest.raises(ConfigError, match="device is cuda, but torch finds no GPU"):
        runner(model, device=Device.CUDA)
    assert runner(model, device=Device.AUTO).info.device == "cpu"


def test_refuses_an_unknown_kernel_backend(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_KERNELS", "magic")
    with pytest.raises(ConfigError, match="MILLRACE_KERNELS"):
        runner(model)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_other_backends_answer_alike(
    backend: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(30))
    expected = Engine(model).generate(prompt, max_tokens=12).token_ids
    monkeypatch.setenv("MILLRACE_KERNELS", backend)
    assert Engine(model).generate(prompt, max_tokens=12).token_ids == expected


def test_batch_invariance_is_taken_where_it_is_and_refused_where_not(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner(model).batch_invariant:
        assert runner(model, batch_invariant=True).batch_invariant
    for backend in ("torch", "reference"):
        monkeypatch.setenv("MILLRACE_KERNELS", backend)
        assert not runner(model).batch_invariant
        with pytest.raises(ConfigError, match="batch_invariant is set, but the kernels here"):
            runner(model, batch_invariant=True)


def test_refuses_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        runner(tmp_path / "nothing")


def test_dtype_is_that_of_the_tensors_if_the_config_names_none(tmp_path: Path) -> None:
    path, _ = make(tmp_path, Shape(dtype=torch.bfloat16))
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"dtype": "bfloat16",', ""))
    assert runner(path).info.dtype == "bfloat16"
    assert runner(path, dtype=Dtype.FLOAT16).info.dtype == "float16"


SIZES: dict[str, Any] = {
    "block_bytes": 1000,
    "block_size": 16,
    "max_model_len": 100,  # 7 blocks
    "max_num_seqs": 3,
    "memory_bytes": None,
    "available_bytes": 10**9,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 3 * 7 + 1),  # no more than all requests can fill
        ({"available_bytes": 12_999}, 12),
        ({"memory_bytes": 9_000}, 9),
        ({"memory_bytes": 8_000, "available_bytes": 1}, 8),
    ],
)
def test_number_of_blocks(changes: dict[str, Any], expected: int) -> None:
    assert num_kv_blocks(**{**SIZES, **changes}) == expected


def test_number_of_blocks_names_where_memory_came_from() -> None:
    with pytest.raises(ConfigError, match="7999 bytes are free on this device"):
        num_kv_blocks(**{**SIZES, "available_bytes": 7_999})
    with pytest.raises(ConfigError, match="7999 bytes are in kv_memory_bytes"):
        num_kv_blocks(**{**SIZES, "memory_bytes": 7_999})


def test_zeroed_memory_is_zero_and_lazy() -> None:
    memory = zeroed_memory(1 << 32, torch.device("cpu"))  # more than this test could pay for
    assert memory.shape == (1 << 32,)
    assert memory.dtype is torch.uint8
    assert not memory[-1000:].any()
