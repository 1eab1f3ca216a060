"""A tuned model -> a checkpoint laid out as its base: same files, shards and types."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.train.model import Qwen3
from engine.train.tuning.output import RECORD

__all__ = ["copy_companions", "write_checkpoint"]

_COPIED = (
    "*.json", "tokenizer.model", "*.txt", "*.jinja", "additional_chat_templates/*.jinja",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Configuration, tokenizer and templates; a base's own card and training record would mislead."""
_RECORDS = (RECORD, "quantize.json")


def write_checkpoint(model: Qwen3, base: Path, out: Path) -> None:
    """Writes the model's weights in the files, names and types that the base has them in.

    What the model does not have (constants that old writers stored) is copied. One file is in
    memory at a time.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if model.lm_head is None:
        parameters["lm_head.weight"] = model.model.embed_tokens.weight
    for path in sorted(base.glob("*.safetensors")):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                stored = file.get_tensor(name)
                if name in parameters:
                    tuned = parameters[name].detach().to(stored.dtype).cpu()
                    stored = tuned.clone() if name == "lm_head.weight" else tuned.contiguous()
                tensors[name] = stored
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        shutil.copymode(path, out / path.name)  # the writer makes a file for its owner alone
    copy_companions(base, out)


def copy_companions(base: Path, out: Path) -> None:
    """Copies configuration, tokenizer and templates; no weights, card or record of a run."""
    for pattern in _COPIED:
        for path in base.glob(pattern):
            if path.name not in _RECORDS:
                target = out / path.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
