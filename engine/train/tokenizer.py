"""The sentencepiece tokenizer of the bundled model: training it, and a byte-exact encoder.

Reference: Kudo and Richardson 2018, "SentencePiece" (arXiv:1808.06226), BPE with byte fallback.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece as spm

__all__ = ["CONTROL_TOKENS", "Encoder", "train_tokenizer", "write_tokenizer_config"]

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""The control tokens of Qwen3's chat format; one id each, in this order from id 1."""

_SPACE_MARK = "▁"  # sentencepiece writes a space as this character, so a real one needs bytes


class Encoder:
    """Text to token ids and back, exact for every string of valid Unicode.

    Args:
        path: a sentencepiece model file with byte fallback.
    """

    def __init__(self, path: Path) -> None:
        self._model: Any = spm.SentencePieceProcessor(model_file=str(path))
        self._mark_ids = [self.id_of(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return int(self._model.get_piece_size())

    def id_of(self, piece: str) -> int:
        """The id of one piece; raises `KeyError` if the vocabulary lacks it."""
        token_id = int(self._model.piece_to_id(piece))
        if self._model.id_to_piece(token_id) != piece:
            raise KeyError(f"the tokenizer has no piece {piece!r}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no BOS or EOS; control tokens in it become their ids."""
        first, *rest = text.split(_SPACE_MARK)
        ids: list[int] = self._model.encode(first)
        for part in rest:
            ids += self._mark_ids + self._model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; bytes that form no valid UTF-8 become U+FFFD."""
        return str(self._model.decode(ids))


def train_tokenizer(
    texts: Iterable[str], path: Path, *, vocab_size: int, character_coverage: float
) -> None:
    """Trains a BPE model on `texts` and writes it to `path`.

    Args:
        texts: pieces of text; split at line breaks, a line break being a token of its own.
        path: file to write.
        vocab_size: number of token ids, control tokens and 256 bytes included.
        character_coverage: share of the characters seen that get a piece; others become bytes.
    """
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[*CONTROL_TOKENS, "\n"],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=2,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            if line.strip():
                yield line


def write_tokenizer_config(
    directory: Path, encoder: Encoder, template: str, *, max_len: int
) -> None:
    """Writes `tokenizer_config.json` with Hugging Face's keys beside the model file."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "model_max_length": max_len,
        "added_tokens_decoder": {
            str(encoder.id_of(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.startswith("<|"),
            }
            for token in CONTROL_TOKENS
        },
        "chat_template": template,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
