"""The training model and its export against Hugging Face's Qwen3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from engine.train.attention import Segments, attend, attend_flex, block_mask_of
from engine.train.export import export
from engine.train.model import ModelConfig, Qwen3
from engine.train.tokenizer import CONTROL_TOKENS, Encoder, train_tokenizer

CPU = torch.device("cpu")


def config(**sizes: int) -> ModelConfig:
    values: dict[str, Any] = {
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
    ids = torch.randint(0, 320, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids[None]).logits[0], atol=2e-4, rtol=1e-4)
    assert theirs.config.eos_token_id == encoder.id_of("<|im_end|>")


def test_large_weights_are_written_in_shards(tmp_path: Path, encoder: Encoder) -> None:
    model = spread(Qwen3(config()))
    tokenizer_path = tmp_path / "tokenizer.model"
    tokenizer_path.write_bytes(b"")
    out = tmp_path / "out"
    export(model, encoder, tokenizer_path, "", out)
    whole = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    export(model, encoder, tokenizer_path, "", out, max_shard_bytes=20_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert "model.safetensors" not in [path.name for path in shards]
    largest = max(p.numel() * 2 for p in model.parameters())
    assert max(path.stat().st_size for path in shards) < max(20_000, largest) + 4_000
    again = Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    export(model, encoder, tokenizer_path, "", out)  # no shard is left beside the single file
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


def rows(*lengths: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.repeat(np.arange(len(lengths)), lengths)[None]


def test_packed_documents_do_not_see_each_other() -> None:
    model = spread(Qwen3(config()))
    first, second = torch.randint(0, 320, (7,)), torch.randint(0, 320, (9,))
    together = torch.cat((first, second))
    with torch.no_grad():
        packed = model.logits(
            model.hidden_states(together, Segments.of(rows(7, 9), model.device))[-1]
        )
        torch.testing.assert_close(packed[:7], model(first), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(packed[7:], model(second), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(packed[7:], model(together)[7:], atol=1e-2)


def test_rows_of_a_batch_stay_apart() -> None:
    ids = np.array([[1, 1, 2], [2, 2, 0]])  # the numbers of a row mean nothing in the next
    segments = Segments.of(ids, CPU)
    assert segments.lengths == (2, 1, 2, 1)
    assert segments.positions.tolist() == [0, 1, 0, 0, 1, 0]


def naive_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...]
) -> torch.Tensor:
    """Scores of all pairs, those that must not see each other masked."""
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    hidden = (document[:, None] != document[None]) | torch.ones(len(q), len(q)).triu(1).bool()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


LENGTHS = (1, 5, 64, 33, 25)


def attention_inputs(num_heads: int, num_kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(sum(LENGTHS), h, 16, generator=generator) for h in heads]


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3)])
def test_attention_and_its_gradients_match_the_definition(heads: tuple[int, int]) -> None:
    *qkv, grad = attention_inputs(*heads)
    segments = Segments.of(rows(*LENGTHS), CPU)

    def run(naive: bool) -> list[torch.Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in qkv)
        mixed = naive_attention(q, k, v, LENGTHS) if naive else attend(q, k, v, segments)
        mixed.backward(grad)  # type: ignore[no-untyped-call]
        return [mixed.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    for own, expected in zip(run(naive=False), run(naive=True), strict=True):
        torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-4)


# Not compiled here, which torch warns of, as of its own use of what it has deprecated.
@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore::DeprecationWarning")
@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (3, 3)])
def test_attention_for_gpus_matches_the_definition(heads: tuple[int, int]) -> None:
    q, k, v, _ = attention_inputs(*heads)  # on a CPU torch has its forward pass alone
    own = attend_flex(q, k, v, block_mask_of(np.array(LENGTHS), CPU))
    torch.testing.assert_close(own, naive_attention(q, k, v, LENGTHS), atol=2e-5, rtol=1e-4)


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
