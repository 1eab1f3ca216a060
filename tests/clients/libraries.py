"""The client libraries, the APIs that each speaks, and what is tried with each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["APIS", "CASES", "LIBRARIES", "Library"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = ROOT / "build/clients/venv/bin/python"

APIS = {
    "chat": "Chat Completions",
    "responses": "Responses",
    "websocket": "Responses over WebSocket",
    "completions": "Completions",
    "messages": "Anthropic Messages",
}
CASES = {
    "chat": "a whole answer with its usage",
    "stream": "a stream whose pieces add up to the whole answer",
    "tools": "ask, run the tool that is called, ask again, get an answer with its result",
    "tools_stream": "the same, streamed",
    "json": "an answer in the form of a JSON Schema",
    "json_by_call": "the same, as the arguments of a call that must be made",
    "bad_model": "a model that is not served: the library's own typed error, 404",
    "bad_key": "a wrong key: the same, 401",
    "too_long": "a prompt longer than the context: the same, 400",
    "cancel": "leaving a stream ends the turn and frees the engine's request, by the metrics",
    "follow_up": "a second question with previous_response_id",
    "resume": "the rest of a stream that was left",
}


class Library(NamedTuple):
    """A library. ``worker`` is a Python module or a script for Node.js and what it is told."""

    name: str
    worker: tuple[str, ...]
    apis: tuple[str, ...]

    def command(self, url: str, key: str, model: str) -> list[str]:
        """Return the command of a process that answers for its cases on standard output."""
        program, *more = self.worker
        if program.endswith(".mjs"):
            return ["node", str(HERE / "node" / program), url, key, model, *more]
        return [str(PYTHON), "-m", f"{__package__}.python.{program}", url, key, model, *more]

    @property
    def is_installed(self) -> bool:
        """Whether ``make clients`` has made its environment."""
        in_node = self.worker[0].endswith(".mjs")
        return (HERE / "node/node_modules" if in_node else PYTHON).exists()


LIBRARIES = (
    Library("openai (Python)", ("openai_sdk",), ("chat", "responses", "websocket", "completions")),
    Library("openai (Node.js)", ("openai.mjs",), ("chat", "responses", "websocket", "completions")),
    Library("OpenAI Agents SDK", ("agents_sdk",), ("chat", "responses", "websocket")),
    Library("LangChain (langchain-openai)", ("langchain",), ("chat", "responses", "completions")),
    Library("PydanticAI", ("pydantic_ai",), ("chat", "responses", "websocket")),
    Library("LiteLLM", ("litellm",), ("chat", "responses", "completions")),
    Library("Vercel AI SDK", ("ai.mjs", "openai"), ("chat", "responses", "completions")),
    Library("Vercel AI SDK, compatible", ("ai.mjs", "openai-compatible"), ("chat", "completions")),
    Library("anthropic (Python)", ("anthropic_sdk",), ("messages",)),
    Library("anthropic (Node.js)", ("anthropic.mjs",), ("messages",)),
)
