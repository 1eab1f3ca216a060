"""Export to a Hugging Face checkpoint directory that any Qwen3 implementation reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from engine.train.checkpoint import write_atomically
from engine.train.model import ModelConfig, Qwen3
from engine.train.tokenizer import Encoder, write_tokenizer_config

__all__ = ["MAX_SHARD_BYTES", "export", "hugging_face_config"]

MAX_SHARD_BYTES = 15 << 20
"""Most bytes of tensors in a weight file; with its header a file stays under 16 MiB."""


def hugging_face_config(config: ModelConfig, encoder: Encoder) -> dict[str, Any]:
    """The contents of `config.json`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": 0.02,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": encoder.id_of("<|im_end|>"),
        "pad_token_id": encoder.id_of("<|endoftext|>"),
    }


def export(
    model: Qwen3,
    encoder: Encoder,
    tokenizer_path: Path,
    template: str,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes weights in bfloat16, configuration, tokenizer and chat template to `out`.

    Files are replaced one by one, each atomically, so that a server may read `out` meanwhile.
    """
    out.mkdir(parents=True, exist_ok=True)
    if tokenizer_path.resolve() != (out / "tokenizer.model").resolve():
        shutil.copyfile(tokenizer_path, out / "tokenizer.model")
    write_tokenizer_config(out, encoder, template, max_len=model.config.max_position_embeddings)
    write_atomically(out / "chat_template.jinja", template.encode())
    eos = [encoder.id_of("<|im_end|>"), encoder.id_of("<|endoftext|>")]
    _write_json(out / "config.json", hugging_face_config(model.config, encoder))
    _write_json(
        out / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.9,
            "eos_token_id": eos,
            "pad_token_id": encoder.id_of("<|endoftext|>"),
        },
    )
    weights = {
        name: parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    _write_weights(out, weights, max_shard_bytes=max_shard_bytes)


def _write_weights(out: Path, weights: dict[str, Tensor], *, max_shard_bytes: int) -> None:
    """One file, or shards with an index; the files of an earlier export go last."""
    shards = _shards(weights, max_shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, own in zip(names, shards, strict=True):
        write_atomically(out / name, save({key: weights[key] for key in own}, metadata=metadata))
    index = out / "model.safetensors.index.json"
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        places = {key: name for name, own in zip(names, shards, strict=True) for key in own}
        _write_json(index, {"metadata": {"total_size": total}, "weight_map": places})
    else:
        index.unlink(missing_ok=True)
    for other in out.glob("model*.safetensors"):
        if other.name not in names:
            other.unlink()


def _shards(weights: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Names in order, cut so that no shard has more than `max_bytes` unless one tensor has."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in weights.items():
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(document, indent=2) + "\n").encode())
