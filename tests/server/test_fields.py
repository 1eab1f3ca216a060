"""Strict readers: right values pass unchanged, wrong ones name themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.dialects.fields import Fields, check_token_ids, load_json
from server.dialects.sampling import SAMPLING_FIELDS, read_n, read_sampling
from server.errors import ApiError
from server.request import SamplingOptions

VOCAB = 100


def sampling(body: dict[str, Any], max_tokens: int | None = None) -> SamplingOptions:
    return read_sampling(Fields(body), vocab_size=VOCAB, max_tokens=max_tokens, logprobs=None)


def refusal(call: Callable[[], object]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == 400
    assert caught.value.kind == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"{", "JSON"),
        (b'{"a": NaN}', "JSON"),
        (b'{"a": 1} x', "JSON"),
        (b'{"a": "\xff\xfe"}', "JSON"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_broken_json_is_refused(data: bytes, word: str) -> None:
    error = refusal(lambda: load_json(data))
    assert error.code == "invalid_json"
    assert word in error.message


@pytest.mark.parametrize("body", [None, [], "text", 3, True])
def test_only_an_object_is_a_body(body: object) -> None:
    assert "must be a JSON object" in refusal(lambda: Fields(body)).message


@pytest.mark.parametrize("wrong", [True, 1.0, "1", [1], {}, 1.5])
def test_integer_takes_integers_only(wrong: object) -> None:
    error = refusal(lambda: Fields({"k": wrong}, "a.b").integer("k"))
    assert error.param == "a.b.k"
    assert error.code == "invalid_type"
    assert "integer" in error.message


@pytest.mark.parametrize("wrong", [False, "0.5", [0.5], {}, math.nan, math.inf, -math.inf])
def test_number_takes_finite_numbers_only(wrong: object) -> None:
    assert refusal(lambda: Fields({"k": wrong}).number("k")).param == "k"


@given(st.integers(-(10**400), 10**400))
def test_number_in_range_or_refused(value: int) -> None:
    fields = Fields({"k": value})
    if 0 <= value <= 2:
        assert fields.number("k", least=0, most=2) == value
    else:
        assert "between 0 and 2" in refusal(lambda: fields.number("k", least=0, most=2)).message


def test_null_is_absent() -> None:
    fields = Fields({"k": None})
    assert fields.integer("k") is None
    assert fields.number("k") is None
    assert fields.string("k") is None
    assert fields.array("k", min_len=1) is None
    assert fields.inner("k") is None
    assert fields.mapping("k") is None
    assert fields.boolean("k", True) is True
    assert fields.choice("k", ("a", "b"), "b") == "b"
    assert refusal(lambda: fields.required("k")).code == "missing_required_parameter"


@pytest.mark.parametrize("wrong", [0, 1, "true", []])
def test_boolean_takes_booleans_only(wrong: object) -> None:
    assert refusal(lambda: Fields({"k": wrong}).boolean("k", False)).code == "invalid_type"


def test_strings_and_choices() -> None:
    fields = Fields({"a": "auto", "e": "", "n": 3})
    assert fields.choice("a", ("auto", "none"), "none") == "auto"
    assert "'none'" in refusal(lambda: fields.choice("a", ("none",), "none")).message
    assert refusal(lambda: fields.string("e", empty=False)).param == "e"
    assert refusal(lambda: fields.string("a", max_len=3)).code == "string_above_max_length"
    assert refusal(lambda: fields.string("n")).code == "invalid_type"


def test_array_lengths() -> None:
    fields = Fields({"a": [1, 2]})
    assert fields.array("a", min_len=2, max_len=2) == [1, 2]
    assert refusal(lambda: fields.array("a", max_len=1)).code == "array_above_max_length"
    assert refusal(lambda: fields.array("a", min_len=3)).param == "a"
    assert refusal(lambda: Fields({"a": []}).array("a", min_len=1)).code == "empty_array"


@given(st.lists(st.one_of(st.integers(-5, VOCAB + 5), st.booleans(), st.text(), st.floats())))
def test_token_ids_name_the_first_wrong_one(values: list[Any]) -> None:
    bad = [i for i, v in enumerate(values) if type(v) is not int or not 0 <= v < VOCAB]
    if not bad:
        assert check_token_ids(values, "prompt", VOCAB) == values
        return
    error = refusal(lambda: check_token_ids(values, "prompt", VOCAB))
    assert error.param == f"prompt[{bad[0]}]"


def test_unknown_fields_are_refused_with_a_hint() -> None:
    error = refusal(lambda: Fields({"temprature": 1}).refuse_unknown(SAMPLING_FIELDS))
    assert error.param == "temprature"
    assert "Did you mean 'temperature'?" in error.message
    Fields({"temperature": 1}).refuse_unknown(SAMPLING_FIELDS)


def test_unsupported_features_pass_only_when_off() -> None:
    Fields({"f": None}).unsupported("f", "not yet")
    Fields({"f": 1}).unsupported("f", "not yet", 1)
    error = refusal(lambda: Fields({"f": True}).unsupported("f", "not yet", 1))
    assert error.code == "unsupported_parameter"
    assert "not yet" in error.message


def test_an_empty_body_asks_for_the_models_defaults() -> None:
    assert sampling({}) == SamplingOptions()
    assert read_n(Fields({})) == 1


def test_every_setting_arrives() -> None:
    body: dict[str, Any] = {
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "logit_bias": {"7": -100, "0": 1.5},
        "seed": 9,
        "stop": ["a", "bc"],
        "include_stop_str_in_output": True,
        "stop_token_ids": [3, 99],
        "ignore_eos": True,
        "min_tokens": 2,
        "prompt_logprobs": 0,
        "deadline_s": 2.5,
    }
    assert set(body) == SAMPLING_FIELDS
    assert sampling(body, 4) == SamplingOptions(
        max_tokens=4,
        min_tokens=2,
        temperature=0.0,
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        logit_bias={7: -100.0, 0: 1.5},
        seed=9,
        stop=("a", "bc"),
        include_stop_str_in_output=True,
        stop_token_ids=(3, 99),
        ignore_eos=True,
        prompt_logprobs=0,
        deadline_s=2.5,
    )


def test_equivalent_spellings() -> None:
    assert sampling({"stop": "x"}).stop == ("x",)
    assert sampling({"top_k": -1}).top_k == 0
    assert sampling({"top_p": 1}).top_p == 1.0


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_64_bit_seed_fits_the_engine(seed: int) -> None:
    folded = sampling({"seed": seed}).seed
    assert folded is not None
    assert 0 <= folded < 2**63
    assert folded % 2**63 == seed % 2**63


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop_token_ids": [100]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"100": 1}}, "logit_bias.100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias." + "9" * 5000),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "high"}}, "logit_bias.1"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ],
)
def test_impossible_settings_name_their_field(body: dict[str, Any], param: str) -> None:
    error = refusal(lambda: sampling(body, 8))
    assert error.param == param
    assert param.split("[")[0].split(".")[0] in error.message


@pytest.mark.parametrize("n", [0, 129, -1, 1.0, True])
def test_n_is_limited(n: object) -> None:
    assert refusal(lambda: read_n(Fields({"n": n}))).param == "n"
