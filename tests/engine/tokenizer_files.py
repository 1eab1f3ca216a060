"""Small tokenizers of every kind, trained on a few lines and written as checkpoints hold them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog is not amused.",
    "Écoutez, garçon: l'été à Paris coûte 1 234,50 € — déjà vu?",
    "def main(argv: list[str]) -> int:\n    return 0 if argv else 1",
    "小さな水車は夜も回る。日本語の文字も読めますか。",
    "Мельница работает; вода течёт 🙂🙃 and 👩‍👩‍👧 families too.",
    "system user assistant tool role content message answer question",
] * 3

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SOFT = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_config(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def byte_level(directory: Path, template: str | None = CHATML, **config: Any) -> Path:
    """Qwen's kind: byte-level BPE in tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([tokenizers.AddedToken(one, normalized=False) for one in SOFT])
    tokenizer.save(str(directory / "tokenizer.json"))
    base = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if template is not None:
        base["chat_template"] = template
    write_config(directory, "tokenizer_config.json", base | config)
    return directory


def metaspace(directory: Path, *, legacy: bool, prepend: str = "first") -> Path:
    """Llama 2's kind: a BPE over characters with byte pieces, in tokenizer.json."""
    pieces = _character_bpe()
    tokenizer = tokenizers.Tokenizer(pieces)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
        tokenizer.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)]
            if prepend == "never"
            else [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    tokenizer.add_special_tokens(["<s>", "</s>", *CONTROL])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_config(directory, "tokenizer_config.json", {"eos_token": "</s>", "chat_template": CHATML})
    return directory


def _character_bpe() -> models.BPE:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = []
    for char in sorted(set("".join(LINES[:4]).replace(" ", "▁")) | {"▁"}):
        vocab.setdefault(char, len(vocab))
    for left, right in [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("a", "n"), ("an", "d")]:
        vocab.setdefault(left + right, len(vocab))
        merges.append((left, right))
    return models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )


def sentencepiece_model(directory: Path, *, symbols: bool = True, **options: Any) -> Path:
    """A sentencepiece BPE; with ``symbols`` the control tokens are user-defined symbols of it."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "character_coverage": 0.98,
        "user_defined_symbols": [*CONTROL, *SOFT] if symbols else [],
        "minloglevel": 2,
        "num_threads": 1,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **settings
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    added = {
        str(processor.piece_to_id(one) if symbols else processor.get_piece_size() + index): {
            "content": one,
            "special": one in CONTROL,
        }
        for index, one in enumerate([*CONTROL, *SOFT])
    }
    write_config(
        directory,
        "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "added_tokens_decoder": added, "chat_template": CHATML},
    )
    return directory


KINDS: dict[str, Any] = {
    "byte-level": byte_level,
    "metaspace": lambda directory: metaspace(directory, legacy=False),
    "metaspace-never": lambda directory: metaspace(directory, legacy=False, prepend="never"),
    "prepend": lambda directory: metaspace(directory, legacy=True),
    "sentencepiece": sentencepiece_model,
    "sentencepiece-prefix": lambda directory: sentencepiece_model(directory, add_dummy_prefix=True),
    "sentencepiece-added": lambda directory: sentencepiece_model(directory, symbols=False),
    "sentencepiece-nfkc": lambda directory: sentencepiece_model(
        directory,
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
        normalization_rule_name="nmt_nfkc",
    ),
}
"""Name to a function that writes a tokenizer of that kind into a directory."""
