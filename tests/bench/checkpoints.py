"""Random Qwen3 checkpoints of given shapes, in the Hugging Face layout, for benchmarks.

Weights are random, so answers mean nothing; time and memory are those of a trained model. The
tokenizer has text for every id, so that every token that a random model draws leaves as text.

Large ones need no time to draw and none of the disk: a hollow checkpoint has a header and no data
(for who makes the weights up while loading, see ``tests.gpu.weights``), a filled one repeats a few
random numbers.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

__all__ = ["SHAPES", "Shape", "make_checkpoint", "make_filled", "make_hollow", "tensors"]

PEBBLE = Path(__file__).resolve().parents[2] / "engine" / "assets" / "pebble"


class Shape(NamedTuple):
    """The sizes of a dense Qwen3 model."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool = True
    """The head is the embedding."""


SHAPES = {
    "46m": Shape(512, 12, 8, 4, 64, 1536, 16384),
    "0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of all parameters."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(shape.num_layers):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", (hidden,)
        yield name + "post_attention_layernorm.weight", (hidden,)
        yield name + "self_attn.q_norm.weight", (shape.head_dim,)
        yield name + "self_attn.k_norm.weight", (shape.head_dim,)
        yield name + "self_attn.q_proj.weight", (q_size, hidden)
        yield name + "self_attn.k_proj.weight", (kv_size, hidden)
        yield name + "self_attn.v_proj.weight", (kv_size, hidden)
        yield name + "self_attn.o_proj.weight", (hidden, q_size)
        yield name + "mlp.gate_proj.weight", (inner, hidden)
        yield name + "mlp.up_proj.weight", (inner, hidden)
        yield name + "mlp.down_proj.weight", (hidden, inner)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def tokenizer(vocab_size: int) -> dict[str, object]:
    """A byte-level BPE ``tokenizer.json`` whose pieces beyond the bytes are invented words."""
    from tokenizers.pre_tokenizers import ByteLevel

    words = ("".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    pieces = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())]
    pieces += itertools.islice(words, vocab_size - len(pieces))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
        },
    }


def make_checkpoint(
    shape: Shape, folder: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a checkpoint of this shape into ``folder`` and return the folder."""
    torch.manual_seed(seed)
    state = {
        name: torch.ones(size, dtype=dtype)
        if len(size) == 1
        else (torch.randn(size) * size[1] ** -0.5).to(dtype)
        for name, size in tensors(shape)
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return _write_rest(shape, folder, dtype, max_positions=4096)


def make_hollow(shape: Shape, folder: Path, *, max_positions: int = 131_072) -> Path:
    """The same in bfloat16 without data: holes in a sparse file, which read as zeros."""
    _write_header(shape, folder / "model.safetensors")
    return _write_rest(shape, folder, torch.bfloat16, max_positions=max_positions)


def make_filled(shape: Shape, folder: Path, *, max_positions: int = 131_072) -> Path:
    """The same with all tensors cut from repetitions of the same 32 million numbers."""
    path = folder / "model.safetensors"
    begin, end = _write_header(shape, path)
    numbers = torch.randn(min(1 << 25, (end - begin) // 2)) * shape.hidden_size**-0.5
    block = memoryview(numbers.to(torch.bfloat16).view(torch.uint8).numpy()).cast("B")
    with path.open("r+b") as file:
        file.seek(begin)
        for start in range(begin, end, len(block)):
            file.write(block[: end - start])
    return _write_rest(shape, folder, torch.bfloat16, max_positions=max_positions)


def _write_header(shape: Shape, path: Path) -> tuple[int, int]:
    """Header and holes of bfloat16 tensors; gives where the data begins and ends."""
    header: dict[str, object] = {}
    size = 0
    for name, sizes in tensors(shape):
        begin, size = size, size + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [begin, size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(begin + size)
    return begin, begin + size


def _write_rest(shape: Shape, folder: Path, dtype: torch.dtype, *, max_positions: int) -> Path:
    """Everything but the weights."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocab_size)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    shutil.copy(PEBBLE / "chat_template.jinja", folder)
    return folder
