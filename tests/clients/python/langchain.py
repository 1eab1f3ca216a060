"""LangChain: ``ChatOpenAI`` of ``langchain-openai``, over either API."""

from __future__ import annotations

from typing import Any

import openai
from langchain_core.messages import HumanMessage
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.python.worker import (
    ANSWER,
    BEGINNING,
    HELLO,
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


class Chat:
    RESPONSES = False
    REFUSED = "response_format"

    def __init__(self, target: Target) -> None:
        self.target = target

    def model(self, **more: Any) -> Any:
        asked: dict[str, Any] = {
            "base_url": self.target.url,
            "api_key": self.target.key,
            "model": self.target.model,
            "use_responses_api": self.RESPONSES,
            "temperature": 0,
            "max_tokens": 48,
            "max_retries": 0,
        }
        return ChatOpenAI(**asked | more)

    def chat(self) -> None:
        answer = self.model().invoke(HELLO)
        assert answer.text
        usage = answer.usage_metadata
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]

    def stream(self) -> None:
        pieces = [chunk.text for chunk in self.model().stream(HELLO) if chunk.text]
        assert len(pieces) > 1
        assert "".join(pieces) == self.model().invoke(HELLO).text

    def _loop(self, ask: Any) -> None:
        tool = StructuredTool.from_function(calculator)
        model = self.model().bind_tools([tool])
        messages: list[Any] = [HumanMessage(SUM)]
        messages.append(ask(model, messages))
        assert messages[-1].tool_calls
        messages += [tool.invoke(call) for call in messages[-1].tool_calls]
        assert ANSWER in ask(model, messages).text

    def tools(self) -> None:
        self._loop(lambda model, messages: model.invoke(messages))

    def tools_stream(self) -> None:
        def ask(model: Any, messages: list[Any]) -> Any:
            first, *rest = model.stream(messages)
            return sum(rest, start=first)

        self._loop(ask)

    def json(self) -> None:
        try:
            answer = self.model().with_structured_output(Calculation).invoke(SUM)
        except openai.BadRequestError as error:
            raise refusal(error, error.param, self.REFUSED) from error
        assert isinstance(answer, Calculation)

    def json_by_call(self) -> None:
        model = self.model().with_structured_output(Calculation, method="function_calling")
        assert isinstance(model.invoke(SUM), Calculation)

    async def bad_model(self) -> str:
        error = await raised(openai.NotFoundError, lambda: self.model(model="gpt-9").invoke(HELLO))
        return f"NotFoundError {error.status_code}"

    async def bad_key(self) -> str:
        error = await raised(
            openai.AuthenticationError, lambda: self.model(api_key="wrong").invoke(HELLO)
        )
        return f"AuthenticationError {error.status_code}"

    async def too_long(self) -> str:
        error = await raised(openai.BadRequestError, lambda: self.model().invoke(TOO_LONG))
        # LangChain has a type of its own for this, which it makes of the code.
        assert type(error).__name__ == "OpenAIContextOverflowError", type(error)
        return f"{type(error).__name__} {error.status_code}"

    def cancel(self) -> None:
        endless: dict[str, Any] = {"extra_body": {"ignore_eos": True}, "max_tokens": 3000}
        if self.RESPONSES:
            endless["store"] = False
        stream = self.model(**endless).stream(STORY)
        next(chunk for chunk in stream if chunk.text)
        stream.close()


class Responses(Chat):
    RESPONSES = True
    REFUSED = "text.format.type"

    def follow_up(self) -> None:
        model = self.model()
        first = model.invoke(HELLO)
        second = model.invoke(STORY, previous_response_id=first.response_metadata["id"])
        assert second.usage_metadata["input_tokens"] > first.usage_metadata["total_tokens"]


class Completions:
    def __init__(self, target: Target) -> None:
        self.target = target

    def model(self, **more: Any) -> Any:
        asked: dict[str, Any] = {
            "base_url": self.target.url,
            "api_key": self.target.key,
            "model": self.target.model,
            "temperature": 0,
            "max_tokens": 24,
            "max_retries": 0,
        }
        return OpenAI(**asked | more)

    def chat(self) -> None:
        assert self.model().invoke(BEGINNING)

    def stream(self) -> None:
        pieces = [piece for piece in self.model().stream(BEGINNING) if piece]
        assert len(pieces) > 1
        assert "".join(pieces) == self.model().invoke(BEGINNING)

    async def bad_model(self) -> str:
        error = await raised(openai.NotFoundError, lambda: self.model(model="x").invoke(HELLO))
        return f"NotFoundError {error.status_code}"

    async def bad_key(self) -> str:
        error = await raised(
            openai.AuthenticationError, lambda: self.model(api_key="wrong").invoke(HELLO)
        )
        return f"AuthenticationError {error.status_code}"

    async def too_long(self) -> str:
        error = await raised(openai.BadRequestError, lambda: self.model().invoke(TOO_LONG))
        assert error.code == "context_length_exceeded"
        return f"BadRequestError {error.status_code}, {error.code}"

    def cancel(self) -> None:
        endless = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}
        stream = self.model(**endless).stream(BEGINNING)
        next(piece for piece in stream if piece)
        stream.close()


if __name__ == "__main__":
    serve(
        "langchain-openai",
        lambda target: {
            "chat": Chat(target),
            "responses": Responses(target),
            "completions": Completions(target),
        },
    )
