"""The OpenAI Agents SDK, over either API."""

from __future__ import annotations

from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    OpenAIResponsesWSModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.models.openai_responses import ResponsesWebSocketError
from openai import AsyncOpenAI
from websockets.exceptions import InvalidStatus

from tests.clients.python.worker import (
    ANSWER,
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
    MODEL: Any = OpenAIChatCompletionsModel
    REFUSED = "response_format"
    TIMEOUT_S: float | None = 60.0

    def __init__(self, target: Target) -> None:
        self.target = target

    def agent(self, model: str | None = None, key: str | None = None, **more: Any) -> Any:
        client = AsyncOpenAI(
            base_url=self.target.url,
            api_key=key or self.target.key,
            max_retries=0,
            timeout=self.TIMEOUT_S,
        )
        settings = {"temperature": 0, "max_tokens": 48} | more.pop("settings", {})
        return Agent(
            name="Assistant",
            model=self.MODEL(model=model or self.target.model, openai_client=client),
            model_settings=ModelSettings(**settings),
            **more,
        )

    async def chat(self) -> None:
        result = await Runner.run(self.agent(), HELLO)
        assert result.final_output
        assert result.context_wrapper.usage.output_tokens > 0

    async def stream(self) -> None:
        result = Runner.run_streamed(self.agent(), HELLO)
        pieces = [delta async for delta in _deltas(result)]
        assert len(pieces) > 1
        assert "".join(pieces) == (await Runner.run(self.agent(), HELLO)).final_output

    async def tools(self) -> None:
        result = await Runner.run(self.agent(tools=[function_tool(calculator)]), SUM)
        assert ANSWER in result.final_output
        assert "function_call_output" in [item["type"] for item in _typed(result)]

    async def tools_stream(self) -> None:
        result = Runner.run_streamed(self.agent(tools=[function_tool(calculator)]), SUM)
        names = [e.name async for e in result.stream_events() if e.type == "run_item_stream_event"]
        assert "tool_called" in names
        assert ANSWER in result.final_output

    async def json(self) -> None:
        try:
            result = await Runner.run(self.agent(output_type=Calculation), SUM)
        except openai.BadRequestError as error:
            raise refusal(error, error.param, self.REFUSED) from error
        assert isinstance(result.final_output, Calculation)

    async def bad_model(self) -> str:
        error = await raised(
            openai.NotFoundError, lambda: Runner.run(self.agent(model="gpt-9"), HELLO)
        )
        return f"NotFoundError {error.status_code}"

    async def bad_key(self) -> str:
        error = await raised(
            openai.AuthenticationError, lambda: Runner.run(self.agent(key="wrong"), HELLO)
        )
        return f"AuthenticationError {error.status_code}"

    async def too_long(self) -> str:
        error = await raised(openai.BadRequestError, lambda: Runner.run(self.agent(), TOO_LONG))
        assert error.code == "context_length_exceeded"
        return f"BadRequestError {error.status_code}, {error.code}"

    async def cancel(self) -> str:
        endless = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}, "store": False}
        result = Runner.run_streamed(self.agent(settings=endless), STORY)
        async for _ in _deltas(result):
            result.cancel()
        return "" if self.TIMEOUT_S else "with timeout=None"


class Responses(Chat):
    MODEL = OpenAIResponsesModel
    REFUSED = "text.format.type"

    async def follow_up(self) -> None:
        first = await Runner.run(self.agent(), HELLO)
        second = await Runner.run(self.agent(), STORY, previous_response_id=first.last_response_id)
        before, after = first.context_wrapper.usage, second.context_wrapper.usage
        assert after.input_tokens > before.input_tokens + before.output_tokens


class Socket(Responses):
    MODEL = OpenAIResponsesWSModel
    # With one, the SDK waits through asyncio.wait_for, which on Python 3.11 may lose a cancellation
    # that comes together with a frame (3.12 has mended it).
    TIMEOUT_S = None

    async def _refused(self, status: int, code: str, ask: Any) -> str:
        error = await raised(ResponsesWebSocketError, ask)
        assert error.code == code
        assert error.payload["status"] == status
        return f"ResponsesWebSocketError {status}, {code}"

    async def json(self) -> None:
        try:
            result = await Runner.run(self.agent(output_type=Calculation), SUM)
        except ResponsesWebSocketError as error:
            raise refusal(error, error.payload["error"]["param"], self.REFUSED) from error
        assert isinstance(result.final_output, Calculation)

    async def bad_model(self) -> str:
        return await self._refused(
            404, "model_not_found", lambda: Runner.run(self.agent(model="gpt-9"), HELLO)
        )

    async def bad_key(self) -> str:
        # The handshake is refused, which the SDK passes on as its socket says it.
        error = await raised(InvalidStatus, lambda: Runner.run(self.agent(key="wrong"), HELLO))
        assert error.response.status_code == 401
        return "InvalidStatus 401"

    async def too_long(self) -> str:
        return await self._refused(
            400, "context_length_exceeded", lambda: Runner.run(self.agent(), TOO_LONG)
        )


async def _deltas(result: Any) -> Any:
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            yield event.data.delta


def _typed(result: Any) -> list[Any]:
    return [item for item in result.to_input_list() if "type" in item]


if __name__ == "__main__":
    set_tracing_disabled(True)
    serve(
        "openai-agents",
        lambda target: {
            "chat": Chat(target),
            "responses": Responses(target),
            "websocket": Socket(target),
        },
    )
