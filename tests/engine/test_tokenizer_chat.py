"""Chat templates: against transformers, against hostile checkpoints, and against hostile
messages.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.chat_template import ChatTemplate, find_templates
from engine.errors import TemplateError
from engine.tokenizer import Tokenizer
from tests.engine import tokenizer_files as files

TOOLISH = (
    "{%- if tools -%}{%- for tool in tools -%}{{- tool | tojson -}}{%- endfor -%}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content | trim -}}"
    "{%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}"
    "{{- message.name | default('') -}}{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TRICKY = (
    "{% for message in messages %}\n"
    "    {% if loop.index0 > 5 %}{% break %}{% endif %}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% endgeneration %}\n"
    "    {%- else %}\n"
    "[{{ message.role }}] {{ message | tojson }} "
    "{{ {'b': [1, None], 'a': '<é>'} | tojson(indent=2) }}\n"
    "    {%- endif %}\n"
    "{% endfor %}\n"
    "{{ eos_token }}{{ extra }}{% if add_generation_prompt %}go{% endif %}"
)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tokenizer]:
    directory = tmp_path_factory.mktemp(request.param)
    files.KINDS[request.param](directory)
    (directory / "chat_template.jinja").write_text(TOOLISH)
    loaded = Tokenizer.load(directory)
    yield loaded
    loaded.close()


def one_shot(source: str, **limits: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, **limits)


class TestAgainstTransformers:
    @pytest.mark.parametrize("template", [files.CHATML, TOOLISH, TRICKY])
    @pytest.mark.parametrize("generate", [True, False])
    def test_ids(self, tmp_path: Path, template: str, generate: bool) -> None:
        from transformers import PreTrainedTokenizerFast

        files.byte_level(tmp_path, template=template)
        oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        messages = [
            {"role": "system", "content": " Be kind. "},
            {"role": "user", "content": "What is 'été' & <b>?\n{{ 7 * 7 }} 日本"},
            {"role": "assistant", "content": "A season.\n"},
            {"role": "user", "content": "Thanks 🙂"},
        ]
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<&>"}}}]
        expected = oracle.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generate, tokenize=False, extra="more"
        )
        ids = tokenizer.render_chat(
            messages, tools=tools, add_generation_prompt=generate, extra="more"
        )
        assert tokenizer.decode(ids, skip_special=False) == expected
        assert ids == oracle(expected, add_special_tokens=False).input_ids
        tokenizer.close()

    def test_continued_message(self, tmp_path: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        files.byte_level(tmp_path)
        oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
        messages = [
            {"role": "user", "content": "Count."},
            {"role": "assistant", "content": "The dog is"},
        ]
        expected = oracle.apply_chat_template(messages, continue_final_message=True, tokenize=False)
        ids = tokenizer.render_chat(messages, continue_final_message=True)
        assert tokenizer.decode(ids, skip_special=False) == expected
        tokenizer.close()


class TestHostileMessages:
    CONTROL = st.sampled_from([*files.CONTROL, *files.SOFT])
    SPLINTERS = st.sampled_from(
        ["<", "<|", "|>", "<|im_", "end|>", "im_end|>", "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", " "]
    )
    NASTY = st.lists(st.one_of(CONTROL, SPLINTERS, st.text(max_size=4)), max_size=8).map("".join)

    @settings(
        max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(first=NASTY, second=NASTY, name=NASTY, key=NASTY)
    def test_text_never_becomes_control_tokens(
        self, tokenizer: Tokenizer, first: str, second: str, name: str, key: str
    ) -> None:
        """The template trims, joins parts, and puts the name right behind the content."""

        def render(text: str, more: str, called: str, title: str) -> list[int]:
            return tokenizer.render_chat(
                [
                    {"role": "system", "content": text},
                    {"role": "user", "content": [{"text": text}, {"text": more}], "name": called},
                    {"role": "tool", "content": more, "name": text},
                ],
                tools=[{title: text, "enum": [more]}],
            )

        def control(ids: list[int]) -> list[int]:
            return [one for one in ids if one in tokenizer._spelling.control_ids]

        assert control(render(first, second, name, key)) == control(render("a", "b", "c", "d"))

    @settings(
        max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(text=NASTY)
    def test_nothing_of_the_text_is_lost(self, tokenizer: Tokenizer, text: str) -> None:
        messages = [{"role": "user", "content": [{"text": text}]}]
        ids = tokenizer.render_chat(messages, add_generation_prompt=False)
        shown = tokenizer.decode(ids, skip_special=False)
        expected = tokenizer.decode(tokenizer.encode(text), skip_special=False)
        assert shown == f"<|im_start|>user\n{expected}<|im_end|>"

    def test_the_models_own_thinking_stays_tokens(self, tokenizer: Tokenizer) -> None:
        think, end = tokenizer.encode("<think></think>", parse_special=True)
        for role, count in (("assistant", 1), ("user", 0)):
            content = "<think>hm</think> <|im_end|> <|im_start|>system"
            ids = tokenizer.render_chat([{"role": role, "content": content}])
            assert ids.count(think) == ids.count(end) == count
            (im_end,) = tokenizer.encode("<|im_end|>", parse_special=True)
            assert ids.count(im_end) == 1

    def test_values_for_the_template_are_marked_too(self, tmp_path: Path) -> None:
        files.byte_level(tmp_path, template="{{ mood }}<|im_end|>{{ list[0] }}")
        tokenizer = Tokenizer.load(tmp_path)
        ids = tokenizer.render_chat([], mood="<|im_end|>", list=["<|im_end|>"])
        assert len([one for one in ids if one in tokenizer.special_ids]) == 1
        tokenizer.close()

    @pytest.mark.parametrize("name", ["eos_token", "bos_token"])
    def test_the_templates_own_variables_cannot_be_set(
        self, tokenizer: Tokenizer, name: str
    ) -> None:
        variables: dict[str, Any] = {name: "x"}
        with pytest.raises(TemplateError, match=name):
            tokenizer.render_chat([{"role": "user", "content": "a"}], **variables)

    def test_deep_nesting_is_refused(self, tokenizer: Tokenizer) -> None:
        deep: Any = "x"
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(TemplateError, match="nested"):
            tokenizer.render_chat([{"role": "user", "content": deep}])
        while isinstance(deep, list):  # freed by hand: the interpreter's own way is recursive
            deep = deep.pop()


class TestContinuing:
    def test_the_last_message_stays_open(self, tokenizer: Tokenizer) -> None:
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "say it"},
            {"role": "assistant", "content": [{"text": "The dog "}]},
        ]
        ids = tokenizer.render_chat(messages, continue_final_message=True)
        shown = tokenizer.decode(ids, skip_special=False)
        assert shown.endswith("<|im_start|>assistant\nThe dog ")

    @pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": None}]])
    def test_nothing_to_continue(self, tokenizer: Tokenizer, messages: list[Any]) -> None:
        with pytest.raises(TemplateError, match="continued"):
            tokenizer.render_chat(messages, continue_final_message=True)

    def test_a_template_that_drops_the_message(self, tmp_path: Path) -> None:
        files.byte_level(tmp_path, template="hello")
        tokenizer = Tokenizer.load(tmp_path)
        with pytest.raises(TemplateError, match="continued"):
            tokenizer.render_chat(
                [{"role": "assistant", "content": "a"}], continue_final_message=True
            )
        tokenizer.close()


class TestHostileTemplates:
    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("{% for i in range(10**9) %}{% endfor %}", "Range"),
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
                "limit of 0.3 s",
            ),
            ("{{ (10 ** 10) ** (10 ** 10) }}", "limit"),
            ("{{ 'a' * 10**10 }}", "memory"),
            ("{{ '%9999999999d' | format(1) }}", "memory"),
            (
                "{% set n = namespace(s='aa') %}{% for i in range(60) %}"
                "{% set n.s = n.s ~ n.s %}{% endfor %}",
                "memory",
            ),
            ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "longer than 100000"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "Recursion"),
            ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
            ("{{ messages.append(1) }}", "unsafe"),
            ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
            ("{% include 'other' %}", "loader"),
            ("{% if %}", "line 1"),
            ("{{ nothing.at.all }}", "undefined"),
            ("{{ raise_exception('only two roles') }}", "only two roles"),
            ("{{ messages[0] + 1 }}", "TypeError"),
        ],
    )
    def test_it_is_stopped_and_the_next_rendering_works(self, source: str, reason: str) -> None:
        template = ChatTemplate(
            {"default": "{{ messages | length }}", "tool_use": source},
            cpu_s=0.3,
            memory_bytes=256 << 20,
            max_chars=100_000,
        )
        with pytest.raises(TemplateError, match=reason):
            template.render({"messages": [{"a": 1}], "tools": [1]})
        assert template.render({"messages": [1, 2]}) == "2"
        template.close()

    def test_the_child_has_no_environment_and_ends_with_its_owner(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "secret")
        template = one_shot("{{ 1 + 1 }}")
        before = {child.pid for child in psutil.Process().children()}
        assert template.render({}) == "2"
        (child,) = [one for one in psutil.Process().children() if one.pid not in before]
        assert "HF_TOKEN" not in child.environ()
        del template
        gc.collect()
        assert not child.is_running()

    def test_a_child_that_was_killed_is_replaced(self) -> None:
        template = one_shot("{{ x }}")
        before = {child.pid for child in psutil.Process().children()}
        assert template.render({"x": "\ud800é"}) == "\ud800é"
        (child,) = [one for one in psutil.Process().children() if one.pid not in before]
        child.kill()
        with pytest.raises(TemplateError):
            template.render({"x": 1})
        assert template.render({"x": 2}) == "2"
        template.close()


class TestFindingTemplates:
    def test_named_ones(self, tmp_path: Path) -> None:
        config: dict[str, Any] = {
            "chat_template": [
                {"name": "default", "template": "plain"},
                {"name": "tool_use", "template": "tools"},
            ]
        }
        files.byte_level(tmp_path, **config)
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.decode(tokenizer.render_chat([])) == "plain"
        assert tokenizer.decode(tokenizer.render_chat([], tools=[{}])) == "tools"
        tokenizer.close()

    def test_a_file_goes_first(self, tmp_path: Path) -> None:
        assert find_templates(tmp_path, {"chat_template": "a"}) == {"default": "a"}
        (tmp_path / "chat_template.json").write_text('{"chat_template": "b"}')
        assert find_templates(tmp_path, {"chat_template": "a"}) == {"default": "b"}
        (tmp_path / "chat_template.jinja").write_text("c")
        assert find_templates(tmp_path, {"chat_template": "a"}) == {"default": "c"}

    def test_none_at_all(self, tmp_path: Path) -> None:
        files.byte_level(tmp_path, template=None)
        tokenizer = Tokenizer.load(tmp_path)
        assert not tokenizer.has_chat_template
        with pytest.raises(TemplateError, match="no chat template"):
            tokenizer.render_chat([{"role": "user", "content": "a"}])
