"""The leak check against planted leaks."""

from __future__ import annotations

from typing import Any

import pytest

from engine.train.evaluation.leaks import HeldOutIndex, SourceLeaks, dialogue_hash, is_templated

LONG = "the quick brown fox jumps over the lazy dog while seven sad sheep look on"  # 15 words
ZH = "今天天气很好我们一起去公园散步吧然后喝茶"  # 20 characters, no spaces


def chat(question: str, answer: str, source: str = "found", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "source": source, **more}


def check(held_out: list[dict[str, Any]], *training: dict[str, Any]) -> SourceLeaks:
    index = HeldOutIndex(held_out)
    for record in training:
        index.show(record)
    (leaks,) = index.by_source().values()
    return leaks


def test_clean_text_is_clean() -> None:
    leaks = check([chat("a?", LONG)], chat("b?", "Something else entirely"), chat("a?", "no"))
    assert leaks == SourceLeaks(False, 1, 0, 1, 0, 1, 0)


def test_planted_dialogue_is_found_whatever_its_dress() -> None:
    planted = chat("Who  are YOU?", "A mill.\n", source="other", tools=[{"name": "f"}])
    planted["messages"].insert(0, {"role": "system", "content": "Be kind."})
    index = HeldOutIndex([chat("who are you?", "a mill."), chat("who are you?", "a river.")])
    index.show(planted)
    assert index.known_dialogues() == [{"source": "found", "begins": "who are you?"}]
    assert [leak.num_known_dialogues for leak in index.by_source().values()] == [1]


def test_a_dialogue_differs_by_role_call_and_order() -> None:
    plain = chat("a", "b")
    swapped = {"messages": plain["messages"][::-1]}
    calling = chat("a", "b")
    calling["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {"x": 1}}]
    other = chat("a", "b")
    other["messages"][1]["tool_calls"] = [{"name": "f", "arguments": {"x": 2}}]
    assert len({dialogue_hash(record) for record in (plain, swapped, calling, other)}) == 4


def test_planted_turn_is_found_without_its_dialogue() -> None:
    leaks = check([chat("a?", "You're welcome!")], chat("b?", "You're  welcome!"))
    assert (leaks.num_known_dialogues, leaks.num_known_turns) == (0, 1)
    asked = check([chat("a?", "You're welcome!")], chat("You're welcome!", "c"))
    assert asked.num_known_turns == 0  # a person said it


@pytest.mark.parametrize("shared", [12, 13])
def test_thirteen_words_in_a_row_are_an_overlap(shared: int) -> None:
    words = LONG.upper().split()[:shared]
    planted = chat("before " + ", ".join(words) + "; after", "c")  # a person's turn counts, too
    leaks = check([chat("a?", LONG)], chat("b?", "filler words"), planted)
    assert (leaks.num_long_texts, leaks.num_overlapping) == (1, int(shared == 13))


def test_an_overlap_does_not_cross_texts() -> None:
    words = LONG.split()
    leaks = check([chat("a?", LONG)], chat(" ".join(words[:8]), " ".join(words[8:])))
    assert leaks.num_overlapping == 0


@pytest.mark.parametrize("shared", [12, 13])
def test_chinese_is_compared_by_characters(shared: int) -> None:
    planted = {"text": "他说：" + ZH[3 : 3 + shared] + "。", "source": "text"}
    leaks = check([chat("a?", ZH)], planted)
    assert (leaks.num_long_texts, leaks.num_overlapping) == (1, int(shared == 13))


def test_short_answers_have_no_grams() -> None:
    leaks = check([chat("a?", "Too short to compare.")], chat("b?", "Too short to compare."))
    assert (leaks.num_long_texts, leaks.num_overlapping) == (0, 0)


def test_large_training_text_is_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.train.evaluation.leaks._BATCH_UNITS", 40)
    filler = [chat(f"question {n}", f"answer {n} " * 5) for n in range(50)]
    leaks = check([chat("a?", LONG)], *filler[:25], chat("b?", LONG + " again"), *filler[25:])
    assert (leaks.num_known_turns, leaks.num_overlapping) == (0, 1)


def test_text_records_count_as_answers() -> None:
    leaks = check([{"text": LONG, "source": "code"}], {"text": LONG + "\n", "source": "code"})
    assert leaks == SourceLeaks(False, 1, 1, 1, 1, 1, 1)


def test_templated_sources_are_named() -> None:
    assert all(map(is_templated, ("synth_weather", "made_calls", "snakes_math", "snips")))
    assert not any(map(is_templated, ("sgd", "dolly", "persona_chat", "kdconv_zh")))
