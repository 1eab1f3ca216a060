"""The tool loop of one turn: what the model called is run, and the model goes on with the results.

No I/O and no clock but the tools' own; the turn feeds it items and runs what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from server.agent.history import items_to_messages
from server.agent.tools import error_output, run_tool
from server.events import Event, OutputItemAdded, OutputItemDone
from server.request import ToolOptions, TurnRequest
from server.response_object import function_output_item, new_id

__all__ = ["MAX_ROUNDS", "Results", "ToolRounds"]

MAX_ROUNDS = 8
"""Most times that the model is asked again in one turn; the last time it has no tools."""


class Results(NamedTuple):
    """What the tools said to the calls of one round."""

    items: list[dict[str, Any]]
    request: TurnRequest | None
    """What the model is asked next; None: calls are left for the client to answer."""

    def events(self, first_index: int) -> list[Event]:
        """Return the events that show the items, the first at ``first_index``."""
        events: list[Event] = []
        for index, item in enumerate(self.items, start=first_index):
            events.append(OutputItemAdded(output_index=index, item=item))
            events.append(OutputItemDone(output_index=index, item=item))
        return events


class ToolRounds:
    """Runs a turn's calls of the server's own tools, as often as the model makes some."""

    def __init__(self, request: TurnRequest) -> None:
        self._request = request
        self._rounds = 0
        self._calls = 0
        self._known = [one["function"]["name"] for one in request.tools.functions]

    def run(self, items: Sequence[dict[str, Any]]) -> Results | None:
        """Run the calls among the items of a round; None: there are none for this server."""
        tools = self._request.tools
        calls = [item for item in items if item["type"] == "function_call"]
        calls = [call for call in calls if call["status"] == "completed"]
        # A name that nobody has is answered here too, unless it may be meant for the client.
        own = [call for call in calls if call["name"] in tools.builtin or self._is_ours(call)]
        if not tools.builtin or not own:
            return None
        outputs = [
            function_output_item(new_id("fco"), call["call_id"], self._answer(call)) for call in own
        ]
        self._rounds += 1
        return Results(outputs, self._next([*items, *outputs]) if len(own) == len(calls) else None)

    def _is_ours(self, call: dict[str, Any]) -> bool:
        return call["name"] not in self._known and len(self._known) == len(
            self._request.tools.builtin
        )

    def _answer(self, call: dict[str, Any]) -> str:
        kind = self._request.tools.builtin.get(call["name"])
        if kind is None:
            names = ", ".join(self._known)
            return error_output(f"there is no tool {call['name']!r}; there are: {names}")
        limit = self._request.tools.max_calls
        if limit is not None and self._calls >= limit:
            return error_output(f"no more than {limit} calls are allowed; answer without")
        self._calls += 1
        return run_tool(kind, call["arguments"])

    def _next(self, items: list[dict[str, Any]]) -> TurnRequest:
        tools = self._request.tools
        spent = tools.max_calls is not None and self._calls >= tools.max_calls
        if spent or self._rounds >= MAX_ROUNDS:
            tools = ToolOptions(choice="none")
        elif tools.choice == "required":
            # That one call must be made has been seen to.
            tools = msgspec.structs.replace(tools, choice="auto", name=None)
        self._request = msgspec.structs.replace(
            self._request,
            messages=[*(self._request.messages or []), *items_to_messages(items)],
            tools=tools,
        )
        return self._request
