"""Tokenizers of every kind: against the libraries they come from, and decoding piece by piece."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.tokenizer import Tokenizer
from tests.engine import tokenizer_files as files

SLOW_FIXTURE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\t▁<>|abtheTand0.,é€日本🙂\u200d\ufdd0\ufffd"),
        st.characters(codec="utf-8"),
    ),
    max_size=40,
)


@pytest.fixture(scope="module", params=list(files.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def directory(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(kind)
    files.KINDS[kind](made)
    return made


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Iterator[Tokenizer]:
    loaded = Tokenizer.load(directory)
    yield loaded
    loaded.close()


class TestEveryKind:
    @SLOW_FIXTURE
    @given(data=st.data())
    def test_any_split_of_any_ids_streams_to_the_whole(
        self, tokenizer: Tokenizer, data: st.DataObject
    ) -> None:
        ids = data.draw(
            st.lists(st.integers(-2, tokenizer.vocab_size + 20), max_size=60), label="ids"
        )
        skip = data.draw(st.booleans(), label="skip_special")
        whole = tokenizer.decode(ids, skip_special=skip)
        stream = tokenizer.stream(skip_special=skip)
        shown = ""
        while ids:
            count = data.draw(st.integers(1, len(ids)))
            shown += stream.push(ids[:count])
            assert whole.startswith(shown)
            ids = ids[count:]
        assert shown + stream.finish() == whole

    @SLOW_FIXTURE
    @given(text=TEXTS)
    def test_text_comes_back(self, tokenizer: Tokenizer, kind: str, text: str) -> None:
        decoded = tokenizer.decode(tokenizer.encode(text), skip_special=False)
        if kind == "byte-level":
            assert decoded == unicodedata.normalize("NFC", text)
        elif kind == "metaspace":  # the library adds no space where there is one already
            assert decoded == text.replace("▁", " ") or " " + decoded == text.replace("▁", " ")
        elif kind in ("metaspace-never", "prepend"):  # nor does it know a real mark from a space
            assert decoded == text.replace("▁", " ")
        elif kind != "sentencepiece-nfkc":
            assert decoded == text

    @SLOW_FIXTURE
    @given(data=st.data())
    def test_bytes_of_tokens_are_the_bytes_of_the_text(
        self, tokenizer: Tokenizer, data: st.DataObject
    ) -> None:
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
        joined = b"".join(tokenizer.token_bytes(one) for one in ids)
        decoded = tokenizer.decode(ids, skip_special=False)
        assert joined.decode("utf-8", "replace").lstrip(" ") == decoded.lstrip(" ")

    @SLOW_FIXTURE
    @given(text=TEXTS, spelling=st.sampled_from(files.CONTROL), tail=TEXTS)
    def test_plain_text_has_no_control_tokens(
        self, tokenizer: Tokenizer, text: str, spelling: str, tail: str
    ) -> None:
        ids = tokenizer.encode(text + spelling + tail)
        assert tokenizer.special_ids.isdisjoint(set(ids) - {0})  # 0 may be <unk>

    def test_control_tokens_are_found_when_asked_for(self, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode("a<|im_start|>b<|im_end|>", parse_special=True)
        control = [one for one in ids if one in tokenizer.special_ids]
        assert [tokenizer.token_bytes(one) for one in control] == [b"<|im_start|>", b"<|im_end|>"]
        assert tokenizer.decode(ids) == "ab" or tokenizer.decode(ids) == "a b"

    def test_nothing_is_nothing(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("") == []
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode([10**9, tokenizer.vocab_size + 5, -1]) == ""
        assert tokenizer.token_bytes(tokenizer.vocab_size + 1) == b""

    def test_lone_surrogates_become_replacement_characters(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("the\ud800 dog") == tokenizer.encode("the\ufffd dog")
        assert tokenizer.encode("\ud83d\ude42") == tokenizer.encode("🙂")

    def test_a_character_is_never_shown_in_parts(self, tokenizer: Tokenizer) -> None:
        stream = tokenizer.stream()
        parts = [stream.push([one]) for one in tokenizer.encode("🙃日本\U0001f9d1‍🚀")]
        assert not any("\ufffd" in part for part in parts)
        assert stream.finish() == ""
        assert "".join(parts) == "🙃日本\U0001f9d1‍🚀"


class TestByteFallback:
    @SLOW_FIXTURE
    @given(data=st.binary(max_size=12), tail=st.sampled_from(["", "the"]))
    @pytest.mark.parametrize("kind", ["sentencepiece", "prepend"], indirect=True, scope="module")
    def test_any_bytes_decode_as_python_decodes_them(
        self, tokenizer: Tokenizer, data: bytes, tail: str
    ) -> None:
        byte_ids: dict[bytes, int] = {}
        for one in range(tokenizer.vocab_size):
            content = tokenizer.token_bytes(one)
            if len(content) == 1:
                byte_ids.setdefault(content, one)
        ids = [byte_ids[bytes([one])] for one in b"x" + data] + tokenizer.encode(tail)
        text = tokenizer.decode(ids)
        assert text.replace(" ", "") == (b"x" + data + tail.encode()).decode(
            "utf-8", "replace"
        ).replace(" ", "")


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-prefix"], indirect=True)
class TestAgainstSentencepiece:
    @pytest.fixture
    def processor(self, directory: Path) -> Any:
        return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))

    @SLOW_FIXTURE
    @given(text=TEXTS.filter(lambda text: "▁" not in text))
    def test_ids(self, tokenizer: Tokenizer, processor: Any, text: str) -> None:
        assert tokenizer.encode(text) == processor.encode(text)

    @pytest.mark.parametrize("line", files.LINES[:6])
    def test_text(self, tokenizer: Tokenizer, processor: Any, line: str) -> None:
        assert tokenizer.decode(processor.encode(line)) == processor.decode(processor.encode(line))

    @SLOW_FIXTURE
    @given(data=st.data())
    def test_text_of_any_pieces(
        self, tokenizer: Tokenizer, processor: Any, data: st.DataObject
    ) -> None:
        words = [
            one
            for one in range(processor.get_piece_size())
            if not processor.is_byte(one) and one not in tokenizer.special_ids
        ]
        ids = data.draw(st.lists(st.sampled_from(words), max_size=20))
        assert tokenizer.decode(ids) == processor.decode(ids)


def test_squeezed_spaces_decode_as_sentencepiece_decodes_them(tmp_path: Path) -> None:
    files.KINDS["sentencepiece-nfkc"](tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.load(tmp_path)
    space = processor.piece_to_id("▁")
    for ids in ([space, space, *processor.encode("the dog")], processor.encode("  a  b ")):
        assert tokenizer.decode(ids) == processor.decode(ids)
    tokenizer.close()


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "prepend"], indirect=True)
class TestAgainstTokenizers:
    @pytest.fixture
    def oracle(self, directory: Path) -> Any:
        return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    @SLOW_FIXTURE
    @given(text=TEXTS)
    def test_ids_of_plain_text(self, tokenizer: Tokenizer, oracle: Any, text: str) -> None:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids

    @SLOW_FIXTURE
    @given(parts=st.lists(st.one_of(st.sampled_from(files.CONTROL + files.SOFT), TEXTS)))
    def test_ids_with_control_tokens(
        self, tokenizer: Tokenizer, oracle: Any, parts: list[str]
    ) -> None:
        text = "".join(parts)
        expected = oracle.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, parse_special=True) == expected

    @pytest.mark.parametrize("line", files.LINES[:6])
    def test_text(self, tokenizer: Tokenizer, oracle: Any, line: str) -> None:
        ids = oracle.encode(line + "<|im_end|>", add_special_tokens=False).ids
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(
            ids, skip_special_tokens=False
        )


class TestLoading:
    def test_end_tokens_come_from_the_generation_config(self, tmp_path: Path) -> None:
        files.byte_level(tmp_path)
        files.write_config(tmp_path, "generation_config.json", {"eos_token_id": [7, 9]})
        files.write_config(tmp_path, "config.json", {"eos_token_id": 3})
        tokenizer = Tokenizer.load(tmp_path)
        own = tokenizer.encode("<|im_end|>", parse_special=True)[0]
        assert tokenizer.eos_token_ids == (7, 9, own)
        tokenizer.close()

    def test_one_end_token_of_the_config(self, tmp_path: Path) -> None:
        files.byte_level(tmp_path, template=None, eos_token=None)
        files.write_config(tmp_path, "config.json", {"eos_token_id": 3})
        assert Tokenizer.load(tmp_path).eos_token_ids == (3,)

    def test_added_tokens_only_the_config_knows(self, tmp_path: Path) -> None:
        decoder = {"900": {"content": "<|new|>", "special": True, "rstrip": True}}
        files.byte_level(tmp_path, template=None, added_tokens_decoder=decoder)
        tokenizer = Tokenizer.load(tmp_path)
        ids = tokenizer.encode("the<|new|>  dog", parse_special=True)
        assert ids == [*tokenizer.encode("the"), 900, *tokenizer.encode("dog")]
        assert tokenizer.vocab_size == 901
        assert tokenizer.decode([900]) == ""

    def test_no_tokenizer_names_what_was_looked_for(self, tmp_path: Path) -> None:
        with pytest.raises(TokenizerError, match=r"tokenizer\.json and tokenizer\.model"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("tokenizer.model", b""),
            ("tokenizer.model", b"not a model"),
            ("tokenizer.json", b"{"),
            ("tokenizer.json", b'{"version": "1.0"}'),
            ("tokenizer_config.json", b"[]"),
            ("tokenizer_config.json", b"\xff\xfe"),
            ("generation_config.json", b'{"eos_token_id": "</s>"}'),
            ("chat_template.json", b"{}"),
            ("chat_template.jinja", b"\xff"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path: Path, name: str, content: bytes) -> None:
        files.byte_level(tmp_path)
        if name == "tokenizer.model":
            (tmp_path / "tokenizer.json").unlink()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError) as caught:
            Tokenizer.load(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_a_decoder_of_another_kind_is_refused(self, tmp_path: Path) -> None:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="WordPiece"):
            Tokenizer.load(tmp_path)

    def test_importing_the_package_loads_no_torch(self) -> None:
        program = "import sys, engine; sys.exit('torch' in sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True)
