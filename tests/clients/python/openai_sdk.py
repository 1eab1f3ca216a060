"""The official ``openai`` package."""

from __future__ import annotations

import json
from typing import Any

import openai
from openai import OpenAI

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


class _Client:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.client = self.connect(target.key)

    def connect(self, key: str) -> OpenAI:
        return OpenAI(base_url=self.target.url, api_key=key, max_retries=0)

    def ask(self, client: OpenAI, model: str, text: str) -> object:
        raise NotImplementedError

    async def bad_model(self) -> str:
        error = await raised(openai.NotFoundError, lambda: self.ask(self.client, "gpt-9", HELLO))
        assert error.code == "model_not_found"
        return f"NotFoundError {error.status_code}"

    async def bad_key(self) -> str:
        error = await raised(
            openai.AuthenticationError,
            lambda: self.ask(self.connect("wrong"), self.target.model, HELLO),
        )
        return f"AuthenticationError {error.status_code}"

    async def too_long(self) -> str:
        error = await raised(
            openai.BadRequestError, lambda: self.ask(self.client, self.target.model, TOO_LONG)
        )
        assert error.code == "context_length_exceeded"
        return f"BadRequestError {error.status_code}, {error.code}"


class Chat(_Client):
    def ask(self, client: OpenAI, model: str, text: str, **more: Any) -> Any:
        messages = more.pop("messages", [{"role": "user", "content": text}])
        return client.chat.completions.create(
            model=model, messages=messages, **{"temperature": 0, "max_tokens": 48} | more
        )

    def chat(self) -> None:
        answer = self.ask(self.client, self.target.model, HELLO)
        assert answer.choices[0].message.content
        assert answer.usage.total_tokens > answer.usage.completion_tokens > 0

    def stream(self) -> None:
        whole = self.ask(self.client, self.target.model, HELLO).choices[0].message.content
        with self.client.chat.completions.stream(
            model=self.target.model,
            messages=[{"role": "user", "content": HELLO}],
            temperature=0,
            max_tokens=48,
        ) as stream:
            pieces = [event.delta for event in stream if event.type == "content.delta"]
        assert len(pieces) > 1
        assert "".join(pieces) == whole

    def tools(self) -> None:
        messages: list[Any] = [{"role": "user", "content": SUM}]
        answer = self.ask(self.client, self.target.model, "", messages=messages, tools=CHAT_TOOLS)
        self._answer(messages, answer.choices[0].message)

    def tools_stream(self) -> None:
        messages: list[Any] = [{"role": "user", "content": SUM}]
        with self.client.chat.completions.stream(
            model=self.target.model, messages=messages, tools=CHAT_TOOLS, temperature=0
        ) as stream:
            kinds = {event.type for event in stream}
            message = stream.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.done" in kinds
        self._answer(messages, message)

    def _answer(self, messages: list[Any], message: Any) -> None:
        messages.append(message.to_dict())
        for call in message.tool_calls:
            assert call.function.name == CALCULATOR["name"]
            result = calculator(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        last = self.ask(self.client, self.target.model, "", messages=messages, tools=CHAT_TOOLS)
        assert ANSWER in last.choices[0].message.content

    def json(self) -> None:
        try:
            answer = self.client.chat.completions.parse(
                model=self.target.model,
                messages=[{"role": "user", "content": SUM}],
                response_format=Calculation,
            )
        except openai.BadRequestError as error:
            raise refusal(error, error.param, "response_format") from error
        assert answer.choices[0].message.parsed is not None

    def json_by_call(self) -> None:
        answer = self.client.chat.completions.parse(
            model=self.target.model,
            messages=[{"role": "user", "content": SUM}],
            tools=[openai.pydantic_function_tool(Calculation, name="calculator")],
            tool_choice={"type": "function", "function": {"name": "calculator"}},
            temperature=0,
        )
        [call] = answer.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Calculation)

    def cancel(self) -> None:
        stream = self.ask(
            self.client,
            self.target.model,
            STORY,
            stream=True,
            max_tokens=3000,
            extra_body={"ignore_eos": True},
        )
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
        stream.close()


