"""LiteLLM as a library, over either API."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

from tests.clients.python.worker import (
    ANSWER,
    BEGINNING,
    CALCULATOR,
    CHAT_TOOLS,
    HELLO,
    RESPONSE_TOOLS,
    STORY,
    SUM,
    TOO_LONG,
    Calculation,
    Target,
    calculator,
    raised,
    refusal,
    serve,
)


class _Calls:
    PROVIDER = "openai"
    REFUSED = ""

    def __init__(self, target: Target) -> None:
        self.target = target

    def ask(self, text: Any, **more: Any) -> Any:
        raise NotImplementedError

    def _asked(self, **limit: int) -> dict[str, Any]:
        """What every call says, and how long its answer may be."""
        return {
            "model": f"{self.PROVIDER}/{self.target.model}",
            "api_base": self.target.url,
            "api_key": self.target.key,
            "temperature": 0,
            "max_retries": 0,
            **limit,
        }

    async def bad_model(self) -> str:
        error = await raised(
            litellm.NotFoundError, lambda: self.ask(HELLO, model=f"{self.PROVIDER}/gpt-9")
        )
        return f"NotFoundError {error.status_code}"

    async def bad_key(self) -> str:
        error = await raised(litellm.AuthenticationError, lambda: self.ask(HELLO, api_key="wrong"))
        return f"AuthenticationError {error.status_code}"

    async def too_long(self) -> str:
        error = await raised(litellm.ContextWindowExceededError, lambda: self.ask(TOO_LONG))
        return f"ContextWindowExceededError {error.status_code}"

    def _json(self, **form: Any) -> Any:
        try:
            return self.ask(SUM, **form)
        except litellm.BadRequestError as error:
            named = self.REFUSED if self.REFUSED in str(error) else None
            raise refusal(error, named, self.REFUSED) from error


class Chat(_Calls):
    REFUSED = "response_format"

    def ask(self, text: Any, **more: Any) -> Any:
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        return litellm.completion(messages=messages, **self._asked(max_tokens=48) | more)

    def chat(self) -> None:
        answer = self.ask(HELLO)
        assert answer.choices[0].message.content
        assert answer.usage.total_tokens > answer.usage.completion_tokens > 0

    def stream(self) -> None:
        pieces = [
            chunk.choices[0].delta.content
            for chunk in self.ask(HELLO, stream=True)
            if chunk.choices[0].delta.content
        ]
        assert len(pieces) > 1
        assert "".join(pieces) == self.ask(HELLO).choices[0].message.content

    def _answer(self, messages: list[Any], answer: Any) -> None:
        message = answer.choices[0].message
        messages.append(message)
        for call in message.tool_calls:
            assert call.function.name == CALCULATOR["name"]
            result = calculator(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        last = self.ask(messages, tools=CHAT_TOOLS)
        assert ANSWER in last.choices[0].message.content

    def tools(self) -> None:
        messages: list[Any] = [{"role": "user", "content": SUM}]
        self._answer(messages, self.ask(messages, tools=CHAT_TOOLS))

    def tools_stream(self) -> None:
        messages: list[Any] = [{"role": "user", "content": SUM}]
        chunks = list(self.ask(messages, tools=CHAT_TOOLS, stream=True))
        self._answer(messages, litellm.stream_chunk_builder(chunks, messages=messages))

    def json(self) -> None:
        answer = self._json(response_format=Calculation)
        Calculation.model_validate_json(answer.choices[0].message.content)

    def json_by_call(self) -> None:
        choice = {"type": "function", "function": {"name": "calculator"}}
        answer = self.ask(SUM, tools=CHAT_TOOLS, tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls
        Calculation.model_validate_json(call.function.arguments)

    def cancel(self) -> None:
        stream = self.ask(STORY, stream=True, max_tokens=3000, extra_body={"ignore_eos": True})
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        stream.close()


class Responses(_Calls):
    REFUSED = "text.format.type"

    def ask(self, text: Any, **more: Any) -> Any:
        return litellm.responses(input=text, **self._asked(max_output_tokens=48) | more)

    def chat(self) -> None:
        answer = self.ask(HELLO)
        assert answer.output_text
        assert answer.usage.total_tokens > answer.usage.output_tokens > 0

    def stream(self) -> None:
        pieces = [
            event.delta
            for event in self.ask(HELLO, stream=True)
            if event.type == "response.output_text.delta"
        ]
        assert len(pieces) > 1
        assert "".join(pieces) == self.ask(HELLO).output_text

    def _answer(self, first: Any) -> None:
        given: list[Any] = [{"role": "user", "content": SUM}]
        for item in first.output:
            given.append(item.model_dump(exclude_none=True))
            if item.type == "function_call":
                assert item.name == CALCULATOR["name"]
                result = calculator(**json.loads(item.arguments))
                given.append(
                    {"type": "function_call_output", "call_id": item.call_id, "output": result}
                )
        assert len(given) > 2
        assert ANSWER in self.ask(given, tools=RESPONSE_TOOLS).output_text

    def tools(self) -> None:
        self._answer(self.ask(SUM, tools=RESPONSE_TOOLS))

    def tools_stream(self) -> None:
        [first] = [
            event.response
            for event in self.ask(SUM, tools=RESPONSE_TOOLS, stream=True)
            if event.type == "response.completed"
        ]
        self._answer(first)

    def json(self) -> None:
        Calculation.model_validate_json(self._json(text_format=Calculation).output_text)

    def json_by_call(self) -> None:
        choice = {"type": "function", "name": "calculator"}
        answer = self.ask(SUM, tools=RESPONSE_TOOLS, tool_choice=choice)
        [call] = [item for item in answer.output if item.type == "function_call"]
        Calculation.model_validate_json(call.arguments)

    def cancel(self) -> None:
        stream = self.ask(
            STORY,
            stream=True,
            store=False,
            max_output_tokens=3000,
            extra_body={"ignore_eos": True},
        )
        next(event for event in stream if event.type == "response.output_text.delta")
        stream.close()

    def follow_up(self) -> None:
        first = self.ask(HELLO)
        second = self.ask(STORY, previous_response_id=first.id)
        assert second.usage.input_tokens > first.usage.total_tokens

    def resume(self) -> None:
        whole = list(self.ask(HELLO, stream=True))
        name = whole[-1].response.id
        where = {"api_base": self.target.url, "api_key": self.target.key}
        rest = litellm.get_responses(
            name, stream=True, starting_after=5, custom_llm_provider="openai", **where
        )
        assert [e.sequence_number for e in rest] == [e.sequence_number for e in whole[6:]]


class Completions(_Calls):
    PROVIDER = "text-completion-openai"

    def ask(self, text: Any, **more: Any) -> Any:
        return litellm.text_completion(prompt=text, **self._asked(max_tokens=24) | more)

    def chat(self) -> None:
        answer = self.ask(BEGINNING)
        assert answer.choices[0].text
        assert answer.usage.total_tokens > answer.usage.completion_tokens > 0

    def stream(self) -> None:
        chunks = self.ask(BEGINNING, stream=True)
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices[0].text]
        assert len(pieces) > 1
        assert "".join(pieces) == self.ask(BEGINNING).choices[0].text


if __name__ == "__main__":
    # Models that LiteLLM has no entry for get streams that are cut from a whole response.
    known = {"litellm_provider": "openai", "mode": "chat", "supports_native_streaming": True}
    litellm.register_model({f"openai/{sys.argv[3]}": known})
    serve(
        "litellm",
        lambda target: {
            "chat": Chat(target),
            "responses": Responses(target),
            "completions": Completions(target),
        },
    )
