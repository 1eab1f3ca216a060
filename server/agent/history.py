"""Items of the Responses API as the chat messages that a chat template takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["items_to_messages"]

Item = Mapping[str, Any]


def items_to_messages(items: Iterable[Item]) -> list[dict[str, Any]]:
    """Return items as messages with plain text; parts are joined by line breaks.

    Reasoning, text and calls that follow each other are one message of the assistant, as the model
    wrote them.
    """
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for item in items:
        match item["type"]:
            case "reasoning":
                _add_reasoning(messages, item)
            case "function_call":
                names[item["call_id"]] = item["name"]
                _add_call(messages, item)
            case "function_call_output":
                messages.append(_output(item, names))
            case _:
                _add_message(messages, item)
    # Reasoning of an answer that never came says nothing to anybody.
    return [message for message in messages if message.keys() - {"role", "reasoning_content"}]


def _add_message(messages: list[dict[str, Any]], item: Item) -> None:
    text = "\n".join(part["text"] for part in item["content"])
    if item["role"] == "assistant" and messages and "content" not in messages[-1]:
        # Only an assistant's message that so far is reasoning has no content.
        messages[-1]["content"] = text
        return
    # Templates know no developer; OpenAI gave the system's role that name.
    role = "system" if item["role"] == "developer" else item["role"]
    messages.append({"role": role, "content": text})


def _add_reasoning(messages: list[dict[str, Any]], item: Item) -> None:
    text = "\n".join(part["text"] for part in item.get("content") or ())
    if text:
        messages.append({"role": "assistant", "reasoning_content": text})


def _add_call(messages: list[dict[str, Any]], item: Item) -> None:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    last.setdefault("content", "")
    last.setdefault("tool_calls", []).append(
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"]},
        }
    )


def _output(item: Item, names: Mapping[str, str]) -> dict[str, Any]:
    message = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
    name = names.get(item["call_id"])
    return message if name is None else {**message, "name": name}
