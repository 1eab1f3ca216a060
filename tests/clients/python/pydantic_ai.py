"""PydanticAI: an agent on its OpenAI models, over either API."""

from __future__ import annotations

from typing import Any, ClassVar

from openai import AsyncOpenAI
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

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
    MODEL: Any = OpenAIChatModel
    REFUSED = "response_format"
    MORE: ClassVar[dict[str, Any]] = {}

    def __init__(self, target: Target) -> None:
        self.target = target

    def agent(self, model: str | None = None, key: str | None = None, **more: Any) -> Any:
        client = AsyncOpenAI(
            base_url=self.target.url, api_key=key or self.target.key, max_retries=0
        )
        settings = {"temperature": 0, "max_tokens": 48, **self.MORE} | more.pop("settings", {})
        return Agent(
            self.MODEL(model or self.target.model, provider=OpenAIProvider(openai_client=client)),
            model_settings=settings,
            **more,
        )

    async def chat(self) -> None:
        result = await self.agent().run(HELLO)
        assert result.output
        assert result.usage.output_tokens > 0

    async def stream(self) -> None:
        async with self.agent().run_stream(HELLO) as result:
            pieces = [
                piece async for piece in result.stream_text(delta=True, debounce_by=None) if piece
            ]
        assert len(pieces) > 1
        assert "".join(pieces) == (await self.agent().run(HELLO)).output

    async def tools(self) -> None:
        result = await self.agent(tools=[calculator]).run(SUM)
        assert ANSWER in result.output
        assert result.usage.tool_calls == 1

    async def tools_stream(self) -> None:
        async with self.agent(tools=[calculator]).run_stream(SUM) as result:
            assert ANSWER in await result.get_output()
            assert result.usage.tool_calls == 1

    async def json(self) -> None:
        try:
            result = await self.agent(output_type=NativeOutput(Calculation)).run(SUM)
        except ModelHTTPError as error:
            body: Any = error.body
            raise refusal(error, body["param"], self.REFUSED) from error
        assert isinstance(result.output, Calculation)

    async def json_by_call(self) -> None:
        agent = self.agent(output_type=ToolOutput(Calculation, name="calculator"))
        assert isinstance((await agent.run(SUM)).output, Calculation)

    async def _refused(self, call: Any, status: int, code: str) -> str:
        error = await raised(ModelHTTPError, call)
        assert error.status_code == status
        assert isinstance(error.body, dict)
        assert error.body["code"] == code
        return f"ModelHTTPError {status}, {code}"

    async def bad_model(self) -> str:
        return await self._refused(
            lambda: self.agent(model="gpt-9").run(HELLO), 404, "model_not_found"
        )

    async def bad_key(self) -> str:
        return await self._refused(
            lambda: self.agent(key="wrong").run(HELLO), 401, "invalid_api_key"
        )

    async def too_long(self) -> str:
        return await self._refused(
            lambda: self.agent().run(TOO_LONG), 400, "context_length_exceeded"
        )

    async def cancel(self) -> None:
        endless = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}, "openai_store": False}
        async with self.agent(settings=endless).run_stream(STORY) as result:
            async for piece in result.stream_text(delta=True, debounce_by=None):
                if piece:
                    break
            await result.cancel()


class Responses(Chat):
    MODEL = OpenAIResponsesModel
    REFUSED = "text.format.type"

    async def follow_up(self) -> None:
        first = await self.agent().run(HELLO)
        again = {"openai_previous_response_id": first.response.provider_response_id}
        second = await self.agent(settings=again).run(STORY)
        assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


class Socket(Responses):
    MORE: ClassVar[dict[str, Any]] = {"openai_transport": "websocket"}


if __name__ == "__main__":
    serve(
        "pydantic-ai-slim",
        lambda target: {
            "chat": Chat(target),
            "responses": Responses(target),
            "websocket": Socket(target),
        },
    )
