"""Training records: read from compressed JSONL, rendered through the chat template, weighted.

A record is `{"messages": [...], "tools"?: [...], "source": ...}` or `{"text": ..., "source": ...}`.
"""

from __future__ import annotations

import json
import lzma
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = [
    "ChatTemplate", "LossWeights", "Record", "encode_record", "join_requests", "read_records",
    "trim_tools",
]  # fmt: skip

Record = dict[str, Any]

_TURN = re.compile(
    r"(?P<head><\|im_start\|>(?P<role>\w+)\n)(?P<body>.*?<\|im_end\|>)(?P<tail>\n?)", re.DOTALL
)


class TextEncoder(Protocol):
    """What encoding needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How much a token of each part of a dialogue counts in the loss, from 0 to 1.

    Headers and system turns (which hold the tool schemas) never count.
    """

    assistant: float = 1.0
    """Bodies of assistant turns with their end-of-turn token; all of a plain text."""

    user: float = 0.0
    """Bodies of turns that a person wrote."""

    tool: float = 0.0
    """Bodies of turns that hold what tools returned."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text; `tojson` writes JSON as `json.dumps` does, without HTML escapes.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _to_json
        self._template = environment.from_string(source)

    def render(
        self,
        messages: list[Record],
        tools: list[Record] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text of a dialogue; `variables` reach the template as they are."""
        return self._template.render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def read_records(paths: list[Path]) -> Iterator[Record]:
    """Yields the records of `.jsonl.xz` files, one after another, without unpacking to disk."""
    for path in paths:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def trim_tools(record: Record, *, max_tools: int, rng: random.Random) -> Record:
    """Drops tools that the dialogue never calls until a random number, 1 to `max_tools`, is left.

    Called tools always stay, so that no call lacks its schema; the rest is a random choice.
    """
    tools = record.get("tools") or []
    called = {
        call["name"] for message in record["messages"] for call in message.get("tool_calls") or []
    }
    needed = [tool for tool in tools if tool["name"] in called]
    spare = [tool for tool in tools if tool["name"] not in called]
    rng.shuffle(spare)
    kept = needed + spare[: max(0, rng.randint(1, max_tools) - len(needed))]
    rng.shuffle(kept)
    return {**record, "tools": kept}


def join_requests(
    records: Iterable[Record], *, max_requests: int, rng: random.Random
) -> Iterator[Record]:
    """Joins dialogues with tools and a single request into longer ones of their source.

    Up to `max_requests` follow on one another, a random number each time, so that one list of
    schemas, by far the longest part of such a dialogue, serves several calls. Dialogues whose
    schemas contradict one another (one name, two forms) are not joined; others pass as they are.
    """
    waiting: dict[str, tuple[int, list[Record]]] = {}
    for record in records:
        if not _is_one_request(record):
            yield record
            continue
        source = record["source"]
        wanted, group = waiting.pop(source, (0, []))
        if group and not _agree([*group, record]):
            yield _joined(group)
            group = []
        wanted = wanted if group else rng.randint(1, max_requests)
        group.append(record)
        if len(group) >= wanted:
            yield _joined(group)
        else:
            waiting[source] = (wanted, group)
    for _, group in waiting.values():
        yield _joined(group)


def _is_one_request(record: Record) -> bool:
    messages = record.get("messages") or []
    return bool(record.get("tools")) and sum(m["role"] == "user" for m in messages) == 1


def _agree(records: list[Record]) -> bool:
    schemas: dict[str, Record] = {}
    return all(
        schemas.setdefault(tool["name"], tool) == tool for one in records for tool in one["tools"]
    )


def _joined(records: list[Record]) -> Record:
    """One dialogue out of several: the first one's system turn, all tools, all other turns."""
    first, *others = records
    messages = list(first["messages"])
    tools = {tool["name"]: tool for one in records for tool in one["tools"]}
    for one in others:
        messages += [message for message in one["messages"] if message["role"] != "system"]
    return {**first, "messages": messages, "tools": list(tools.values())}


def encode_record(
    record: Record,
    template: ChatTemplate,
    encoder: TextEncoder,
    weights: LossWeights,
    *,
    empty_think: bool = False,
) -> tuple[list[int], list[float]]:
    """Token ids of a record and the loss weight of each.

    A weight belongs to the token it stands at, as a target to be predicted. Parts of a turn are
    encoded apart, as they are when a prompt ends after the header and the model goes on. With
    `empty_think` the last answer follows an empty thinking block, as it does in a prompt that
    switches thinking off.
    """
    if "text" in record:
        ids = encoder.encode(record["text"] + "<|endoftext|>")
        return ids, [weights.assistant] * len(ids)
    tools = [{"type": "function", "function": tool} for tool in record.get("tools") or []]
    text = template.render(record["messages"], tools or None)
    all_ids: list[int] = []
    all_weights: list[float] = []
    last_answer = text.rfind("<|im_start|>assistant\n")
    for turn in _TURN.finditer(text):
        head, body, tail = (encoder.encode(turn[part]) for part in ("head", "body", "tail"))
        if empty_think and turn.start() == last_answer:
            head += encoder.encode("<think>\n\n</think>\n\n")
        from_tool = turn["body"].startswith("<tool_response>")
        weight = weights.assistant if turn["role"] == "assistant" else 0.0
        if turn["role"] == "user":
            weight = weights.tool if from_tool else weights.user
        all_ids += head + body + tail
        all_weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(tail)
    return all_ids, all_weights
