"""Text to token ids and back, and chat messages to token ids.

Runs in the server process and loads no torch. Everything here may be called from several threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.chat_template import ChatTemplate, find_templates
from engine.errors import TemplateError, TokenizerError
from engine.pieces import AddedToken, JsonPieces, Pieces, SentencePieces
from engine.spelling import END_MARK, Spelling
from engine.text_stream import Piece, TextStream

__all__ = ["TextStream", "Tokenizer"]

_NOTHING = Piece(b"", droppable=False)
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", *_NAMED_TOKENS})


class Tokenizer:
    """A checkpoint's tokenizer with its chat template. Made by ``load``."""

    vocab_size: int
    """One more than the highest token id that has a piece; a model may have more rows."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer, as the checkpoint states them."""
    special_ids: frozenset[int]
    """Tokens that are no text: they are left out of decoded text."""
    has_chat_template: bool
    takes_tools: bool
    """Whether the chat template tells the model of tools."""

    def __init__(
        self,
        pieces: Pieces,
        added: Iterable[AddedToken],
        named: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
        template: ChatTemplate | None,
    ) -> None:
        tokens = list(added)
        self._pieces = pieces
        self._contents = {token.token_id: token.content for token in tokens}
        self._named = dict(named)
        self._spelling = Spelling(tokens)
        self._cache: dict[int, Piece] = {}
        self._template = template
        self.vocab_size = max(pieces.size, 1 + max(self._contents, default=-1))
        self.eos_token_ids = eos_token_ids
        self.special_ids = frozenset(token.token_id for token in tokens if token.special)
        self.has_chat_template = template is not None
        self.takes_tools = template is not None and template.mentions("tools")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read ``tokenizer.json`` or else ``tokenizer.model`` (sentencepiece), and what belongs to
        it.

        Raises TokenizerError when there is neither, or when a file is damaged.
        """
        config = _read_json(directory / "tokenizer_config.json")
        pieces = _open_pieces(directory, config)
        named = _named_tokens(config, _read_json(directory / "special_tokens_map.json"))
        added = _merge_added(pieces, config, named)
        sources = find_templates(directory, config)
        template = ChatTemplate(sources) if sources else None
        if template is not None:
            template.start()
        ids = {token.content: token.token_id for token in added}
        return cls(pieces, added, named, _eos_ids(directory, named, ids), template)

    def close(self) -> None:
        """End the child process of the chat template; it starts again when needed."""
        if self._template is not None:
            self._template.close()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the ids of ``text``, without a begin- or end-of-sequence token.

        Args:
            text: lone surrogates in it become U+FFFD.
            parse_special: spellings of control tokens become these tokens; else they stay text.
        """
        text = _without_surrogates(text)
        return self._parse(text) if parse_special else self._encode_plain(text, leads=True)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``. Bytes that are not UTF-8 become U+FFFD as Python's decoder
        does it.
        """
        stream = self.stream(skip_special=skip_special)
        return stream.push(ids) + stream.finish()

    def stream(self, *, skip_special: bool = True) -> TextStream:
        """Return a decoder for an answer that grows."""
        hidden = self.special_ids if skip_special else frozenset[int]()
        return TextStream(self._piece, hidden, self._pieces.leading_space)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, as it stands inside a text; b"" for an id without a
        piece.
        """
        return self._piece(token_id).data

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Return the prompt's ids. Waits for the template's process: call it in an executor.

        What users wrote never becomes a control token, whatever it spells.

        Args:
            messages: in Chat Completions' shape.
            tools: function schemas in Chat Completions' shape.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, for the model to go on with it; no
                generation prompt then.
            kwargs: more variables for the template.

        Raises TemplateError when there is no template, it refuses the messages, fails or runs too
        long.
        """
        return self.encode_rendered(
            self.render_chat_text(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
        )

    def encode_rendered(self, text: str, *, continues: bool = False) -> list[int]:
        """Return the ids of what ``render_chat_text`` gave, or of a part of it.

        Args:
            text: cut at any place but inside a control token.
            continues: other text comes before this part.
        """
        return self._parse(_without_surrogates(text), leads=not continues)

    def render_chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Return the prompt's text for ``encode_rendered`` alone: what users typed is marked in it.

        Arguments and errors as for ``render_chat``.
        """
        if self._template is None:
            raise TemplateError("the model has no chat template; send a plain prompt instead")
        if taken := sorted(_RESERVED.intersection(kwargs)):
            raise TemplateError(f"the template's variable {taken[0]} cannot be set from outside")
        try:
            marked = [
                self._spelling.mark(dict(message), answer=message.get("role") == "assistant")
                for message in messages
            ]
            variables = self._spelling.mark(dict(kwargs)) | self._named
            variables["tools"] = self._spelling.mark(list(tools)) if tools else None
        except RecursionError as error:
            raise TemplateError("the messages are nested too deeply") from error
        if continue_final_message:
            _open_final(marked)
        variables["messages"] = marked
        variables["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        text = self._template.render(variables)
        if continue_final_message:
            head, found, _ = text.rpartition(END_MARK)
            if not found:
                raise TemplateError("the template drops the final message; it cannot be continued")
            text = head
        return text

    def _parse(self, text: str, *, leads: bool = True) -> list[int]:
        ids: list[int] = []
        for before, token in self._spelling.split(text):
            ids += self._encode_plain(self._spelling.unmark(before), leads=leads)
            if token is not None:
                ids.append(token.token_id)
            leads = self._pieces.each_segment_leads
        return ids

    def _encode_plain(self, text: str, *, leads: bool) -> list[int]:
        if not text:
            return []
        ids: list[int] = []
        for part in self._spelling.cut(text):
            ids += self._encode_part(part, leads=leads)
            leads = False
        return ids

    def _encode_part(self, part: str, *, leads: bool) -> list[int]:
        ids = self._pieces.encode(part, leads=leads)
        if self._spelling.control_ids.isdisjoint(ids) or len(part) == 1:
            return ids
        # A normaliser has made a control token of another spelling (full-width letters, say).
        ids = []
        for char in part:
            ids += self._pieces.encode(char, leads=leads)
            leads = False
        return ids

    def _piece(self, token_id: int) -> Piece:
        piece = self._cache.get(token_id)
        if piece is None:
            if (content := self._contents.get(token_id)) is not None:
                piece = Piece(content.encode(), droppable=False)
            else:
                piece = self._pieces.piece(token_id) or _NOTHING
            if 0 <= token_id < self.vocab_size:
                self._cache[token_id] = piece
        return piece


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_final(messages: list[dict[str, Any]]) -> None:
    """Put the end mark behind the last message's text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + END_MARK
        return
    texts = [part for part in content or [] if isinstance(part, dict) and "text" in part]
    if not texts:
        raise TemplateError("there is no final message with text that could be continued")
    texts[-1]["text"] = f"{texts[-1]['text']}{END_MARK}"


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, {} when there is no file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


def _open_pieces(directory: Path, config: dict[str, Any]) -> Pieces:
    if (directory / "tokenizer.json").is_file():
        return JsonPieces(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        return SentencePieces(
            directory / "tokenizer.model", each_segment_leads=config.get("legacy") is True
        )
    raise TokenizerError(
        f"there is no tokenizer in {directory}: looked for tokenizer.json and tokenizer.model"
    )


class _ConfiguredToken(NamedTuple):
    content: str
    special: bool
    lstrip: bool
    rstrip: bool
    single_word: bool

    @classmethod
    def read(cls, value: object, *, special: bool) -> _ConfiguredToken | None:
        """Read a token as Hugging Face writes it: its text, or an object with ``content``."""
        if isinstance(value, str) and value:
            return cls(value, special, False, False, False)
        if isinstance(value, dict) and isinstance(content := value.get("content"), str) and content:
            flags = (bool(value.get(flag)) for flag in ("lstrip", "rstrip", "single_word"))
            return cls(content, bool(value.get("special", special)), *flags)
        return None


def _named_tokens(*configs: dict[str, Any]) -> dict[str, str]:
    named: dict[str, str] = {}
    for config in configs:
        for name in _NAMED_TOKENS:
            token = _ConfiguredToken.read(config.get(name), special=True)
            if token is not None:
                named.setdefault(name, token.content)
    return named


def _merge_added(
    pieces: Pieces, config: dict[str, Any], named: Mapping[str, str]
) -> list[AddedToken]:
    """Add what tokenizer_config.json knows of added tokens to what the tokenizer file knows."""
    merged = {token.token_id: token for token in pieces.added}
    decoder = config.get("added_tokens_decoder")
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        token = _ConfiguredToken.read(value, special=False)
        if token is None or not str(key).isdecimal():
            raise TokenizerError(
                f"tokenizer_config.json: added_tokens_decoder[{key!r}] is no token"
            )
        merged[int(key)] = AddedToken(int(key), *token)
    known = {token.content for token in merged.values()}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    values = [*named.values(), *(extra if isinstance(extra, list) else extra.values())]
    for value in values:
        token = _ConfiguredToken.read(value, special=True)
        token_id = None if token is None or token.content in known else pieces.find(token.content)
        if token is not None and token_id is not None:
            merged[token_id] = AddedToken(token_id, *token)
    # A named token ends, pads or begins a text: it is special whatever its entry says.
    return [
        token._replace(special=token.special or token.content in named.values())
        for token in merged.values()
    ]


def _eos_ids(directory: Path, named: Mapping[str, str], ids: Mapping[str, int]) -> tuple[int, ...]:
    """generation_config.json, else config.json, and in any case the tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(directory / name).get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        for one in values:
            if not isinstance(one, int) or isinstance(one, bool) or one < 0:
                raise TokenizerError(f"{directory / name}: eos_token_id is {value!r}, not ids")
        found += values
        if found:
            break
    own = ids.get(named.get("eos_token", ""))
    return tuple(dict.fromkeys(found if own is None else [*found, own]))
