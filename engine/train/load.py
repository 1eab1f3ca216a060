"""A Hugging Face checkpoint of a dense Qwen3 model -> a model that can be trained."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.loader import WeightSource
from engine.model_config import ModelConfig as StatedConfig
from engine.model_config import read_model_config
from engine.train.model import ModelConfig, Qwen3

__all__ = ["load_model"]


def load_model(
    directory: Path, compute_dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Qwen3:
    """The checkpoint's model with float32 parameters.

    Args:
        directory: configuration and weights, sharded or not, the head tied or not.
        compute_dtype: type of the products.
        device: where the parameters are put.

    Raises CheckpointError when files are missing, damaged, do not belong together, or are of
    another architecture.
    """
    stated = read_model_config(directory)
    if stated.architecture != "Qwen3ForCausalLM":
        raise CheckpointError(
            f"{directory / 'config.json'} is of a {stated.architecture}; only dense Qwen3 models "
            "(Qwen3ForCausalLM) can be trained"
        )
    if stated.quantization is not None:
        raise CheckpointError(
            f"the weights of {directory} are quantised ({stated.quantization.layout.value}); "
            "train the model they were made from"
        )
    source = WeightSource(directory, torch.float32, device)
    with torch.device("meta"):  # no memory and no random numbers for what is read anyway
        model = Qwen3(_training_config(stated), compute_dtype)
    tensors = {name: source.take(name, p.shape) for name, p in model.named_parameters()}
    if stated.tie_word_embeddings:
        source.skip("lm_head.weight")  # some writers store it twice
    for index in range(stated.num_layers):  # a constant that old writers stored
        source.skip(f"model.layers.{index}.self_attn.rotary_emb.inv_freq")
    source.finish()
    model.load_state_dict(tensors, assign=True)
    return model


def _training_config(stated: StatedConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=stated.vocab_size,
        hidden_size=stated.hidden_size,
        intermediate_size=stated.intermediate_size,
        num_hidden_layers=stated.num_layers,
        num_attention_heads=stated.num_heads,
        num_key_value_heads=stated.num_kv_heads,
        head_dim=stated.head_dim,
        max_position_embeddings=stated.max_position_embeddings,
        rope_theta=stated.rope.theta,
        rms_norm_eps=stated.rms_norm_eps,
        tie_word_embeddings=stated.tie_word_embeddings,
        yarn=stated.rope.yarn,
    )
