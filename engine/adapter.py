"""A LoRA adapter in the files of Hugging Face's PEFT, merged into the weights as they are loaded.

A matrix W becomes W + scale * B A (Hu et al. 2021, arXiv:2106.09685), computed in float32 and
rounded once, so that serving with an adapter costs nothing and answers as the merged model does.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.json_file import read_json
from engine.tensor_file import TensorFile

__all__ = ["Adapter", "norm_fingerprint"]

_PREFIX = "base_model.model."
_NORM = "model.norm.weight"
_FINGERPRINT = "base_norm_sha256"
# What changes the product in another way than a plain adapter does.
_UNSUPPORTED = (
    "alpha_pattern", "rank_pattern", "modules_to_save", "use_dora", "layer_replication",
    "trainable_token_indices",
)  # fmt: skip


class Adapter:
    """The low-rank matrices of an adapter, each to be added once.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises CheckpointError when a file is missing or damaged, or asks for what is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / "adapter_config.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} is not an adapter: no adapter_config.json in it")
        config = read_json(path)
        self._rank, self._scale = _read_scale(path, config)
        self._base = str(config.get("base_model_name_or_path") or "another model")
        self._file = TensorFile(directory / "adapter_model.safetensors")
        self._left = set(self._file.names)
        self._fingerprint = self._file.metadata.get(_FINGERPRINT)

    def add_to(self, name: str, weight: torch.Tensor, *, exact: bool) -> None:
        """Add this adapter's part to ``weight [out, in]``, the checkpoint's tensor ``name``.

        Args:
            name: in the checkpoint.
            weight: changed in place where the adapter has something for it.
            exact: it has the stored type, so that the base model can be recognised.

        Raises CheckpointError when the shapes or the fingerprint are those of another base model.
        """
        known = self._fingerprint
        if name == _NORM and exact and known is not None and known != norm_fingerprint(weight):
            raise CheckpointError(
                f"the adapter {self._directory} was trained on {self._base} with other weights "
                "than this model has; serve it with the model it was trained on"
            )
        stem = _PREFIX + name.removesuffix(".weight")
        names = (f"{stem}.lora_A.weight", f"{stem}.lora_B.weight")
        if names[0] not in self._left or names[1] not in self._left:
            return
        num_out, num_in = weight.shape
        below = self._read(names[0], (self._rank, num_in)).to(weight.device)
        above = self._read(names[1], (num_out, self._rank)).to(weight.device)
        weight.copy_(torch.addmm(weight.float(), above, below, alpha=self._scale))
        self._left -= set(names)

    def finish(self) -> None:
        """Raises CheckpointError if matrices were left over."""
        if self._left:
            first = sorted(self._left)[0]
            raise CheckpointError(
                f"the adapter {self._directory} has {first}, which belongs to no matrix of this "
                f"model; it was trained on {self._base}"
            )

    def _read(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        """A matrix in float32."""
        if self._file.shape(name) != shape:
            raise CheckpointError(
                f"the adapter {self._directory}: {name} has shape {list(self._file.shape(name))}; "
                f"for this model it must be {list(shape)}; it was trained on {self._base}"
            )
        matrix = torch.cat([piece.float() for piece in self._file.chunks(name)]).view(shape)
        if not bool(torch.isfinite(matrix).all()):
            raise CheckpointError(f"{self._file.path}: {name} holds values that are not finite")
        return matrix


def norm_fingerprint(weight: torch.Tensor) -> str:
    """SHA-256 of the final norm, by which a base model is known: few values, changed by training.

    Args:
        weight: as the checkpoint stores it.
    """
    return hashlib.sha256(weight.detach().float().cpu().numpy().tobytes()).hexdigest()


def _read_scale(path: Path, config: dict[str, Any]) -> tuple[int, float]:
    """Rank, and the factor of the product."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {config.get('peft_type')!r}; it must be LORA")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, which is not supported")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        raise CheckpointError(f"{path}: adapters with biases are not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r is {rank!r}; it must be a positive integer")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}; it must be a number")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
