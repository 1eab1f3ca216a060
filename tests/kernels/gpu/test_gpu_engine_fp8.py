"""An engine whose cache is in 8-bit floats, on the GPU kernels and on their oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import KvCacheDtype
from engine.errors import ConfigError
from kernels import gpu
from kernels.gpu import rotary
from kernels.gpu.linear_fp8 import multiplies_e4m3
from tests.engine import checkpoints
from tests.kernels.gpu.engines import engine_on
from tests.kernels.gpu.planted import planted

PROMPTS = [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43], [27, 18]]

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and not multiplies_e4m3(torch.device("cuda")),
    reason="this GPU has no 8-bit floats",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with scales: one for each key head, and one for all values of a layer."""
    shape = checkpoints.Shape(hidden_size=48, intermediate_size=64, num_layers=2, num_kv_heads=2)
    path, _ = checkpoints.make(tmp_path_factory.mktemp("model"), shape)
    tensors = load_file(path / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn"
        tensors[f"{name}.k_scale"] = torch.tensor([0.03, 0.07]) * (layer + 1)
        tensors[f"{name}.v_scale"] = torch.tensor([0.011])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def logprobs(
    backend: str, model: Path, device: torch.device, kind: KvCacheDtype = KvCacheDtype.FP8
) -> torch.Tensor:
    """Of the prompts' tokens, and of four more that are drawn; the last ones must be the same."""
    with engine_on(backend, model, device, kv_cache_dtype=kind) as engine:
        found = engine.generate_all(
            PROMPTS, max_tokens=4, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
    numbers = []
    for answer in found:
        assert answer.prompt_logprobs is not None
        numbers += [one.logprob for one in answer.prompt_logprobs + answer.logprobs]
        numbers += [float(token) for token in answer.token_ids]
    return torch.tensor(numbers)


def test_the_engine_says_what_the_oracle_says(model: Path, device: torch.device) -> None:
    want = logprobs("reference", model, device)
    # A number within float32's rounding of a tie may fall to the other side, by a sixteenth.
    torch.testing.assert_close(logprobs("triton", model, device), want, rtol=0, atol=2e-3)
    wide = logprobs("reference", model, device, KvCacheDtype.AUTO)
    assert float((wide - want).abs().max()) > 2e-2, "no number that is compared was rounded"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k_scale_ptr + ", "v_scale_ptr + "),
        ("v_scale_ptr + ", "k_scale_ptr + "),
    ],
)
def test_a_bug_in_the_scales_is_found(
    model: Path, device: torch.device, old: str, new: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(gpu, "rotary", planted(rotary, old, new, tmp_path))
    with pytest.raises(AssertionError):
        test_the_engine_says_what_the_oracle_says(model, device)


def test_a_gpu_without_8_bit_floats_refuses(
    model: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "multiplies_e4m3", lambda device: False)
    gpu.load.cache_clear()
    try:
        with (
            pytest.raises(ConfigError, match=r"\(triton\) have no 8-bit floats.*8\.9 or more"),
            engine_on("triton", model, device, kv_cache_dtype=KvCacheDtype.FP8),
        ):
            pass
    finally:
        gpu.load.cache_clear()
