"""The training model and its export against Hugging Face's Qwen3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.train.export import export
from engine.train.model import ModelConfig, Qwen3, document_mask
from engine.train.tokenizer import CONTROL_TOKENS, Encoder, train_tokenizer


def config(**sizes: int) -> ModelConfig:
    values = {
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**values, **sizes})


def spread(model: Qwen3) -> Qwen3:
    """Weights of which every one matters to the logits, norms included."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["some words, some more words"] * 50, path, vocab_size=300,
                    character_coverage=1.0)  # fmt: skip
    return Encoder(path)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 16), (4, 2, 8), (3, 3, 32)])
def test_exported_model_has_the_logits_of_transformers(
    tmp_path: Path, encoder: Encoder, heads: int, kv_heads: int, head_dim: int
) -> None:
    model = spread(
        Qwen3(config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim))
    )
    tokenizer_path = tmp_path / "tokenizer.model"
    tokenizer_path.write_bytes(b"")  # copied, not read
    export(model, encoder, tokenizer_path, "{{ messages }}", tmp_path / "out")
    theirs = Qwen3ForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():  # the export rounds, so compare at the rounded weights
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)
    assert theirs.config.eos_token_id == encoder.id_of("<|im_end|>")


def test_masked_documents_do_not_see_each_other() -> None:
    model = spread(Qwen3(config()))
    first, second = torch.randint(0, 320, (1, 7)), torch.randint(0, 320, (1, 9))
    together = torch.cat((first, second), dim=1)
    mask = document_mask(torch.tensor([[1] * 7 + [2] * 9]))
    with torch.no_grad():
        packed = model(together, mask)
        torch.testing.assert_close(packed[:, :7], model(first), atol=1e-4, rtol=1e-4)
        # Rotary positions are relative: a shifted document has the same logits.
        torch.testing.assert_close(packed[:, 7:], model(second), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(packed[:, 7:], model(together)[:, 7:], atol=1e-2)


def test_sizes_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        config(num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim=7"):
        config(head_dim=7)


def test_control_tokens_keep_their_ids(encoder: Encoder) -> None:
    assert [encoder.id_of(token) for token in CONTROL_TOKENS] == list(range(1, 10))
    assert encoder.encode("".join(CONTROL_TOKENS)) == list(range(1, 10))
    with pytest.raises(KeyError, match="no_such"):
        encoder.id_of("<|no_such|>")
