"""The two kinds of tokenizer files behind one face: sentencepiece models and ``tokenizer.json``.

References: Kudo and Richardson 2018, "SentencePiece" (arXiv:1808.06226); byte-level BPE as of
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import sentencepiece
import tokenizers

from engine.errors import TokenizerError
from engine.text_stream import LeadingSpace, Piece

__all__ = ["AddedToken", "JsonPieces", "Pieces", "SentencePieces"]

_SPACE_MARK = "▁"  # both kinds write a space as this character


class AddedToken(NamedTuple):
    """A token that is found by its spelling before the text is split into pieces."""

    token_id: int
    content: str
    special: bool
    lstrip: bool = False
    """Takes the white space on its left with it."""
    rstrip: bool = False
    single_word: bool = False
    """Only where no word character is next to it."""


class Pieces(Protocol):
    """What a tokenizer file gives; added tokens of other files are none of its business."""

    size: int
    """One more than the highest id."""
    leading_space: LeadingSpace
    each_segment_leads: bool
    """The text behind an added token gets a leading space too, not only the start."""
    added: list[AddedToken]

    def encode(self, text: str, *, leads: bool) -> list[int]:
        """Ids of ``text``; with ``leads`` it gets the leading space, if this tokenizer adds one."""
        ...

    def piece(self, token_id: int) -> Piece | None:
        """The piece of an id, None if it has none."""
        ...

    def find(self, content: str) -> int | None:
        """The id of a piece that is written exactly so."""
        ...


class SentencePieces:
    """A sentencepiece model.

    Raises TokenizerError when the file is not one.
    """

    def __init__(self, path: Path, *, each_segment_leads: bool) -> None:
        try:
            self._model = _load_sentencepiece(path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"{path} is not a sentencepiece model: {error}") from error
        self.size = int(self._model.get_piece_size())
        self.each_segment_leads = each_segment_leads
        self._adds_space = self._model.normalize("a") != "a"
        squeezes = self._model.normalize("a  b") == self._model.normalize("a b")
        self.leading_space = (
            LeadingSpace.DROP_EACH
            if squeezes
            else LeadingSpace.DROP_ONE
            if self._adds_space
            else LeadingSpace.KEEP
        )
        self.added = [
            AddedToken(token_id, self._model.id_to_piece(token_id), special=True)
            for token_id in range(self.size)
            if self._is_control(token_id)
        ]
        mark_bytes = [self.find(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = [token_id for token_id in mark_bytes if token_id is not None]

    def encode(self, text: str, *, leads: bool) -> list[int]:
        """See Pieces."""
        # A real mark in the text would come back as a space, so it goes by its bytes where it can.
        parts = text.split(_SPACE_MARK) if self._mark_ids else [text]
        model = self._model if leads else self._bare_model
        ids: list[int] = model.encode(parts[0]) if parts[0] else []
        for part in parts[1:]:
            ids += self._mark_ids
            ids += self._bare_model.encode(part)
        return ids

    def piece(self, token_id: int) -> Piece | None:
        """See Pieces."""
        if not 0 <= token_id < self.size:
            return None
        content: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return Piece(bytes([int(content[1:-1], 16)]), droppable=False)
        if self._model.is_unused(token_id):
            return None
        drops = self.leading_space is not LeadingSpace.KEEP and content.startswith(_SPACE_MARK)
        return Piece(content.replace(_SPACE_MARK, " ").encode(), droppable=drops)

    def find(self, content: str) -> int | None:
        """See Pieces."""
        token_id = int(self._model.piece_to_id(content))
        return token_id if self._model.id_to_piece(token_id) == content else None

    def _is_control(self, token_id: int) -> bool:
        if self._model.is_control(token_id) or self._model.is_unknown(token_id):
            return True
        # User-defined symbols look like ordinary pieces here; these are nobody's ordinary text.
        content = self._model.id_to_piece(token_id)
        return len(content) > 4 and content.startswith("<|") and content.endswith("|>")

    @cached_property
    def _bare_model(self) -> Any:
        """The same model, but without a space before the first word."""
        if not self._adds_space:
            return self._model
        # Protobuf merges a message that occurs twice: normalizer_spec (field 3) with only
        # add_dummy_prefix (field 3 of it) = false, after the model's own.
        return _load_sentencepiece(self._model.serialized_model_proto() + b"\x1a\x02\x18\x00")


def _load_sentencepiece(proto: bytes) -> Any:
    model = sentencepiece.SentencePieceProcessor()
    if not proto or not model.LoadFromSerializedProto(proto) or not model.get_piece_size():
        raise RuntimeError("it holds no pieces")
    return model


class JsonPieces:
    """A ``tokenizer.json``, as the ``tokenizers`` library reads it.

    Decoding is done here, byte by byte, from what the file's decoder says. Raises TokenizerError
    when the file is damaged or its decoder is of a kind not known here.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._rules = _DecodeRules.read(self._tokenizer.decoder, path)
        self.leading_space = LeadingSpace.DROP_ONE if self._rules.drops_space else LeadingSpace.KEEP
        self.added = [
            AddedToken(token_id, one.content, one.special, one.lstrip, one.rstrip, one.single_word)
            for token_id, one in self._tokenizer.get_added_tokens_decoder().items()
            if one.content
        ]
        self._added_contents = {one.token_id: one.content for one in self.added}
        self.size = max(
            self._tokenizer.get_vocab_size(with_added_tokens=True),
            max(self._added_contents, default=-1) + 1,
        )
        self._leads_first, self.each_segment_leads = _leading_of(self._tokenizer)

    def encode(self, text: str, *, leads: bool) -> list[int]:
        """See Pieces."""
        tokenizer = self._tokenizer if leads else self._bare_tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> Piece | None:
        """See Pieces."""
        if token_id in self._added_contents:
            return Piece(self._added_contents[token_id].encode(), droppable=False)
        content = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.size else None
        return None if content is None else self._rules.apply(content)

    def find(self, content: str) -> int | None:
        """See Pieces."""
        token_id: int | None = self._tokenizer.token_to_id(content)
        return token_id

    @cached_property
    def _bare_tokenizer(self) -> Any:
        """The same tokenizer, but without a space before the first word."""
        if not self._leads_first:
            return self._tokenizer
        description = json.loads(self._tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            description[part] = _without_leading_space(description.get(part))
        return tokenizers.Tokenizer.from_str(json.dumps(description))


class _DecodeRules(NamedTuple):
    """How the text of a piece becomes bytes."""

    byte_level: bool
    byte_fallback: bool
    replacements: tuple[tuple[str, str], ...]
    drops_space: bool

    @classmethod
    def read(cls, decoder: Any, path: Path) -> _DecodeRules:
        """Interpret the decoder of a file; see the class for errors."""
        steps = _steps(None if decoder is None else json.loads(decoder.__getstate__()), "decoders")
        byte_level = byte_fallback = drops_space = False
        replacements: list[tuple[str, str]] = []
        for step in steps:
            match step:
                case {"type": "ByteLevel"}:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Strip", "content": " ", "start": (0 | 1) as start, "stop": 0}:
                    drops_space = drops_space or start == 1
                case {"type": "Metaspace", "replacement": str(mark)}:
                    replacements.append((mark, " "))
                    drops_space = step.get("prepend_scheme", "always") != "never"
                case _:
                    raise _unknown_decoder(path, step)
        if not steps:
            raise _unknown_decoder(path, None)
        return cls(byte_level, byte_fallback, tuple(replacements), drops_space)

    def apply(self, content: str) -> Piece:
        if self.byte_fallback and len(content) == 6 and content.startswith("<0x"):
            try:
                data = bytes([int(content[3:5], 16)])
            except ValueError:
                data = content.encode()
        else:
            for old, new in self.replacements:
                content = content.replace(old, new)
            data = _byte_level(content) if self.byte_level else content.encode()
        return Piece(data, droppable=self.drops_space and data.startswith(b" "))


def _unknown_decoder(path: Path, step: dict[str, Any] | None) -> TokenizerError:
    return TokenizerError(
        f"the decoder in {path} is not supported: {json.dumps(step)}; known are ByteLevel, "
        "Metaspace, and a Sequence of Replace, ByteFallback, Fuse and Strip"
    )


def _make_byte_of() -> dict[str, int]:
    """Byte-level BPE shows printable bytes as themselves and the others from U+0100 on, in
    order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _make_byte_of()


def _byte_level(content: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in content])
    except KeyError:  # not written in that alphabet
        return content.encode()


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return a component, or the components of a sequence, in order."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part.get(key, []) for step in _steps(inner, key)]
    return [part]


def _leading_of(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether a text gets a leading space, and whether text behind added tokens does too."""
    normalizer, splitter = tokenizer.normalizer, tokenizer.pre_tokenizer
    steps = _steps(
        None if normalizer is None else json.loads(normalizer.__getstate__()), "normalizers"
    ) + _steps(None if splitter is None else json.loads(splitter.__getstate__()), "pretokenizers")
    each = any(
        step["type"] == "Prepend"
        or step.get("prepend_scheme") == "always"
        or step.get("add_prefix_space") is True
        for step in steps
    )
    return each or any(step.get("prepend_scheme") == "first" for step in steps), each


def _without_leading_space(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part.get("type") == "Prepend":
        return None
    changed = dict(part)
    for key in ("normalizers", "pretokenizers"):
        if key in changed:
            inner = (_without_leading_space(step) for step in changed[key])
            changed[key] = [step for step in inner if step is not None]
    if "prepend_scheme" in changed:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in changed:
        changed["add_prefix_space"] = False
    return changed
