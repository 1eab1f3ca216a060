"""Made dialogues: what they claim is true, and what they ask to be copied stands before it."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest

from engine.train.synthesis import MADE_SOURCES, make_records


def made(source: str, split: str = "heldout") -> list[dict[str, object]]:
    return list(make_records(split, 1, frozenset({source})))


def test_records_repeat_with_the_seed_and_differ_between_splits() -> None:
    first = list(make_records("heldout", 1))
    assert first == list(make_records("heldout", 1))
    assert {record["source"] for record in first} == MADE_SOURCES
    texts = {json.dumps(record["messages"]) for record in first}
    train = make_records("train", 1, frozenset({"made_recall", "made_choice"}))
    shared = texts & {json.dumps(record["messages"]) for record in train}
    assert not shared


def test_arguments_stand_in_what_was_said_before() -> None:
    for record in made("made_calls"):
        said = ""
        names = {tool["name"] for tool in record["tools"]}  # type: ignore[attr-defined]
        for message in record["messages"]:  # type: ignore[attr-defined]
            for call in message.get("tool_calls", []):
                assert call["name"] in names
                for value in call["arguments"].values():
                    assert str(value).lower() in said.lower(), (value, said)
            said += f"{message['content']}\n"


def test_required_arguments_are_there_with_their_types() -> None:
    for record in made("made_calls"):
        tools = {tool["name"]: tool["parameters"] for tool in record["tools"]}  # type: ignore[attr-defined]
        for message in record["messages"]:  # type: ignore[attr-defined]
            for call in message.get("tool_calls", []):
                schema = tools[call["name"]]
                assert (
                    set(schema["required"]) <= set(call["arguments"]) <= set(schema["properties"])
                )
                for name, value in call["arguments"].items():
                    assert isinstance(value, int) == (
                        schema["properties"][name]["type"] == "integer"
                    )


@pytest.mark.parametrize("split", ["heldout", "train"])
def test_sums_are_right(split: str) -> None:
    for record in made("made_sums", split)[:500]:
        value = Fraction(0)
        for message in record["messages"]:  # type: ignore[attr-defined]
            for call in message.get("tool_calls", []):
                (expression,) = call["arguments"].values()
                assert re.fullmatch(r"[0-9]+( [-+*/] [0-9]+)+", expression)
                numbers = re.sub(r"(\d+)", r"Fraction(\1)", expression)
                value = eval(numbers, {"Fraction": Fraction})
            if message["role"] == "tool":
                result = json.loads(message["content"])["result"]
                assert abs(value - Fraction(str(result))) <= Fraction(1, 200)
            elif message["role"] == "assistant" and message["content"]:
                shown = message["content"].rstrip(".").split(" is ")[-1]
                assert Fraction(shown) == Fraction(str(result))


def test_what_was_told_is_recalled() -> None:
    for record in made("made_recall"):
        messages = record["messages"]
        answer = messages[-1]["content"]  # type: ignore[index]
        value = answer.removesuffix(".").split(" is ")[-1]
        assert value in messages[0]["content"]  # type: ignore[index]


def test_recommended_goods_are_on_the_list_and_deserve_it() -> None:
    for record in made("made_choice"):
        question, answer = (m["content"] for m in record["messages"])  # type: ignore[attr-defined]
        name = re.fullmatch(r"I recommend the (.*?): .*", answer).group(1)  # type: ignore[union-attr]
        lines = [line for line in question.split("\n") if re.search(r"\$\d+,", line)]
        price = {line: int(re.search(r"\$(\d+),", line).group(1)) for line in lines}  # type: ignore[union-attr]
        chosen = next(line for line in lines if name in line)
        if "cheapest" in question:
            assert price[chosen] == min(price.values())
        elif budget := re.search(r"at most \$(\d+)", question):
            assert price[chosen] <= int(budget.group(1))