class Responses(_Client):
    def ask(self, client: OpenAI, model: str, text: Any, **more: Any) -> Any:
        return client.responses.create(
            model=model, input=text, **{"temperature": 0, "max_output_tokens": 48} | more
        )

    def chat(self) -> None:
        answer = self.ask(self.client, self.target.model, HELLO)
        assert answer.output_text
        assert answer.usage.total_tokens > answer.usage.output_tokens > 0

    def stream(self) -> None:
        whole = self.ask(self.client, self.target.model, HELLO).output_text
        with self.client.responses.stream(
            model=self.target.model, input=HELLO, temperature=0
        ) as stream:
            pieces = [e.delta for e in stream if e.type == "response.output_text.delta"]
            assert stream.get_final_response().output_text == whole
        assert len(pieces) > 1
        assert "".join(pieces) == whole

    def tools(self) -> None:
        given: list[Any] = [{"role": "user", "content": SUM}]
        first = self.ask(self.client, self.target.model, given, tools=RESPONSE_TOOLS)
        self._answer(given, first)

    def tools_stream(self) -> None:
        given: list[Any] = [{"role": "user", "content": SUM}]
        with self.client.responses.stream(
            model=self.target.model, input=given, tools=RESPONSE_TOOLS, temperature=0
        ) as stream:
            kinds = {event.type for event in stream}
            first = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        self._answer(given, first)

    def _answer(self, given: list[Any], first: Any) -> None:
        given += first.output
        for item in first.output:
            if item.type == "function_call":
                assert item.name == CALCULATOR["name"]
                result = calculator(**json.loads(item.arguments))
                given.append(
                    {"type": "function_call_output", "call_id": item.call_id, "output": result}
                )
        last = self.ask(self.client, self.target.model, given, tools=RESPONSE_TOOLS)
        assert ANSWER in last.output_text

    def json(self) -> None:
        try:
            answer = self.client.responses.parse(
                model=self.target.model, input=SUM, text_format=Calculation
            )
        except openai.BadRequestError as error:
            raise refusal(error, error.param, "text.format.type") from error
        assert answer.output_parsed is not None

    def json_by_call(self) -> None:
        answer = self.client.responses.parse(
            model=self.target.model,
            input=SUM,
            tools=[openai.pydantic_function_tool(Calculation, name="calculator")],
            tool_choice={"type": "function", "name": "calculator"},
            temperature=0,
        )
        [call] = [item for item in answer.output if item.type == "function_call"]
        assert isinstance(call.parsed_arguments, Calculation)

    def cancel(self) -> None:
        stream = self.ask(
            self.client,
            self.target.model,
            STORY,
            stream=True,
            store=False,
            max_output_tokens=3000,
            extra_body={"ignore_eos": True},
        )
        next(event for event in stream if event.type == "response.output_text.delta")
        stream.close()

    def follow_up(self) -> None:
        first = self.ask(self.client, self.target.model, HELLO)
        second = self.ask(self.client, self.target.model, STORY, previous_response_id=first.id)
        assert second.previous_response_id == first.id
        assert second.usage.input_tokens > first.usage.total_tokens

    def resume(self) -> None:
        stream = self.ask(self.client, self.target.model, HELLO, stream=True)
        seen = [next(stream) for _ in range(6)]
        stream.close()
        name = seen[0].response.id
        rest = list(
            self.client.responses.retrieve(
                name, stream=True, starting_after=seen[-1].sequence_number
            )
        )
        assert [e.sequence_number for e in [*seen, *rest]] == list(range(6 + len(rest)))
        text = "".join(e.delta for e in [*seen, *rest] if e.type == "response.output_text.delta")
        assert text == self.client.responses.retrieve(name).output_text


class Socket(_Client):
    def _events(self, **body: Any) -> list[Any]:
        events: list[Any] = []
        with self.client.responses.connect() as connection:
            connection.response.create(model=self.target.model, temperature=0, **body)
            for event in connection:
                events.append(event)
                if event.type in ("response.completed", "response.incomplete", "error"):
                    break
        return events

    def stream(self) -> None:
        events = self._events(input=HELLO)
        pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert len(pieces) > 1
        assert "".join(pieces) == events[-1].response.output_text

    def tools_stream(self) -> None:
        given: list[Any] = [{"role": "user", "content": SUM}]
        first = self._events(input=given, tools=RESPONSE_TOOLS)[-1].response
        [call] = [item for item in first.output if item.type == "function_call"]
        result = calculator(**json.loads(call.arguments))
        given += [
            call.to_dict(),
            {"type": "function_call_output", "call_id": call.call_id, "output": result},
        ]
        assert ANSWER in self._events(input=given, tools=RESPONSE_TOOLS)[-1].response.output_text

    def ask(self, client: OpenAI, model: str, text: str) -> object:
        with client.responses.connect() as connection:
            connection.response.create(model=model, input=text)
            for event in connection:
                if event.type == "error":
                    return event
                if event.type == "response.completed":
                    break
        raise AssertionError("no error event came")

    async def bad_model(self) -> str:
        event: Any = self.ask(self.client, "gpt-9", HELLO)
        assert (event.status, event.error.code) == (404, "model_not_found")
        return "error event 404"

    async def bad_key(self) -> str:
        error = await raised(
            Exception, lambda: self.ask(self.connect("wrong"), self.target.model, HELLO)
        )
        assert "401" in str(error), error
        return f"{type(error).__name__} 401"

    async def too_long(self) -> str:
        event: Any = self.ask(self.client, self.target.model, TOO_LONG)
        assert (event.status, event.error.code) == (400, "context_length_exceeded")
        return f"error event 400, {event.error.code}"

    def cancel(self) -> None:
        body: Any = {"type": "response.create", "model": self.target.model, "input": STORY}
        body |= {"store": False, "max_output_tokens": 3000, "ignore_eos": True}
        with self.client.responses.connect() as connection:
            connection.send(body)
            next(event for event in connection if event.type == "response.output_text.delta")

    def follow_up(self) -> None:
        first = self._events(input=HELLO)[-1].response
        second = self._events(input=STORY, previous_response_id=first.id)[-1].response
        assert second.previous_response_id == first.id


class Completions(_Client):
    def ask(self, client: OpenAI, model: str, text: str, **more: Any) -> Any:
        return client.completions.create(
            model=model, prompt=text, **{"temperature": 0, "max_tokens": 24} | more
        )

    def chat(self) -> None:
        answer = self.ask(self.client, self.target.model, BEGINNING)
        assert answer.choices[0].text
        assert answer.usage.total_tokens > answer.usage.completion_tokens > 0

    def stream(self) -> None:
        chunks = self.ask(self.client, self.target.model, BEGINNING, stream=True)
        pieces = [chunk.choices[0].text for chunk in chunks]
        assert len(pieces) > 1
        whole = self.ask(self.client, self.target.model, BEGINNING)
        assert "".join(pieces) == whole.choices[0].text

    def cancel(self) -> None:
        endless = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
        stream = self.ask(self.client, self.target.model, BEGINNING, stream=True, **endless)
        next(chunk for chunk in stream if chunk.choices[0].text)
        stream.close()


if __name__ == "__main__":
    serve(
        "openai",
        lambda target: {
            "chat": Chat(target),
            "responses": Responses(target),
            "websocket": Socket(target),
            "completions": Completions(target),
        },
    )
