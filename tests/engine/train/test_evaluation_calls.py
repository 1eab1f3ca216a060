"""Reading replies, scoring tool calls and sums: each kind of error made by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest

from engine.train.evaluation.replies import Call, canonical, parse_reply
from engine.train.evaluation.sums import (
    Question,
    SumTally,
    calculate,
    familiar_questions,
    last_number,
    run_calculator,
    score_sum,
    unfamiliar_questions,
)
from engine.train.evaluation.tool_calls import CallTally, sample_turns, score_turn

WEATHER = Call("get_weather", {"city": "Oslo", "days": 3})


def written(name: str, arguments: Any) -> str:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"


GOOD = written("get_weather", {"city": "Oslo", "days": 3})


@pytest.mark.parametrize(
    ("text", "valid", "function", "exact", "relaxed"),
    [
        (GOOD, True, True, True, True),
        ("Let me look.\n" + GOOD, True, True, True, True),
        ("<think>\n\n</think>\n\n" + GOOD, True, True, True, True),
        (written("get_weather", {"days": 3.0, "city": "Oslo"}), True, True, True, True),
        (written("get_weather", {"city": " oslo ", "days": 3}), True, True, False, True),
        (written("get_weather", {"city": "Oslo", "days": "3"}), True, True, False, False),
        (written("get_weather", {"city": "Oslo"}), True, True, False, False),
        (written("get_weather", {"city": "Oslo", "days": 3, "x": 1}), True, True, False, False),
        (written("get_news", {"city": "Oslo", "days": 3}), True, False, False, False),
        (GOOD + "\n" + GOOD, True, False, False, False),
        (GOOD.replace("}}", "}"), False, False, False, False),
        (GOOD.removesuffix("</tool_call>"), False, False, False, False),
        (GOOD + "\n<tool_call>\nno", False, False, False, False),
        (written("get_weather", ["Oslo"]), False, False, False, False),
        (GOOD.replace("3", "NaN"), False, False, False, False),
        (GOOD.replace('"arguments"', '"parameters"'), False, False, False, False),
        ("<tool_call>\n[]\n</tool_call>", False, False, False, False),
    ],
)
def test_a_call_is_scored(
    text: str, valid: bool, function: bool, exact: bool, relaxed: bool
) -> None:
    score = score_turn([WEATHER], parse_reply(text))
    assert (score.wanted, score.called) == (True, True)
    assert (score.valid, score.right_function) == (valid, function)
    assert (score.exact, score.relaxed) == (exact, relaxed)


def test_calls_are_compared_in_any_order() -> None:
    other = Call("get_time", {})
    text = written("get_time", {}) + "\n" + GOOD
    assert score_turn([WEATHER, other], parse_reply(text)).exact
    assert not score_turn([WEATHER, WEATHER], parse_reply(text)).right_function


def test_words_are_no_call() -> None:
    score = score_turn([WEATHER], parse_reply('I would call get_weather {"city": "Oslo"}.'))
    assert score.wanted
    assert not any((score.called, score.valid, score.right_function, score.exact))


def test_json_equality_is_not_pythons() -> None:
    assert canonical({"a": 1, "b": [2.0]}) == canonical({"b": [2], "a": 1.0})
    assert canonical(True) != canonical(1)
    assert canonical("1") != canonical(1)
    assert canonical("Ärger ", relaxed=True) == canonical("äRGER", relaxed=True)
    assert canonical({"A": 1}, relaxed=True) != canonical({"a": 1}, relaxed=True)


def test_tally_counts_each_decision() -> None:
    tally = CallTally()
    tally.add(score_turn([WEATHER], parse_reply(GOOD)))  # as it should be
    tally.add(score_turn([WEATHER], parse_reply("It is cold.")))  # missed
    tally.add(score_turn([], parse_reply(GOOD)))  # uncalled for
    tally.add(score_turn([], parse_reply("It is cold.")))  # as it should be
    tally.add(score_turn([], parse_reply("<tool_call>oops")))  # uncalled for, and broken
    assert (tally.num_call_turns, tally.num_other_turns) == (2, 3)
    assert (tally.num_called_rightly, tally.num_called_wrongly, tally.num_called) == (1, 2, 3)
    assert tally.num_decided_rightly == 2
    assert (tally.num_valid, tally.num_right_function, tally.num_exact) == (2, 1, 1)
    total = CallTally(num_left_out=1)
    total.merge(tally)
    total.merge(tally)
    assert (total.num_left_out, total.num_call_turns, total.num_valid) == (1, 4, 4)


def dialogue(number: int, source: str = "s") -> dict[str, Any]:
    call = {"name": "f", "arguments": {"n": number}}
    return {
        "messages": [
            {"role": "user", "content": f"f of {number}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "f", "content": "1"},
            {"role": "assistant", "content": "One."},
        ],
        "tools": [{"name": "f", "description": "", "parameters": {}}],
        "source": source,
    }


def test_sampled_turns_are_bounded_seeded_and_see_only_their_past() -> None:
    records = [dialogue(n) for n in range(30)] + [dialogue(99, "t")]
    records.append({"messages": records[0]["messages"], "source": "no tools"})
    drawn = sample_turns(records, max_call_turns=5, max_other_turns=4, seed=3)
    assert {source: len(turns) for source, turns in drawn.items()} == {"s": 9, "t": 2}
    assert (
        drawn["s"] == sample_turns(records[:30], max_call_turns=5, max_other_turns=4, seed=3)["s"]
    )
    assert drawn["s"] != sample_turns(records, max_call_turns=5, max_other_turns=4, seed=4)["s"]
    for turn in drawn["s"]:
        assert [m["role"] for m in turn.history] == ["user", "assistant", "tool"][
            : 1 if turn.reference else 3
        ]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2*3", Fraction(7)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("2,340 * 17%", Fraction(1989, 5)),
        ("-(4 - 6) / 3", Fraction(2, 3)),
        ("12 × 2 ÷ 3", Fraction(8)),
        ("1 / 0", None),
        ("2 ** 9999999", None),
        ("__import__('os')", None),
        ("17% of 2340", None),
        ("1 +", None),
        ("", None),
        ("1" * 300, None),
    ],
)
def test_calculator_is_exact_and_refuses_the_rest(expression: str, value: Fraction | None) -> None:
    assert calculate(expression) == value


def test_calculator_tool_answers_in_json() -> None:
    assert run_calculator(Call("calculator", {"expression": "2,340*17/100"})) == '{"result": 397.8}'
    assert run_calculator(Call("calculator", {"expression": "4/2"})) == '{"result": 2}'
    assert json.loads(run_calculator(Call("calculator", {"expression": "2/3"}))) == {
        "result": 0.666666666666667
    }
    for wrong in ({}, {"expression": 3}, {"expression": "two"}):
        assert "error" in json.loads(run_calculator(Call("calculator", wrong)))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("17% of 2,340 is 397.8.", Fraction(1989, 5)),
        ("That leaves -5.", Fraction(-5)),
        ("5-3 is 2", Fraction(2)),
        ("You pay $41.40!", Fraction(207, 5)),
        ("I do not know.", None),
    ],
)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_questions_are_seeded_and_their_values_right() -> None:
    assert familiar_questions(70, 5) == familiar_questions(70, 5) != familiar_questions(70, 6)
    questions = unfamiliar_questions(50, 5)
    assert questions == unfamiliar_questions(50, 5)
    product = next(q for q in questions if q.text.startswith("Multiply"))
    a, b = (int(word.strip(",")) for word in product.text.split() if word.strip(",").isdigit())
    assert product.value == a * b


def messages(expression: Any, answer: str) -> list[dict[str, Any]]:
    call = {"name": "calculator", "arguments": {"expression": expression}}
    return [
        {"role": "user", "content": "1 / 3?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "calculator", "content": "{}"},
        {"role": "assistant", "content": answer},
    ]


@pytest.mark.parametrize(
    ("said", "called", "expression", "answer"),
    [
        (messages("1/3", "It is 0.333."), 1, 1, 1),
        (messages("1/3", "It is 0.4."), 1, 1, 0),
        (messages("3/1", "It is 0.33."), 1, 0, 1),
        (messages(["1/3"], "None."), 1, 0, 0),
        (messages("1/3", "")[:3], 1, 1, 0),
        ([{"role": "assistant", "content": "0.3333"}], 0, 0, 1),
        ([{"role": "assistant", "content": "<tool_call>0.3333"}], 0, 0, 1),
    ],
)
def test_a_sum_is_scored(
    said: list[dict[str, Any]], called: int, expression: int, answer: int
) -> None:
    tally = SumTally()
    score_sum(tally, Question("1 / 3?", Fraction(1, 3)), said)
    assert tally == SumTally(1, called, expression, answer)
