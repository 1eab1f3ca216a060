"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), in the files of Hugging Face's PEFT.

A matrix W becomes W + scale * B A while its own values stay as they are. What training computes
with is the sum, rounded as the merged weights will be, so that nothing changes at merging.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from engine.adapter import norm_fingerprint
from engine.train.checkpoint import write_atomically
from engine.train.model import Qwen3

__all__ = ["LowRank", "adapters", "add_adapters", "merge_adapters", "write_adapter"]


class LowRank(nn.Module):
    """The sum of a frozen matrix [out, in] and a low-rank one, as a parametrisation.

    B starts at zero, so that a new adapter changes nothing.

    Args:
        weight: the matrix, for sizes and device.
        rank: columns of B and rows of A.
        scale: of the product.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        num_out, num_in = weight.shape
        self.scale = scale
        self.lora_A = nn.Parameter(weight.new_empty(rank, num_in))
        self.lora_B = nn.Parameter(weight.new_zeros(num_out, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The sum [out, in]."""
        return torch.addmm(weight, self.lora_B, self.lora_A, alpha=self.scale)


def add_adapters(
    model: Qwen3, *, rank: int, alpha: float, rslora: bool, target_modules: tuple[str, ...]
) -> None:
    """Freezes the model and gives the named matrices of each layer an adapter."""
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in target_modules and isinstance(module, nn.Linear):
            adapter = LowRank(module.weight, rank, scale)
            parametrize.register_parametrization(module, "weight", adapter)


def adapters(model: Qwen3) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """The matrices' names without `.weight`, their modules and adapters."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            (adapter,) = module.parametrizations.weight
            assert isinstance(adapter, LowRank)
            yield name, module, adapter


def merge_adapters(model: Qwen3) -> None:
    """Makes the sums the weights; the adapters are gone."""
    for _, module, _ in list(adapters(model)):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def write_adapter(
    model: Qwen3,
    directory: Path,
    *,
    base: str,
    rank: int,
    alpha: float,
    rslora: bool,
    target_modules: tuple[str, ...],
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT names and shapes them.

    The file's metadata holds the base model's fingerprint, by which a server refuses another one.
    """
    tensors: dict[str, Tensor] = {}
    for name, _, adapter in adapters(model):
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.lora_A.detach().cpu()
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.lora_B.detach().cpu()
    metadata = {"format": "pt", "base_norm_sha256": norm_fingerprint(model.model.norm.weight)}
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "adapter_model.safetensors", save(tensors, metadata=metadata))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rslora,
        "target_modules": list(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(directory / "adapter_config.json", text.encode())
