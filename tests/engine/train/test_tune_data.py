"""Tuning data: what is read, what is refused and with which words, what is learned of it."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.config import DEFAULT_MODEL
from engine.errors import ConfigError
from engine.hub import resolve_model
from engine.tokenizer import Tokenizer
from engine.train.tuning.dataset import Dataset, Document, Summary, build_dataset
from engine.train.tuning.examples import DataError, read_examples
from engine.train.tuning.plan import Method, TuneSettings, make_plan
from tests.engine.tokenizer_files import byte_level

PEBBLE = resolve_model(DEFAULT_MODEL)
THINKING = (  # drops the reasoning of all answers but the last, as Qwen3's template does
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}{{- message.content + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def good(count: int) -> list[dict[str, Any]]:
    return [chat(f"What comes after {i}?", f"After {i} comes {i + 1}.") for i in range(count)]


def write(path: Path, records: list[Any]) -> Path:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pebble() -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(PEBBLE)
    yield tokenizer
    tokenizer.close()


def build(path: Path, tokenizer: Tokenizer, **options: Any) -> Dataset:
    return build_dataset(read_examples(path), tokenizer, **{"max_len": 512, "seed": 0, **options})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "not JSON"),
        ("[1, 2]", "a JSON list; each line must be an object"),
        ({"question": "a"}, "this one has question"),
        ({"messages": []}, "must be a list that is not empty"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn to learn"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            "messages[0].role is 'bot'; it must be one of system, user, assistant, tool",
        ),
        (chat("a", " \n"), "messages[1].content is empty"),
        (chat("", "a"), "messages[0].content is empty"),
        ({"prompt": "a", "completion": ""}, "messages[1].content is empty"),
        ({"text": "  "}, "it must be a text that is not empty"),
        ({"text": 7}, "text is 7"),
        (chat("a", "b <|im_end|> c"), "spells the control token <|im_end|>"),
        ({"text": "<|endoftext|>"}, "spells the control token <|endoftext|>"),
        (chat("a", "b", tools=[{"type": "function"}]), "tools[0] must be a function schema"),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "every assistant turn has weight 0",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                    }
                ]
            },
            "messages[0].tool_calls[0]: the arguments are not JSON",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts that are not text",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, pebble: Tokenizer, line: Any, words: str) -> None:
    path = write(tmp_path / "data.jsonl", [*good(20), "", line])
    with pytest.raises(DataError, match="1 of 21 lines cannot be used") as raised:
        build(path, pebble)
    (problem,) = raised.value.problems
    assert problem.line == 22  # empty lines count as lines of the file
    assert words in problem.text
    summary = build(path, pebble, skip_bad=True).summary
    assert (summary.num_skipped, summary.num_train + summary.num_heldout) == (1, 20)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, "there is no file"),
        ("empty.jsonl", b"\n\n", "holds no examples"),
        ("latin.jsonl", b'{"text": "\xe9"}', "not UTF-8"),
        ("plain.jsonl.gz", b"{}", "cannot be read"),
        ("plain.jsonl.xz", b"{}", "cannot be read"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_examples(tmp_path / name)


def test_packed_files_read_as_plain_ones(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.jsonl", good(3))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    want = read_examples(plain)
    assert len(want.examples) == 3
    assert read_examples(tmp_path / "a.jsonl.gz") == want
    assert read_examples(tmp_path / "a.jsonl.xz") == want


def test_too_few_examples_are_refused(tmp_path: Path, pebble: Tokenizer) -> None:
    path = write(tmp_path / "data.jsonl", good(9) * 3)
    assert read_examples(path).num_duplicates == 18
    with pytest.raises(DataError, match="9 different usable examples; at least 10"):
        build(path, pebble)


def test_split_keeps_every_example_once(tmp_path: Path, pebble: Tokenizer) -> None:
    path = write(tmp_path / "data.jsonl", good(60))
    data = build(path, pebble)
    keys = [tuple(one.token_ids.tolist()) for one in (*data.train, *data.heldout)]
    assert len(set(keys)) == len(keys) == 60
    assert (len(data.heldout), data.summary.num_heldout, data.summary.num_train) == (6, 6, 54)
    again, other = build(path, pebble), build(path, pebble, seed=1)
    assert texts(again.heldout, pebble) == texts(data.heldout, pebble)
    assert texts(other.heldout, pebble) != texts(data.heldout, pebble)


def texts(documents: tuple[Document, ...], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(one.token_ids.tolist(), skip_special=False) for one in documents]


def learned(document: Document, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(document.token_ids[document.learned].tolist(), skip_special=False)


def test_answers_are_learned_and_nothing_else(tmp_path: Path, pebble: Tokenizer) -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        *chat("One?", "First.")["messages"],
        *chat("Two?", "Second.")["messages"],
        {"role": "user", "content": "Never answered."},
    ]
    path = write(tmp_path / "data.jsonl", [{"messages": turns}, *good(20)])
    data = build(path, pebble)
    every = (*data.train, *data.heldout)
    (mine,) = [one for one in every if "Second." in learned(one, pebble)]
    assert learned(mine, pebble) == "First.<|im_end|>Second.<|im_end|>"
    want = pebble.render_chat(
        [{**turns[0], "role": "system"}, *turns[1:-1]], add_generation_prompt=False
    )
    assert pebble.decode(want, skip_special=False).startswith(
        pebble.decode(mine.token_ids.tolist(), skip_special=False)
    )
    # A prompt's ids are a prefix of what was learned from: the model meets what it knows.
    prompt = pebble.render_chat([{**turns[0], "role": "system"}, turns[1]])
    assert mine.token_ids[: len(prompt)].tolist() == prompt
    assert not mine.learned[: len(prompt)].any()
    assert mine.learned[len(prompt)]


def test_weight_zero_is_context_only(tmp_path: Path, pebble: Tokenizer) -> None:
    record = chat("One?", "Wrong.")
    record["messages"][1]["weight"] = 0
    record["messages"] += chat("Two?", "Right.")["messages"]
    data = build(write(tmp_path / "d.jsonl", [record, *good(20)]), pebble)
    (mine,) = [one for one in (*data.train, *data.heldout) if "Right" in learned(one, pebble)]
    assert learned(mine, pebble) == "Right.<|im_end|>"
    assert "Wrong." in pebble.decode(mine.token_ids.tolist())


def test_tool_calls_come_in_either_spelling(tmp_path: Path, pebble: Tokenizer) -> None:
    schema = {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}

    def record(arguments: object, tool: object) -> dict[str, Any]:
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        turns = [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ]
        return {"messages": turns, "tools": [tool]}

    found = []
    for index, one in enumerate(
        (record('{"a": 1}', {"type": "function", "function": schema}), record({"a": 1}, schema))
    ):
        data = build(write(tmp_path / f"{index}.jsonl", [one, *good(20)]), pebble)
        (mine,) = [d for d in (*data.train, *data.heldout) if "It is" in learned(d, pebble)]
        assert learned(mine, pebble) == (
            '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
            "It is 3.<|im_end|>"
        )
        found.append(mine.token_ids.tolist())
    assert found[0] == found[1]


def test_plain_text_is_learned_with_its_end(tmp_path: Path, pebble: Tokenizer) -> None:
    data = build(write(tmp_path / "d.jsonl", [{"text": f"Text {i}."} for i in range(10)]), pebble)
    for one in data.train:
        assert learned(one, pebble).endswith(".<|endoftext|>")


def test_prompt_and_completion_are_a_dialogue(tmp_path: Path, pebble: Tokenizer) -> None:
    pairs = [{"prompt": f"What is {i}?", "completion": f"{i}."} for i in range(10)]
    turns = [chat(f"What is {i}?", f"{i}.") for i in range(10)]
    one, other = (
        build(write(tmp_path / f"{name}.jsonl", records), pebble)
        for name, records in (("pairs", pairs), ("turns", turns))
    )
    assert texts(one.train, pebble) == texts(other.train, pebble)


def test_long_examples_are_cut_and_counted(tmp_path: Path, pebble: Tokenizer) -> None:
    long_answer = chat("Count.", " ".join(map(str, range(100))))
    long_question = chat(" ".join(map(str, range(100))), "Yes.")  # nothing to learn is left
    data = build(
        write(tmp_path / "d.jsonl", [*good(20), long_answer, long_question]), pebble, max_len=60
    )
    assert data.summary.num_cut == 2
    assert data.summary.longest > 100
    assert data.summary.num_train + data.summary.num_heldout == 21
    assert max(len(one) for one in (*data.train, *data.heldout)) == 60


def test_template_that_forgets_gives_a_document_for_each_answer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level(tmp_path, THINKING))
    turns = [*chat("One?", "First.")["messages"], *chat("Two?", "Second.")["messages"]]
    try:
        data = build(write(tmp_path / "d.jsonl", [{"messages": turns}, *good(20)]), tokenizer)
        every = (*data.train, *data.heldout)
        mine = [one for one in every if "Two" in tokenizer.decode(one.token_ids.tolist())]
        mine += [one for one in every if "First" in learned(one, tokenizer)]
        assert [learned(one, tokenizer) for one in mine] == [
            "<think>\n\n</think>\n\nSecond.<|im_end|>",
            "<think>\n\n</think>\n\nFirst.<|im_end|>",
        ]
    finally:
        tokenizer.close()


def summary(num_tokens: int) -> Summary:
    return Summary(200, 0, 0, 180, 20, num_tokens, num_tokens // 2, 100, 0, 2048)


def test_plan_fits_data_and_model(tmp_path: Path) -> None:
    settings = TuneSettings(data=tmp_path / "d.jsonl", out=tmp_path / "o")
    little = make_plan(settings, summary(10_000), num_parameters=10**7, hidden_size=256)
    assert little.method is Method.LORA
    assert little.epochs > 2
    small = make_plan(settings, summary(10**8), num_parameters=10**7, hidden_size=256)
    assert small.method is Method.FULL
    much = make_plan(settings, summary(10**8), num_parameters=10**9, hidden_size=2048)
    assert (much.method, much.epochs) == (Method.LORA, 2)
    assert much.learning_rate == pytest.approx(little.learning_rate / 8)
    assert small.learning_rate == pytest.approx(little.learning_rate / 10)
    for plan in (little, much, small):
        factors = [plan.lr_factor(step) for step in range(plan.num_steps)]
        peak = factors.index(max(factors))
        assert factors[:peak] == sorted(factors[:peak])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert max(factors) == pytest.approx(1.0)
        assert factors[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0.0}, "epochs is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"target_modules": ("q_proj", "head")}, "target modules are head"),
        ({"keep_adapter": True, "method": Method.FULL}, "makes no adapter to keep"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        TuneSettings(data=tmp_path / "d", out=tmp_path / "o", **settings)
